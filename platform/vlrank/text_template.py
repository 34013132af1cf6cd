"""Templates of item texts, such as ``{title:.40} [{categories[-1]}]``: a format that can name fields and nothing else.

    {title}  {brand}  {categories}  {description}     a field; categories are joined as A > B
    {categories[0]}  {categories[-1]}                 the first, the last of the list
    {title:.40}                                       at most 40 characters, ended at a word where one ends near
    {{  }}                                            braces

Templates come from configs of all origins, so Python's own format, which reads attributes and calls ``__format__``, is
not used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TEXT_FIELDS = ("title", "brand", "categories", "description")
_LISTS = ("categories",)
_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
_FIELD = re.compile(r"(\w+)(?:\[([^\]]*)\])?(?::\.(\d+))?")


@dataclass(frozen=True, slots=True)
class TemplateField:
    """One field of a template.

    Attributes:
        name: One of `TEXT_FIELDS`.
        place: 0 for the first, -1 for the last of a list; None for the whole field.
        chars: Longest text; None without a cut.
    """

    name: str
    place: int | None = None
    chars: int | None = None


def parse_template(template: str) -> tuple[str | TemplateField, ...]:
    """The plain pieces and the fields of a template, in order.

    Raises:
        ValueError: an unknown field, anything else in braces, or no field at all.
    """
    parts: list[str | TemplateField] = []
    for found in _PARTS.finditer(template):
        piece = found[0]
        if found[1] is not None:
            parts.append(_field(found[1]))
        elif piece in ("{", "}"):
            raise ValueError(
                f"`{piece}` at character {found.start() + 1} is half a pair (`{_around(template, found.start())}`); "
                f"write {piece * 2} for a brace"
            )
        else:
            parts.append(piece[0] if piece in ("{{", "}}") else piece)
    if not any(isinstance(part, TemplateField) for part in parts):
        raise ValueError(f"the template names no field; fields are {', '.join(TEXT_FIELDS)}")
    return tuple(parts)


def _around(template: str, place: int, width: int = 15) -> str:
    """What stands at a place, with ``width`` characters on both sides."""
    start, end = max(0, place - width), place + width + 1
    return f"{'...' * (start > 0)}{template[start:end]}{'...' * (end < len(template))}"


def _field(text: str) -> TemplateField:
    found = _FIELD.fullmatch(text)
    name = found[1] if found else re.match(r"\w*", text)[0]  # type: ignore[index]
    if name not in TEXT_FIELDS:
        raise ValueError(f"unknown field `{{{text}}}`; fields are {', '.join(TEXT_FIELDS)}")
    if found is None:
        raise ValueError(f"`{{{text}}}` cannot be read; examples: {{title}}, {{title:.40}}, {{categories[-1]}}")
    place, chars = found[2], found[3]
    if place is not None and name not in _LISTS:
        raise ValueError(f"`{{{text}}}`: {name} is no list; [0] and [-1] go with {', '.join(_LISTS)}")
    if place not in (None, "0", "-1"):
        raise ValueError(f"`{{{text}}}`: [0] takes the first and [-1] the last, there is no [{place}]")
    if chars is not None and int(chars) < 1:
        raise ValueError(f"`{{{text}}}`: nothing is left of a field that is cut to {chars} characters")
    return TemplateField(name, None if place is None else int(place), None if chars is None else int(chars))

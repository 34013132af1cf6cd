"""Text of items: markup removed, entities decoded, whitespace folded, and one line composed from the cleaned fields."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

from vlrank.text_template import TemplateField

MAX_RAW_CHARS = 20_000
"""Raw fields are cut to this before cleaning: what prompts show is far shorter, and hostile markup stays cheap."""

_BLOCK = re.compile(r"<!--.*?(?:-->|$)|<(script|style)\b.*?(?:</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
# A tag starts with a letter right after "<", so "size < 5" stays.
_TAG = re.compile(r"</?[a-zA-Z!](?:\"[^\"<]*\"|'[^'<]*'|[^'\"<>])*>|</?[a-zA-Z][^<>]*>")
_CUT_TAG = re.compile(
    r"</?(?:a|b|br|div|em|font|h[1-6]|i|img|li|ol|p|span|strong|table|td|tr|u|ul)\b[^<>]*$", re.IGNORECASE
)
_MARKUP = re.compile(r"[<&]")
_NOT_TEXT = {"Cc", "Cs", "Co", "Cn"}  # control, surrogate, private use, unassigned
_INVISIBLE = dict.fromkeys([0x00AD, 0x200B, 0x200C, 0x200E, 0x200F, 0x2060, 0xFEFF])
_PLACEHOLDERS = {"", "-", "n/a", "na", "nan", "none", "null", "unknown", "no title", "[]", "{}"}
_SCRIPT_LEFTOVER = re.compile(r"^(?:var|function)\b.*[;{(]|getTime\(\)", re.DOTALL)
_STORE = re.compile(r"^Visit (?:Amazon's|the) (.+?) (?:Page|Store)\b.*$")


def clean_text(raw: str, max_chars: int | None = None) -> str:
    """Plain text on one line.

    Entities are decoded before and after tags are removed, up to three times, because scraped metadata is often escaped
    twice (``&amp;lt;b&amp;gt;``). Contents of scripts, styles and comments go; control characters and lone surrogates
    go; Unicode is normalised to NFC. What is longer than ``max_chars`` is cut at a word where one ends in its last
    fifth.

    >>> clean_text('<span class="a-size-large">Tea &amp; Milk</span>  <br/> 2 < 3')
    'Tea & Milk 2 < 3'
    """
    text = raw[:MAX_RAW_CHARS]
    for _ in range(3):
        if not _MARKUP.search(text):
            break
        before = text
        text = _CUT_TAG.sub(" ", _TAG.sub(" ", _BLOCK.sub(" ", html.unescape(text))))
        if text == before:
            break
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_INVISIBLE))
    if not text.isprintable():
        text = "".join(c if c.isprintable() or unicodedata.category(c) not in _NOT_TEXT else " " for c in text)
    return cut(" ".join(text.split()), max_chars)


def cut(text: str, max_chars: int | None) -> str:
    """The first ``max_chars`` characters, ended at a word where that costs less than a fifth."""
    if max_chars is None or len(text) <= max_chars:
        return text
    head = text[:max_chars]
    if not text[max_chars].isspace() and (space := head.rfind(" ")) >= max_chars * 0.8:
        head = head[:space]
    return head.rstrip()


def clean_title(raw: str, max_chars: int | None = None) -> str:
    """A clean title; empty when it is a placeholder or the remains of a script, as in some scraped pages."""
    title = clean_text(raw, max_chars)
    return "" if title.lower() in _PLACEHOLDERS or _SCRIPT_LEFTOVER.search(title) else title


def clean_brand(raw: str) -> str:
    """A clean brand; empty when it is a placeholder such as ``Unknown``."""
    brand = _STORE.sub(r"\1", clean_text(raw, 100))
    return "" if brand.lower() in _PLACEHOLDERS else brand


def clean_description(raw: str, max_chars: int | None = None) -> str:
    """A clean description; empty when it is a placeholder such as ``N/A``."""
    text = clean_text(raw, max_chars)
    return "" if text.lower() in _PLACEHOLDERS else text


def clean_categories(raw: Iterable[str]) -> list[str]:
    """Clean category names without repetition, in order; sentences that were scraped into the list are left out."""
    names = (clean_text(name) for name in raw)
    return list(dict.fromkeys(name for name in names if name.lower() not in _PLACEHOLDERS and len(name) <= 80))


def item_text(title: str, brand: str | None, categories: Sequence[str], description: str | None, max_chars: int) -> str:
    """One line for an item, most telling first: ``title | brand | A > B | description``.

    >>> item_text("Mug", "Alva", ["Home", "Kitchen"], "Blue.", 60)
    'Mug | Alva | Home > Kitchen | Blue.'
    """
    parts = [title, brand, " > ".join(categories), description]
    return cut(" | ".join(part for part in parts if part), max_chars)


_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def templated_text(
    template: Sequence[str | TemplateField],
    title: str,
    brand: str | None,
    categories: Sequence[str],
    description: str | None,
    max_chars: int,
) -> str:
    """One line for an item, as a template has it (`vlrank.text_template`).

    Where the title is missing, ``{title}`` is what `item_text` shows without one. Brackets around a field that an item
    lacks are left out, and blanks are folded.

    >>> from vlrank.text_template import parse_template
    >>> short = parse_template("{title:.10} [{categories[-1]}]")
    >>> templated_text(short, "Mug with a long handle", None, ["Home", "Kitchen"], None, 60)
    'Mug with a [Kitchen]'
    >>> templated_text(short, "Mug", None, [], None, 60)
    'Mug'
    """
    values: dict[str, str | Sequence[str]] = {
        "title": title or item_text("", brand, categories, description, max_chars),
        "brand": brand or "",
        "categories": categories,
        "description": description or "",
    }
    parts = [part if isinstance(part, str) else _value(part, values[part.name]) for part in template]
    for i in range(1, len(template) - 1):
        if isinstance(template[i], TemplateField) and not parts[i] and _encloses(template[i - 1], template[i + 1]):
            parts[i - 1], parts[i + 1] = parts[i - 1][:-1], parts[i + 1][1:]
    return cut(" ".join("".join(parts).split()), max_chars)


def _encloses(before: str | TemplateField, behind: str | TemplateField) -> bool:
    return isinstance(before, str) and isinstance(behind, str) and _BRACKETS.get(before[-1]) == behind[0]


def _value(field: TemplateField, value: str | Sequence[str]) -> str:
    if not isinstance(value, str):
        value = " > ".join(value if field.place is None else value[field.place :][:1])
    return cut(value, field.chars)

"""Versioned prompts: ``prompts/KIND/VERSION.yaml``, named ``KIND/VERSION`` in every row that they made."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from vlrank.config import What
from vlrank.errors import UserError
from vlrank.prompting.prompts import plain

FOLDER = Path(__file__).parent / "prompts"
Image = Literal["required", "optional", "none"]


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The question about one item.

    Attributes:
        prompt_id: E.g. ``"caption/v1"``; for a file of the user's own its stem.
        kind: What it makes, ``caption`` or ``semantic_summary``.
        image: Whether items without a picture go to the quarantine (``required``), are described by their text alone
            (``optional``), or pictures are never shown (``none``).
        template: The question; ``{text}`` stands for the item's text.
        json_schema: Structured output: a JSON schema that the engine must follow (vLLM only).
        json_field: The field of the structured output that becomes the row's text.
    """

    prompt_id: str
    kind: str
    image: Image
    template: str
    json_schema: Mapping[str, Any] | None = field(default=None, hash=False)
    json_field: str | None = None

    def question(self, text: str) -> str:
        """The template with the item's text in one line (empty lines vanish where an item has no text)."""
        filled = self.template.replace("{text}", plain(text))
        return "\n".join(line for line in filled.splitlines() if line.strip())

    def messages(self, text: str, *, with_image: bool) -> list[dict[str, Any]]:
        """Chat messages as ``apply_chat_template`` takes them: one user message, the picture first."""
        if not with_image:
            return [{"role": "user", "content": self.question(text)}]
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.question(text)}]}]


def prompt_ids(kind: str | None = None) -> list[str]:
    """Ids of the prompts that come with vlrank, oldest first within a kind."""
    kinds = [kind] if kind else sorted(get_args(What))
    return [f"{name}/{path.stem}" for name in kinds for path in sorted((FOLDER / name).glob("v*.yaml"), key=_version)]


def load_prompt(prompt: str | None, kind: str) -> PromptTemplate:
    """A prompt by id, by file, or (None) the newest of its kind.

    Args:
        prompt: ``caption/v1``, the path of a YAML file of the same form, or None.
        kind: ``caption`` or ``semantic_summary``.

    Raises:
        UserError: unknown id, unreadable file, or a prompt for something else.
    """
    known = prompt_ids(kind)
    if prompt is not None and prompt.endswith((".yaml", ".yml")):
        return _read(Path(prompt), Path(prompt).stem, kind)
    name = known[-1] if prompt is None else prompt
    if name not in known:
        raise UserError(
            f"unknown prompt {name!r} for {kind}", f"Choose one of {', '.join(known)}, or name a .yaml file."
        )
    return _read(FOLDER / f"{name}.yaml", name, kind)


def _version(path: Path) -> tuple[int, str]:
    digits = re.search(r"\d+", path.stem)
    return (int(digits.group()) if digits else 0, path.stem)


def _read(path: Path, prompt_id: str, kind: str) -> PromptTemplate:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"prompt file {path} does not exist", f"Known prompts: {', '.join(prompt_ids())}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"prompt file {path} cannot be read: {error}") from None
    keys = {"kind", "image", "template", "json_schema", "json_field"}
    if not isinstance(raw, dict) or not {"kind", "image", "template"} <= raw.keys() <= keys:
        raise UserError(
            f"prompt file {path} must have the keys kind, image and template",
            f"Allowed keys: {', '.join(sorted(keys))}.",
        )
    if raw["kind"] != kind:
        raise UserError(
            f"prompt {prompt_id!r} makes {raw['kind']!r}, not {kind!r}", f"Choose one of {', '.join(prompt_ids(kind))}."
        )
    if raw["image"] not in get_args(Image):
        raise UserError(f"prompt file {path}: image is {raw['image']!r}, expected one of {', '.join(get_args(Image))}")
    template = raw["template"]
    if not isinstance(template, str) or not template.strip():
        raise UserError(f"prompt file {path}: template is empty")
    fields = (
        {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        if _braces(template)
        else set()
    )
    if fields - {"text"}:
        raise UserError(
            f"prompt file {path}: unknown field {{{sorted(fields - {'text'})[0]}}}", "The only field is {text}."
        )
    schema, name = raw.get("json_schema"), raw.get("json_field")
    if (schema is None) != (name is None) or (schema is not None and name not in schema.get("properties", {})):
        raise UserError(
            f"prompt file {path}: json_schema and json_field go together, and the field must be one of its properties"
        )
    return PromptTemplate(prompt_id, kind, raw["image"], template, schema, name)


def _braces(template: str) -> bool:
    """Whether the braces of a template are balanced; a lone one is taken literally."""
    try:
        list(string.Formatter().parse(template))
    except ValueError:
        return False
    return True

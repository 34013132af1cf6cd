"""The four modes: what a prompt shows of an item, and which kind of model reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlrank.config import MODES, Mode
from vlrank.errors import UserError

Family = Literal["text", "vision"]
Shown = Literal["image_path", "caption", "semantic_summary"]


@dataclass(frozen=True, slots=True)
class ModeSpec:
    """One mode.

    Attributes:
        name: As in configs and on the command line.
        shows: The key of `ItemMeta` that a candidate shows beside its text.
        label: How the shown text is introduced in an item's line; empty for pictures.
        family: ``vision`` models are those of `vlrank.engines.families`, ``text`` models any causal language model.
        remedy: The command that makes what the mode shows.
    """

    name: Mode
    shows: Shown
    label: str
    family: Family
    remedy: str

    @property
    def pixels(self) -> bool:
        """Whether prompts carry pictures."""
        return self.shows == "image_path"

    @property
    def shown(self) -> str:
        """What the mode shows beside an item's text, in words."""
        return "picture" if self.pixels else self.shows.replace("_", " ")


_SPECS: dict[str, ModeSpec] = {
    "raw_image": ModeSpec("raw_image", "image_path", "", "vision", "vlrank prepare ... --use_image"),
    "caption": ModeSpec("caption", "caption", "Image", "vision", "vlrank generate DATASET --what caption"),
    "semantic_summary": ModeSpec(
        "semantic_summary", "semantic_summary", "Summary", "vision", "vlrank generate DATASET --what semantic_summary"
    ),
    "semantic_summary_small": ModeSpec(
        "semantic_summary_small",
        "semantic_summary",
        "Summary",
        "text",
        "vlrank generate DATASET --what semantic_summary",
    ),
}


def mode_spec(name: str) -> ModeSpec:
    """The mode of that name.

    Raises:
        UserError: unknown mode.
    """
    try:
        return _SPECS[name]
    except KeyError:
        raise UserError(f"unknown mode {name!r}", f"Choose one of: {', '.join(MODES)}.") from None


def shows(spec: ModeSpec, item: Mapping[str, object]) -> bool:
    """Whether the item has what the mode shows."""
    return bool(item.get(spec.shows))

"""The vision families, one file each, and the check of a model's architecture before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlrank.engines.families.family import VisionFamily
from vlrank.engines.families.qwen2_5_vl import Qwen25VL
from vlrank.engines.families.qwen3_5 import Qwen35
from vlrank.engines.families.qwen3_vl import Qwen3VL
from vlrank.errors import UserError
from vlrank.prompting.modes import ModeSpec

VISION_FAMILIES: dict[str, VisionFamily] = {family.model_type: family for family in (Qwen25VL(), Qwen3VL(), Qwen35())}
"""``model_type`` -> family."""


def vision_family(config: Any) -> VisionFamily:
    """The family of a transformers configuration with a vision tower.

    Raises:
        UserError: none of ours.
    """
    if (family := VISION_FAMILIES.get(config.model_type)) is None:
        raise UserError(f"the architecture {config.model_type} is no vision family that vlrank knows", _choose())
    return family


def check_architecture(config: Mapping[str, Any], model: str, spec: ModeSpec) -> None:
    """Whether a model can be trained or ranked with in a mode, from its config.json.

    Raises:
        UserError: a mode of vision models with another architecture, or a text mode with a vision model.
    """
    kind = config.get("model_type")
    known = VISION_FAMILIES.get(str(kind))
    if spec.family == "vision" and known is None:
        raise UserError(f"mode {spec.name} needs a model of a vision family, but {model} is a {kind}", _choose())
    if spec.family == "text" and known is not None:
        raise UserError(
            f"mode {spec.name} needs a causal language model, but {model} is a {known.name}, with a vision tower",
            "Set `model` to a causal language model, or choose another mode: semantic_summary has the same prompts.",
        )


def _choose() -> str:
    *others, last = (f"{family.name} ({family.example})" for family in VISION_FAMILIES.values())
    return f"Set `model` to one of {', '.join(others)} or {last}, or choose another mode."

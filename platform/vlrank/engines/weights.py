"""Loading base models whole: weights that the files lack would be random, and trained and saved as if they were not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlrank.errors import UserError


def load_whole(kind: Any, name: str, **options: Any) -> Any:
    """``kind.from_pretrained(name, ...)`` from safetensors alone.

    Raises:
        UserError: the files lack some of the model's weights.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, revision=options.get("revision"))
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # sdpa would leave the soft cap out
    model, info = kind.from_pretrained(name, output_loading_info=True, use_safetensors=True, **options)
    refuse_missing(name, info["missing_keys"])
    _drop_contradictions(model)
    return model


def _drop_contradictions(model: Any) -> None:
    """Leave out settings of generation that contradict each other: transformers ignores them and refuses to write them.

    Folders have such (a temperature without sampling), and a checkpoint could not be saved. The tokens' ids stay.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = type(settings)(**{name: getattr(settings, name) for name in names})


def check_whole(model: Any, folder: str) -> None:
    """The same for a model that another library loaded from a local folder.

    Raises:
        UserError: as above.
    """
    from safetensors import safe_open

    files = list(Path(folder).glob("*.safetensors"))
    stored: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored |= set(tensors.keys())
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if files:  # a hub name is in the library's own cache
        refuse_missing(folder, {name for name, _ in model.named_parameters()} - stored - set(tied))


def refuse_missing(name: str, missing: Iterable[str]) -> None:
    """Raise a `UserError` if ``missing`` names any weights of model ``name``."""
    if not (listed := sorted(missing)):
        return
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    remedy = "Get the whole model again."
    if listed == ["lm_head.weight"]:
        remedy = "If its output head is its embeddings, set tie_word_embeddings: true at the top of config.json."
    raise UserError(f"model {name} lacks weights: {', '.join(listed[:3])}{more}", remedy)

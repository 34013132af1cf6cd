"""Whether an adapter belongs to its base model and an engine can serve it, read from file headers before loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlrank.data.tables import read_json
from vlrank.engines.models import ModelFolder
from vlrank.errors import UserError

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be started for."""

_REMEDY = "Use engine.name=transformers, or merge the adapter into its base model (PEFT's merge_and_unload)."
Shapes = dict[str, tuple[int, ...]]


def check_adapter(model: ModelFolder, engine: str) -> None:
    """Refuse an adapter that an engine would load in part, or not at all, and rank or write as the base model does.

    The keys and shapes of ``adapter_model.safetensors`` must be those of the adapter that PEFT makes from
    ``adapter_config.json`` on the base model, built here without weights.

    Args:
        model: Its folders are on this node; a model without an adapter passes.
        engine: ``vllm`` serves LoRA only, and not all of its variants.

    Raises:
        UserError: missing or unexpected keys, other shapes, or a variant that the engine does not serve.
    """
    if not model.is_adapter:
        return
    folder = Path(model.path)
    if engine == "vllm":
        _check_served(folder)
    found, expected, base = _file_shapes(folder), *_expected_shapes(model)
    missing = sorted(expected.keys() - found.keys())
    # PEFT stores adapted embeddings and heads whole, beside their matrices.
    copies = {key for key in found if base.get(key.replace(".base_layer.", ".")) == found[key]}
    unexpected = sorted(found.keys() - expected.keys() - copies)
    if missing or unexpected:
        parts = [("missing keys", missing), ("unexpected keys", unexpected)]
        raise UserError(
            f"adapter {folder} does not fit its base model {model.base}: "
            + ", ".join(_some(what, keys) for what, keys in parts if keys),
            "Name the base model that the adapter was trained on (base_model_name_or_path in adapter_config.json).",
        )
    other = next((key for key, shape in expected.items() if found[key] != shape), None)
    if other is not None:
        raise UserError(
            f"adapter {folder}: {other} has shape {list(found[other])}, its base model {model.base} and "
            f"adapter_config.json call for {list(expected[other])}",
            "Name the base model that the adapter was trained on (base_model_name_or_path in adapter_config.json).",
        )
    ignored = sorted(key for key in found if key not in expected or _in_vision_tower(key))
    if engine == "vllm" and ignored:
        raise UserError(f"adapter {folder}: vLLM would ignore {_some('keys', ignored)}", _REMEDY)


def lora_rank(adapter: Path) -> int:
    """The smallest rank that vLLM offers and the adapter fits into; `check_adapter` has refused larger ones."""
    rank = _largest_rank(read_json(adapter / "adapter_config.json"))
    return next(size for size in LORA_RANKS if size >= rank)


def _largest_rank(config: dict[str, Any]) -> int:
    return max(int(rank) for rank in (config["r"], *(config.get("rank_pattern") or {}).values()))


def _check_served(folder: Path) -> None:
    """What vLLM refuses only when the engine is up, or serves with other results."""
    config = read_json(folder / "adapter_config.json")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"adapter {folder} is of type {kind}; vLLM serves LORA", _REMEDY)
    if (rank := _largest_rank(config)) > LORA_RANKS[-1]:
        raise UserError(f"adapter {folder} has rank {rank}; vLLM serves adapters up to rank {LORA_RANKS[-1]}", _REMEDY)
    refused = {
        "use_dora": "DoRA",
        "modules_to_save": f"whole modules beside the adapter (modules_to_save={config.get('modules_to_save')})",
        "lora_bias": "LoRA with a bias (lora_bias)",
        "rank_pattern": "ranks per module (rank_pattern)",
        "alpha_pattern": "alphas per module (alpha_pattern)",
        "trainable_token_indices": "trained tokens (trainable_token_indices)",
        "target_parameters": "adapted parameters (target_parameters)",
        "layer_replication": "repeated layers (layer_replication)",
        "alora_invocation_tokens": "activated LoRA",
    }
    used = [what for key, what in refused.items() if config.get(key)]
    used += [f"biases (bias={config['bias']})"] * (config.get("bias", "none") != "none")
    if used:
        raise UserError(f"adapter {folder} has {', '.join(used)}, which vLLM does not serve", _REMEDY)


def _file_shapes(folder: Path) -> Shapes:
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}", "Save the adapter with save_pretrained.") from None


def _expected_shapes(model: ModelFolder) -> tuple[Shapes, Shapes]:
    """Keys and shapes of the adapter's file, and of the base's own weights as such a file would call them."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from vlrank.compat import patch_torchvision

    patch_torchvision()
    kind = AutoModelForImageTextToText if model.family == "vision" else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(model.base, revision=model.revision)
        with torch.device("meta"):
            base = kind.from_config(config)
        weights = {f"base_model.model.{key}": tuple(value.shape) for key, value in base.state_dict().items()}
        adapter = PeftConfig.from_pretrained(model.path)
        if adapter.is_prompt_learning:
            raise UserError(
                f"adapter {model.path} is of type {adapter.peft_type.value}: it adds to prompts what no engine reads",
                "Use an adapter of the model's layers, such as LoRA.",
            )
        adapter.base_model_name_or_path = model.base  # else PEFT warns that it was trained at another place
        adapted = get_peft_model(base, adapter, low_cpu_mem_usage=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"adapter {model.path} cannot be put on its base model {model.base}: {str(error).splitlines()[0]}"
        ) from error
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {key: tuple(value.shape) for key, value in tensors.items()}, weights


def _in_vision_tower(key: str) -> bool:
    return any(part in ("visual", "vision_tower", "vision_model") for part in key.split("."))


def _some(what: str, keys: list[str]) -> str:
    return f"{len(keys)} {what} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"

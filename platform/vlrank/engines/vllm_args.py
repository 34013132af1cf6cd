"""Arguments of vLLM's engines."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from vlrank.config import EngineConfig
from vlrank.engines.models import ModelFolder
from vlrank.engines.resources import kv_cache_bytes
from vlrank.errors import UserError
from vlrank.prompting.modes import mode_spec
from vlrank.storage import location

PICTURE_SHARE = 0.1
"""Of the GPU, for encoded pictures."""

_ANSWER = 16  # tokens behind a prompt: a label's, and those that are decoded
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def engine_kwargs(model: ModelFolder, config: EngineConfig, on_gpu: bool) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; ``config.engine_kwargs`` wins over everything."""
    share = gpu_share(config)
    kwargs: dict[str, Any] = {
        "model": model.base,
        "dtype": config.dtype if on_gpu or config.dtype != "auto" else "float32",
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization * share,
        "enforce_eager": config.enforce_eager if config.enforce_eager is not None else not on_gpu,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "scheduling_policy": "priority",
        "seed": 0,
        # bfloat16 logits come in steps that turn close candidates into ties.
        "hf_overrides": {"head_dtype": "float32"},
    }
    tokenizer = Path(model.path) / "tokenizer_config.json"
    if model.is_adapter and tokenizer.is_file():
        kwargs["tokenizer"] = model.path
    kwargs["max_model_len"] = _max_model_len(model, config)
    if model.family == "vision":
        pixels = model.mode is None or mode_spec(model.mode).pixels
        kwargs["limit_mm_per_prompt"] = {"image": model.ranking.window if pixels else 0, "video": 0}
        if pixels and on_gpu:
            kwargs["mm_processor_cache_gb"] = 16
            kwargs["gpu_memory_utilization"] *= 1 - PICTURE_SHARE  # vLLM does not count its cache of encoded ones
    if on_gpu and share < 1 and "kv_cache_memory_bytes" not in config.engine_kwargs:
        room = gpu_memory() * kwargs["gpu_memory_utilization"]
        kwargs["kv_cache_memory_bytes"] = kv_cache_bytes(model.base, share, room)
    if model.is_adapter:
        kwargs |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank(Path(model.path))}
    return {**kwargs, **config.engine_kwargs}


def gpu_memory() -> int:
    """Bytes of this process's GPU."""
    from vllm.platforms import current_platform

    return int(current_platform.get_device_total_memory())


def gpu_share(config: EngineConfig) -> float:
    """The engine's share of its GPU, above 0 and at most 1."""
    return config.gpus if config.gpus is not None and 0 < config.gpus < 1 else 1.0


def max_prompt_tokens(model: ModelFolder, config: EngineConfig) -> int:
    """The model's ``ranking.max_prompt_tokens``, or less where the engine is started for shorter prompts."""
    return min(model.ranking.max_prompt_tokens, _max_model_len(model, config) - _ANSWER)


def _max_model_len(model: ModelFolder, config: EngineConfig) -> int:
    longest = config.max_model_len or model.ranking.max_prompt_tokens + _ANSWER
    return min(longest, _context(model.base) or longest)


def _context(base: str) -> int | None:
    config = location(base) / "config.json"
    if not config.is_file():
        return None
    loaded = json.loads(config.read_text(encoding="utf-8"))
    longest = loaded.get("text_config", loaded).get("max_position_embeddings")
    return int(longest) if longest else None


def _lora_rank(adapter: Path) -> int:
    rank = int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    size = next((size for size in _LORA_RANKS if size >= rank), None)
    if size is None:
        raise UserError(
            f"vLLM serves adapters up to rank {_LORA_RANKS[-1]}, {adapter} has {rank}", "Use engine.name=transformers."
        )
    return size


def has_gpu() -> bool:
    """Whether this process sees a CUDA GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())

"""What an engine takes of a machine: which engine, its share of a GPU, its cache, its processes' environment."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vlrank.config import EngineConfig
from vlrank.engines.models import ModelFolder, read_json
from vlrank.errors import UserError
from vlrank.installation import install_command
from vlrank.runtime import cluster_gpus
from vlrank.storage import location


class EngineDied(RuntimeError):
    """The engine's process has ended; no further request will be answered."""


def engine_name(config: EngineConfig) -> Literal["vllm", "transformers"]:
    """Which engine ``auto`` means where texts are written; see `ranking_engine`.

    Raises:
        UserError: vLLM was asked for and is not installed, or an engine that only ranks.
    """
    if config.name == "packed":
        raise UserError(
            "engine.name=packed ranks and writes no texts", "Set engine.name to vllm, transformers or auto."
        )
    installed = importlib.util.find_spec("vllm") is not None
    if config.name == "vllm" and not installed:
        raise UserError(
            "vLLM is not installed", f"Install it ({install_command('vllm')}), or set engine.name=transformers."
        )
    if config.name == "auto":
        return "vllm" if installed else "transformers"
    return config.name


PACKED_ARCHITECTURES = ("qwen3", "qwen2", "llama", "qwen3_vl")
"""``model_type`` of the models that the packed engine computes."""


def why_not_packed(config: Mapping[str, Any]) -> str | None:
    """Why the packed engine cannot rank with a model, as far as its ``config.json`` tells; None where it can."""
    kind, quantised = config.get("model_type"), config.get("quantization_config")
    if kind not in PACKED_ARCHITECTURES:
        return f"its architecture is {kind}, not one of {', '.join(PACKED_ARCHITECTURES)}"
    if quantised and not (quantised.get("load_in_4bit") or quantised.get("_load_in_4bit")):
        return f"its weights are quantised by {quantised.get('quant_method')}"
    return None


def ranking_engine(config: EngineConfig, model: ModelFolder) -> Literal["packed", "vllm", "transformers"]:
    """Which engine ranks with a model: ``auto`` is the packed one, for what it cannot do vLLM, else transformers.

    Raises:
        UserError: vLLM was asked for and is not installed.
    """
    if config.name == "packed":
        return "packed"
    file = location(model.base) / "config.json"
    known = read_json(file) if file.is_file() else {}
    needs_vllm = config.tensor_parallel_size > 1 or config.engine_kwargs
    if config.name != "auto" or needs_vllm or (known and why_not_packed(known)):
        return engine_name(config)
    return "packed"


def engine_gpus(config: EngineConfig) -> float:
    """GPUs of one engine; by default one (per tensor-parallel rank) where the cluster has any.

    Raises:
        UserError: fractions together with tensor parallelism.
    """
    gpus = config.gpus if config.gpus is not None else float(cluster_gpus() > 0)
    if config.tensor_parallel_size > 1 and 0 < gpus < 1:
        raise UserError(
            f"engine.gpus={gpus} with engine.tensor_parallel_size={config.tensor_parallel_size}",
            "An engine that spans GPUs needs whole ones: leave engine.gpus away.",
        )
    return gpus


def kv_cache_bytes(model: str, gpus: float, room: float) -> int:
    """Room for the cache of an engine of vLLM that shares its GPU.

    vLLM measures free memory while it starts; engines that start side by side would see each other's allocations.

    Args:
        model: Folder or hub name of the weights.
        gpus: The engine's share, ``engine.gpus``.
        room: Bytes that the engine may use.

    Raises:
        UserError: too little room, or weights of unknown size.
    """
    weights = weights_bytes(model)
    if not weights:
        raise UserError(
            f"engine.gpus={gpus}: the weights' size of {model} is unknown",
            "Set engine.engine_kwargs.kv_cache_memory_bytes to the cache's size of one engine.",
        )
    cache = int(room) - weights - 3 * 2**30  # activations, graphs, CUDA itself
    if cache < 2**29:
        raise UserError(
            f"engine.gpus={gpus}: {room / 2**30:.1f} GiB do not hold {weights / 2**30:.1f} GiB of weights and a cache",
            "Give each engine more of the GPU (engine.gpus) and start fewer of them (engine.replicas).",
        )
    return cache


def weights_bytes(model: str) -> int:
    """Of a folder, or of a model on the hub; 0 where neither tells."""
    folder = Path(model)
    if folder.is_dir():
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    from huggingface_hub import model_info

    try:
        files = model_info(model, files_metadata=True, timeout=10).siblings or []
    except Exception:  # offline, private, no such model: its clients have errors of many kinds
        return 0
    return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))


def vllm_env(gpus: float) -> dict[str, str]:
    """Environment of vLLM's processes; what the user has set wins.

    On CPUs vLLM takes a fixed cache size, in GiB; small ones are enough for the models that make sense there. On GPUs
    FlashInfer would compile its sampling kernels on a host's first start, for minutes; nothing here samples from the
    top k or top p that they are for.
    """
    name, value = ("VLLM_USE_FLASHINFER_SAMPLER", "0") if gpus else ("VLLM_CPU_KVCACHE_SPACE", "1")
    return {name: os.environ.get(name, value)}

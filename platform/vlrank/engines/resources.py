"""What an engine takes from a machine: its kind, CPUs and GPUs, GPU memory, restarts, environment variables."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vlrank.config import EngineConfig
from vlrank.engines.models import ModelFolder, known_config
from vlrank.errors import UserError
from vlrank.installation import install_command
from vlrank.runtime import CAPACITY, cluster_gpus, cluster_resources

RESTARTS = 5
"""How often Ray restarts a crashed engine. Without a bound Ray Data restarts it forever; five survive an accident."""


GIB = 2**30
WORKSPACE = 3 * GIB
"""GPU memory of a vLLM engine beside weights and cache: activations, graphs, CUDA itself."""


class EngineDied(RuntimeError):
    """The engine's process has ended; no further request will be answered."""


def engine_name(config: EngineConfig) -> Literal["vllm", "transformers"]:
    """Which engine ``auto`` means where texts are written; see `ranking_engine`.

    Raises:
        UserError: vLLM is wanted and not installed, an engine that only ranks, or 8-bit products with transformers.
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
    name: Literal["vllm", "transformers"] = "vllm" if installed else "transformers"
    name = name if config.name == "auto" else config.name
    if name == "transformers" and config.quantization is not None:
        raise UserError(
            f"the transformers engine does not compute engine.quantization={config.quantization}",
            "Leave the key out, or use vLLM.",
        )
    return name


PACKED_ARCHITECTURES = ("qwen3", "qwen2", "llama", "qwen3_vl", "qwen2_5_vl")
"""``model_type`` of the models that the packed engine computes."""


def beyond_packed(config: Mapping[str, Any]) -> str | None:
    """Why the packed engine cannot rank with a model, as far as its ``config.json`` tells; None where it can."""
    kind, quantised = config.get("model_type"), config.get("quantization_config")
    text = config.get("text_config") or config
    if other := next((name for name in text.get("layer_types") or () if name != "full_attention"), None):
        return f"it has {other.replace('_', ' ')} layers"
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
    needs_vllm = config.tensor_parallel_size > 1 or config.engine_kwargs
    if config.name != "auto" or needs_vllm or left_by_packed(config, model):
        return engine_name(config)
    return "packed"


def left_by_packed(config: EngineConfig, model: ModelFolder) -> str | None:
    """Why ``auto`` does not rank with the packed engine, as far as the model's config.json at hand tells."""
    known = known_config(model.base) if config.name == "auto" else None
    return beyond_packed(known) if known else None


def maybe_quantised(base: str) -> bool:
    """Whether the stored weights of a base model may be quantised; known only where its config.json is at hand."""
    known = known_config(base)
    return not known or "quantization_config" in known


# ---- CPUs and GPUs ---------------------------------------------------------------------------------------------------


def engine_gpus(config: EngineConfig) -> float:
    """GPUs per tensor-parallel rank of an engine; by default one where the cluster has any.

    Raises:
        UserError: fractions together with tensor parallelism.
    """
    gpus = config.gpus if config.gpus is not None else float(cluster_gpus() > 0)
    if config.tensor_parallel_size > 1 and 0 < gpus < 1:
        raise UserError(
            f"engine.gpus={gpus} with engine.tensor_parallel_size={config.tensor_parallel_size}",
            "An engine that spans GPUs needs whole ones: leave engine.gpus unset.",
        )
    return gpus


def gpu_share(config: EngineConfig) -> float:
    """The engine's share of its GPU, above 0 and at most 1."""
    return config.gpus if config.gpus is not None and 0 < config.gpus < 1 else 1.0


def engine_actor(config: EngineConfig) -> dict[str, Any]:
    """Arguments of `ray.data.Dataset.map_batches` for the step whose actors hold one engine each.

    Raises:
        UserError: no node of the cluster is large enough.
    """
    import ray

    gpus = engine_gpus(config)
    gpus = math.ceil(gpus * config.tensor_parallel_size) if gpus >= 1 else gpus
    needs = {kind: amount for kind, amount in (("GPU", gpus), ("CPU", config.cpus)) if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if os.environ.get(CAPACITY):
        nodes.append(cluster_resources())  # the size of nodes that the autoscaler has yet to start is unknown
    if not any(all(node.get(kind, 0) >= amount for kind, amount in needs.items()) for node in nodes):
        has = sorted({", ".join(f"{node.get(kind, 0):g} {kind}" for kind in needs) for node in nodes})
        raise UserError(
            f"an engine needs {', '.join(f'{amount:g} {kind}' for kind, amount in needs.items())} on one node; "
            f"the cluster's nodes have {'; '.join(has)}",
            "Lower engine.gpus, engine.tensor_parallel_size or engine.cpus, or add a larger node to the cluster.",
        )
    return {"num_cpus": config.cpus, "num_gpus": gpus, "max_restarts": RESTARTS}


# ---- GPU memory ------------------------------------------------------------------------------------------------------


def has_gpu() -> bool:
    """Whether this process sees a CUDA GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def gpu_memory() -> int:
    """Bytes of this process's GPU; asks the driver, without a CUDA context."""
    from vllm.platforms import current_platform

    return int(current_platform.get_device_total_memory())


@functools.cache
def cluster_gpu_memory(gpus: float) -> int:
    """Bytes of a GPU of the cluster, measured by a task that reserves ``gpus``: the driver may have no GPU."""
    import ray

    memory: int = ray.get(ray.remote(num_gpus=min(gpus, 1), num_cpus=0)(gpu_memory).remote())
    return memory


def kv_cache_bytes(model: str, gpus: float, room: float) -> int:
    """Size of the KV cache of a vLLM engine that shares its GPU.

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
            f"engine.gpus={gpus}: the size of the weights of {model} is unknown",
            "Set engine.engine_kwargs.kv_cache_memory_bytes to the cache size of one engine.",
        )
    cache = int(room) - weights - WORKSPACE
    if cache < GIB // 2:
        raise UserError(
            f"engine.gpus={gpus}: {room / GIB:.1f} GiB do not hold {weights / GIB:.1f} GiB of weights and a cache",
            "Give each engine more of the GPU (engine.gpus) and start fewer of them (engine.replicas).",
        )
    return cache


def weights_bytes(model: str) -> int:
    """Size of the weights in a folder or on the hub; 0 where it is unknown."""
    folder = Path(model)
    if folder.is_dir():
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    from huggingface_hub import model_info

    try:
        files = model_info(model, files_metadata=True, timeout=10).siblings or []
    except Exception:  # offline, private, no such model: the client libraries raise errors of many kinds
        return 0
    return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))


# ---- environment -----------------------------------------------------------------------------------------------------


def vllm_env(gpus: float) -> dict[str, str]:
    """Environment of vLLM's processes; what the user has set wins.

    On CPUs vLLM takes a fixed cache size in GiB; small ones are enough for the models that make sense there. On GPUs
    FlashInfer would spend minutes compiling its sampling kernels on a host's first start, and nothing here samples from
    the top k or top p that they are for.
    """
    name, value = ("VLLM_USE_FLASHINFER_SAMPLER", "0") if gpus else ("VLLM_CPU_KVCACHE_SPACE", "1")
    return {name: os.environ.get(name, value)}

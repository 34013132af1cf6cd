"""Arguments of vLLM's engines, for scoring and for generation: the one place that configures vLLM."""

from __future__ import annotations

import atexit
import glob
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlrank.config import EngineConfig
from vlrank.engines.adapters import lora_rank
from vlrank.engines.models import ModelFolder, known_config, model_config
from vlrank.engines.resources import GIB, WORKSPACE, gpu_share, kv_cache_bytes, vllm_env, weights_bytes
from vlrank.prompting.modes import mode_spec

PICTURE_SHARE = 0.1
"""Share of the GPU that a scoring engine keeps for encoded pictures."""

_ANSWER = 16  # tokens after a prompt: those of a label, and those that are decoded


def scoring_args(model: ModelFolder, config: EngineConfig, memory: int | None) -> dict[str, Any]:
    """Arguments of the engine that scores labels.

    Args:
        model: What to load.
        config: ``config.engine_kwargs`` wins over everything.
        memory: Bytes of the engine's GPU; None on a CPU.

    Raises:
        UserError: too little memory.
    """
    own: dict[str, Any] = {
        "seed": 0,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        # bfloat16 logits come in steps that turn close candidates into ties.
        "hf_overrides": {"head_dtype": "float32"},
    }
    if model.is_adapter and (Path(model.path) / "tokenizer_config.json").is_file():
        own["tokenizer"] = model.path
    pixels = model.family == "vision" and (model.mode is None or mode_spec(model.mode).pixels)
    if pixels and memory:
        own["mm_processor_cache_gb"] = 16
        # vLLM does not count its cache of encoded pictures.
        config = config.model_copy(
            update={"gpu_memory_utilization": config.gpu_memory_utilization * (1 - PICTURE_SHARE)}
        )
    pictures = model.ranking.window if pixels else 0
    return _args(model, config, memory, max_scoring_len(model, config), pictures, own)


def generation_args(
    model: ModelFolder, config: EngineConfig, memory: int | None, *, max_model_len: int, pictures: int, seed: int
) -> dict[str, Any]:
    """Arguments of the engine that writes texts.

    Args:
        model: What to load.
        config: ``config.engine_kwargs`` wins over everything.
        memory: Bytes of the engine's GPU; None on a CPU.
        max_model_len: Tokens of the longest prompt and its answer.
        pictures: Pictures in a prompt; with 0 the vision tower is neither profiled nor given room.
        seed: The engine's seed.

    Raises:
        UserError: too little memory.
    """
    own: dict[str, Any] = {"seed": seed}
    if memory:
        # vLLM would take an engine inside Ray Data for a server with one waiting user, and 2,048 tokens a step.
        own |= {"max_num_batched_tokens": 16384, "max_num_seqs": 512}
    if model.family == "vision":
        own["mm_processor_cache_gb"] = 0  # every picture is seen once
    return _args(model, config, memory, max_model_len, pictures, own)


def _args(
    model: ModelFolder,
    config: EngineConfig,
    memory: int | None,
    max_model_len: int,
    pictures: int,
    own: dict[str, Any],
) -> dict[str, Any]:
    share = gpu_share(config)
    utilization = config.gpu_memory_utilization * share
    args: dict[str, Any] = {
        "model": model.base,
        "dtype": config.dtype if memory or config.dtype != "auto" else _cpu_dtype(model.base),
        "max_model_len": max_model_len,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": utilization,
        "enforce_eager": config.enforce_eager if config.enforce_eager is not None else not memory,
        "disable_log_stats": True,
        "worker_extension_cls": "vlrank.engines.orphans.EndsWithParent",
    }
    if config.tensor_parallel_size > 1:
        args["distributed_executor_backend"] = "mp"  # one engine, one node; Ray's workers would outlive a killed engine
    if model.revision is not None:
        args["revision"] = model.revision
    if config.quantization is not None:
        args["quantization"] = config.quantization
    if model.family == "vision":
        args["limit_mm_per_prompt"] = {"image": pictures, "video": 0}
    if memory and share < 1 and "kv_cache_memory_bytes" not in config.engine_kwargs:
        args["kv_cache_memory_bytes"] = kv_cache_bytes(model.base, share, memory * utilization)
    if model.is_adapter:
        args |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(Path(model.path))}
    return {**args, **own, **config.engine_kwargs}


def _cpu_dtype(base: str) -> str:
    """float32, as a CPU computes with transformers: "auto" would round a float32 model.

    vLLM's gated delta layers compute in bfloat16 alone on CPUs ("CPU GDN attention requires BF16").
    """
    config = known_config(base) or {}
    kinds = (config.get("text_config") or config).get("layer_types") or ()
    return "bfloat16" if "linear_attention" in kinds else "float32"


def without_pattern(folder: str) -> str:
    """A model's folder under a name that is no pattern: vLLM globs for weights, and takes ``[v2]`` in the path for one.

    Args:
        folder: A local folder or a name of the hub.

    Returns:
        ``folder``, or a link to it that lasts as long as this process.
    """
    path = Path(folder)
    if glob.escape(folder) == folder or not path.is_dir():
        return folder
    home = tempfile.mkdtemp(prefix="vlrank-model-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    link = Path(home) / "model"
    link.symlink_to(path.absolute(), target_is_directory=True)
    return str(link)


def cache_plan(model: ModelFolder, args: Mapping[str, Any], memory: int | None) -> str:
    """What an engine's KV cache will hold, for the summary; vLLM measures the exact size when it starts.

    Args:
        model: The model.
        args: Of `generation_args`.
        memory: Bytes of the engine's GPU; None on a CPU.
    """
    config = model_config(model.base, model.revision)
    config = config.get("text_config") or config
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    element = 4 if args["dtype"] == "float32" else 1 if "fp8" in str(args.get("kv_cache_dtype")) else 2
    ranks = args["tensor_parallel_size"]
    kinds = config.get("layer_types") or ["attention"] * config["num_hidden_layers"]
    caching = sum("linear" not in kind and kind not in ("conv", "mamba") for kind in kinds)  # others keep one state
    per_token = 2 * max(1, caching) * heads * width * element // ranks
    if memory is None:
        cache = int(float(vllm_env(0)["VLLM_CPU_KVCACHE_SPACE"]) * GIB)
    else:
        room = memory * args["gpu_memory_utilization"] - weights_bytes(model.base) // ranks - WORKSPACE
        cache = int(args.get("kv_cache_memory_bytes") or max(0, room))
    tokens = cache // per_token
    return (
        f"{cache / GIB:.1f} GiB, {tokens:,} tokens: {tokens // args['max_model_len']:,} of the longest rows at once"
        + (f" (at most {args['max_num_seqs']:,} rows)" if "max_num_seqs" in args else "")
    )


def concurrent_batches(args: Mapping[str, Any], batch_size: int) -> int:
    """Batches that an engine's actor works on at a time.

    A batch leaves only when its slowest row is done: twice as many rows as the engine runs sequences keep it full.
    """
    return max(8, math.ceil(2 * args.get("max_num_seqs", 0) / batch_size))


def max_prompt_tokens(model: ModelFolder, config: EngineConfig) -> int:
    """The model's ``ranking.max_prompt_tokens``, or less where the engine is started for shorter prompts."""
    return min(model.ranking.max_prompt_tokens, max_scoring_len(model, config) - _ANSWER)


def max_scoring_len(model: ModelFolder, config: EngineConfig) -> int:
    """``max_model_len`` of a scoring engine: the longest prompt and the label after it, within the model's context."""
    longest = config.max_model_len or model.ranking.max_prompt_tokens + _ANSWER
    return min(longest, context_length(model.base) or longest)


def context_length(base: str, revision: str | None = None) -> int | None:
    """Tokens that a model's config allows; None where it does not say."""
    config = model_config(base, revision)
    longest = (config.get("text_config") or config).get("max_position_embeddings")
    return int(longest) if longest else None

"""vLLM through `ray.data.llm`."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlrank.config import EngineConfig
from vlrank.engines.resources import engine_gpus, kv_cache_bytes, vllm_env
from vlrank.generation.job import PREPARE_CPUS, Job, prepare

if TYPE_CHECKING:
    import ray.data


def vllm_engine_kwargs(job: Job, engine: EngineConfig, gpus: float) -> dict[str, Any]:
    """Arguments of vLLM's engine; ``engine.engine_kwargs`` wins over everything."""
    kwargs: dict[str, Any] = {
        "dtype": _dtype(job, engine, gpus),
        "tensor_parallel_size": engine.tensor_parallel_size,
        "gpu_memory_utilization": engine.gpu_memory_utilization * (gpus if 0 < gpus < 1 else 1),
        "enforce_eager": engine.enforce_eager if engine.enforce_eager is not None else gpus == 0,
        "seed": job.seed,
        "disable_log_stats": True,
    }
    if gpus:
        # vLLM would take an engine inside Ray Data for a server that one user waits for, with 2,048 tokens a step.
        kwargs |= {"max_num_batched_tokens": 16384, "max_num_seqs": 512}
    if engine.max_model_len is not None:
        kwargs["max_model_len"] = engine.max_model_len
    if job.revision is not None:
        kwargs["revision"] = job.revision
    if job.sees:
        # Every picture is seen once: a cache of prepared pictures would only cost memory. Where no picture is ever
        # shown the vision tower is neither profiled nor given room.
        kwargs["limit_mm_per_prompt"] = {"image": int(job.prompt.image != "none"), "video": 0}
        kwargs["mm_processor_cache_gb"] = 0
    if job.adapter:
        kwargs |= {"enable_lora": True, "max_lora_rank": _lora_rank(Path(job.adapter))}
    if 0 < gpus < 1 and "kv_cache_memory_bytes" not in engine.engine_kwargs:
        room = _gpu_memory(gpus) * kwargs["gpu_memory_utilization"]
        kwargs["kv_cache_memory_bytes"] = kv_cache_bytes(job.model, gpus, room)
    return {**kwargs, **engine.engine_kwargs}


def concurrent_batches(engine_kwargs: Mapping[str, Any], batch_size: int) -> int:
    """Batches that an engine's actor works on at a time.

    A batch leaves only when its slowest row is done: twice as many rows as the engine runs sequences keep it full.
    """
    return max(8, math.ceil(2 * engine_kwargs.get("max_num_seqs", 0) / batch_size))


def ray_llm(dataset: ray.data.Dataset, job: Job, engine: EngineConfig) -> ray.data.Dataset:
    """Rows of `job` -> rows with ``generated_text``, in the column DATA."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    gpus = engine_gpus(engine)
    bundle = {"CPU": engine.cpus, **({"GPU": gpus} if gpus else {})}
    kwargs = vllm_engine_kwargs(job, engine, gpus)
    config = vLLMEngineProcessorConfig(
        model_source=job.model,
        engine_kwargs=kwargs,
        batch_size=engine.batch_size,
        max_concurrent_batches=concurrent_batches(kwargs, engine.batch_size),
        concurrency=(engine.replicas, engine.replicas),
        placement_group_config={"bundle_per_worker": bundle},
        runtime_env={"env_vars": vllm_env(gpus)},
        should_continue_on_error=True,
        log_engine_metrics=False,
        chat_template_stage=False,  # `prepare` did it, in parallel tasks
        tokenize_stage=False,
        detokenize_stage=False,
    )
    processor = build_processor(
        config, preprocess=functools.partial(prepare, job=job), preprocess_map_kwargs={"num_cpus": PREPARE_CPUS}
    )
    # Without its own last step the processor returns good and failed rows alike, in the column DATA; that step would
    # give the two kinds different columns.
    processor.postprocess = None
    return processor(dataset)


def _dtype(job: Job, engine: EngineConfig, gpus: float) -> str:
    """On CPUs a float32 model stays one, and answers as it does in transformers; vLLM's ``auto`` would round it."""
    config = Path(job.model) / "config.json"
    if engine.dtype != "auto" or gpus or not config.is_file():
        return engine.dtype
    content = json.loads(config.read_text(encoding="utf-8"))
    text = content.get("text_config", {})
    dtype = next(
        (place[key] for place in (content, text) for key in ("dtype", "torch_dtype") if place.get(key)), "float32"
    )
    return "float32" if dtype == "float32" else "auto"


def _lora_rank(adapter: Path) -> int:
    """The smallest rank that vLLM offers and the adapter fits into."""
    rank = int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    return next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)


def _gpu_memory(gpus: float) -> int:
    """Of a GPU of the cluster; the driver need not have one."""
    import ray

    def total() -> int:
        import torch

        return int(torch.cuda.mem_get_info()[1])

    memory: int = ray.get(ray.remote(num_gpus=gpus, num_cpus=0)(total).remote())
    return memory

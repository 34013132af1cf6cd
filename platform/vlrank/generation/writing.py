"""The stages of generation on Ray Data: prepare on CPUs, let an engine write, judge the answer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vlrank.config import EngineConfig
from vlrank.engines.resources import cluster_gpu_memory, engine_actor, engine_gpus, engine_name
from vlrank.engines.vllm_args import cache_plan, generation_args
from vlrank.generation.job import Job, judge
from vlrank.generation.writers.ray_llm import ray_llm
from vlrank.generation.writers.rendered import rendered_vllm
from vlrank.generation.writers.transformers import transformers_batches

if TYPE_CHECKING:
    import ray.data


def build(
    dataset: ray.data.Dataset, job: Job, engine: EngineConfig, shard_rows: int, render_workers: int = 0
) -> ray.data.Dataset:
    """All stages: from rows ``item_id, input_hash, text, picture, picture_hash`` to what `vlrank.bulk` commits."""
    # A batch larger than a shard would join shards: larger commits, and fewer of them, than asked for.
    engine = engine.model_copy(update={"batch_size": min(engine.batch_size, shard_rows)})
    if engine_name(engine) == "transformers":
        dataset = transformers_batches(dataset, job, engine)
    else:
        args = engine_args(job, engine, _gpu_memory(engine))
        if render_workers:
            dataset = rendered_vllm(dataset, job, engine, args, render_workers)
        else:
            dataset = ray_llm(dataset, job, engine, args)
    return dataset.map_batches(functools.partial(judge, job=job), batch_size=None, num_cpus=0.5)


def engine_args(job: Job, engine: EngineConfig, memory: int | None) -> dict[str, Any]:
    """vLLM's arguments for this job.

    Args:
        job: With its ``max_model_len``.
        engine: The engines.
        memory: Bytes of an engine's GPU; None on a CPU.

    Raises:
        UserError: too little memory.
    """
    assert job.max_model_len is not None
    pictures = int(job.prompt.image != "none")
    return generation_args(
        job.folder, engine, memory, max_model_len=job.max_model_len, pictures=pictures, seed=job.seed
    )


def engine_lines(job: Job, engine: EngineConfig) -> dict[str, object]:
    """What the engines of this job take, for the summary; Ray has to be connected."""
    gpus = engine_gpus(engine) * engine.tensor_parallel_size
    lines: dict[str, object] = {
        "engines": f"{engine.replicas}, each with {f'{gpus:g} GPU' if gpus else f'{engine.cpus:g} CPU'}",
        "max_model_len": job.max_model_len,
    }
    if engine_name(engine) == "vllm":
        memory = _gpu_memory(engine)
        lines["KV cache of each"] = cache_plan(job.folder, engine_args(job, engine, memory), memory)
    return lines


def _gpu_memory(engine: EngineConfig) -> int | None:
    gpus = engine_actor(engine)["num_gpus"]  # refuses an engine that fits no node; a task would wait for one
    return cluster_gpu_memory(gpus) if gpus else None

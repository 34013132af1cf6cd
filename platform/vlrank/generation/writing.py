"""The stages of generation on Ray Data: prepare on CPUs, ask an engine, judge the answer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from vlrank.config import EngineConfig
from vlrank.engines.resources import engine_name
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
    # A batch larger than a shard would join shards, and commit fewer and larger ones than asked for.
    engine = engine.model_copy(update={"batch_size": min(engine.batch_size, shard_rows)})
    if engine_name(engine) == "transformers":
        dataset = transformers_batches(dataset, job, engine)
    elif render_workers:
        dataset = rendered_vllm(dataset, job, engine, render_workers)
    else:
        dataset = ray_llm(dataset, job, engine)
    return dataset.map_batches(functools.partial(judge, job=job), batch_size=None, num_cpus=0.5)

"""vLLM through `ray.data.llm`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vlrank.config import EngineConfig
from vlrank.engines.failures import root_cause
from vlrank.engines.resources import engine_actor, vllm_env
from vlrank.engines.vllm_args import concurrent_batches, without_pattern
from vlrank.generation.job import PREPARE_CPUS, Job, prepare

if TYPE_CHECKING:
    import ray.data


def ray_llm(dataset: ray.data.Dataset, job: Job, engine: EngineConfig, args: dict[str, Any]) -> ray.data.Dataset:
    """Rows of `job` -> rows with ``generated_text``, in the column DATA.

    Args:
        dataset: Rows as in `writing.build`.
        job: The job.
        engine: The engines.
        args: vLLM's arguments.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    actor = engine_actor(engine)
    config = vLLMEngineProcessorConfig(
        model_source=job.model,
        engine_kwargs={name: value for name, value in args.items() if name != "model"},
        batch_size=engine.batch_size,
        max_concurrent_batches=concurrent_batches(args, engine.batch_size),
        concurrency=(engine.replicas, engine.replicas),
        placement_group_config={"bundles": [{"CPU": engine.cpus}]},
        runtime_env={"env_vars": vllm_env(actor["num_gpus"])},
        should_continue_on_error=True,
        log_engine_metrics=False,
        chat_template_stage=False,  # `prepare` did it, in parallel tasks
        tokenize_stage=False,
        detokenize_stage=False,
    )
    processor = build_processor(
        config, preprocess=functools.partial(prepare, job=job), preprocess_map_kwargs={"num_cpus": PREPARE_CPUS}
    )
    (stage,) = processor.stages.values()
    stage.fn = _saying_why(stage.fn)
    stage.map_batches_kwargs.update(actor)  # last: assigning to a field of the stage makes it compute resources again
    # Without its own last step the processor returns good and failed rows alike, in the column DATA; that step would
    # give the two kinds different columns.
    processor.postprocess = None
    return processor(dataset)


def _saying_why(engine: Any) -> Any:
    class Engine(engine):
        """`ray.data.llm`'s actor; an engine that does not start ends with the reason."""

        def __init__(self, *args: Any, model: str, **kwargs: Any) -> None:
            with root_cause():
                super().__init__(*args, model=without_pattern(model), **kwargs)

    return Engine

"""vLLM with pictures that CPU processes prepare; one process alone limits the throughput of pictures.

The process that holds a vLLM engine (``LLM.generate``, the actor of `ray.data.llm`) resizes, normalises and patches all
pictures itself; on an H100 it reaches 100 pictures a second while the GPU waits. Here a pool of workers runs vLLM's own
renderer (tokeniser, image processor, placeholders), and `AsyncLLM.generate` gets its results. `render_workers` in the
config switches this on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import time
from typing import TYPE_CHECKING, Any

from vlrank.config import EngineConfig
from vlrank.engines.failures import root_cause
from vlrank.engines.resources import engine_actor, vllm_env
from vlrank.engines.vllm_args import concurrent_batches, without_pattern
from vlrank.generation.job import DATA, FAILED, PREPARE_CPUS, Job, failure, prepare

if TYPE_CHECKING:
    import ray.data


def rendered_vllm(
    dataset: ray.data.Dataset, job: Job, engine: EngineConfig, args: dict[str, Any], render_workers: int
) -> ray.data.Dataset:
    """Rows of `job` -> rows with ``generated_text``, in the column DATA.

    Args:
        dataset: Rows as in `writing.build`.
        job: The job.
        engine: The engines.
        args: vLLM's arguments.
        render_workers: CPU processes that prepare pictures.
    """
    from ray.data import ActorPoolStrategy

    actor = engine_actor(engine)
    environment = {"runtime_env": {"env_vars": vllm_env(actor["num_gpus"])}}
    concurrent = concurrent_batches(args, engine.batch_size)
    dataset = dataset.map_batches(
        Renderer,
        fn_constructor_kwargs={"job": job, "args": args},
        batch_size=min(32, engine.batch_size),
        compute=ActorPoolStrategy(size=render_workers),
        num_cpus=PREPARE_CPUS,
        **environment,
    )
    return dataset.map_batches(
        RenderedVllm,
        fn_constructor_kwargs={"job": job, "args": args},
        batch_size=engine.batch_size,
        # One actor works on several batches at once, so that the engine never runs dry between two.
        compute=ActorPoolStrategy(
            size=engine.replicas,
            max_tasks_in_flight_per_actor=2 * concurrent,
            max_concurrent_calls_per_actor=concurrent,
        ),
        zero_copy_batch=True,
        **environment,
        **actor,
    )


class Renderer:
    """vLLM's renderer without an engine: pixels and prompt become what an engine core takes."""

    def __init__(self, job: Job, args: dict[str, Any]) -> None:
        from vlrank.compat import patch_torchvision

        patch_torchvision()
        # Ray hides the GPUs from this worker, but vLLM reads their kind from the driver to make its configuration. This
        # creates no CUDA context.
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            del os.environ["CUDA_VISIBLE_DEVICES"]
        import torch
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.renderers import renderer_from_config
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        torch.set_num_threads(1)
        logging.getLogger("vllm").setLevel(logging.ERROR)
        self.job = job
        config = AsyncEngineArgs(**args).create_engine_config()
        self.renderer = renderer_from_config(config)
        self.parse = functools.partial(parse_model_prompt, config.model_config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Rows as in `writing.build` -> rows with ``engine_input``."""
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*(batch[name] for name in names), strict=True)]
        return {DATA: [self._render(row) for row in rows]}

    def _render(self, row: dict[str, Any]) -> dict[str, Any]:
        row = row | {"item_id": int(row["item_id"])}
        row |= prepare(row, self.job)
        pictures, uuids = row.pop("multimodal_data", None), row.pop("multimodal_uuids", None)
        if row[FAILED]:
            return row
        prompt: dict[str, Any] = {"prompt": row["prompt"]}
        if pictures:
            prompt |= {"multi_modal_data": pictures, "multi_modal_uuids": uuids}
        try:
            (rendered,) = self.renderer.render_cmpl([self.parse(prompt)])
        except Exception as error:  # e.g. a picture 300 times as wide as high: the row's fault, not the run's
            return row | {FAILED: failure(type(error).__name__, str(error))}
        if pictures and uuids:
            # Without a prefix cache vLLM numbers pictures per renderer: pictures of two workers would share a name, and
            # the engine would confuse them. The hash of the content is the same everywhere.
            rendered["mm_hashes"] = {"image": [uuids["image"]]}
        return row | {"engine_input": rendered, "prompt": None}


class RenderedVllm:
    """An engine that takes rendered prompts; an actor whose batches overlap."""

    def __init__(self, job: Job, args: dict[str, Any]) -> None:
        from vlrank.compat import patch_torchvision

        patch_torchvision()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.job = job
        with root_cause():
            args = args | {"model": without_pattern(args["model"])}
            self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        # More requests than the engine can run only cost memory.
        self.room = asyncio.Semaphore(math.ceil(1.1 * self.engine.vllm_config.scheduler_config.max_num_seqs))
        self.requests = 0

    async def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Rows with ``engine_input`` get ``generated_text``, ``num_input_tokens``, ``num_generated_tokens``."""
        rows = batch[DATA].tolist()
        await asyncio.gather(*(self._answer(row) for row in rows if not row[FAILED]))
        return {DATA: rows}

    async def _answer(self, row: dict[str, Any]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        rendered = row.pop("engine_input")
        self.requests += 1
        try:
            async with self.room:
                start = time.monotonic()
                answer = None
                async for output in self.engine.generate(
                    rendered, self._params(row), f"{row['item_id']}-{self.requests}", lora_request=self._lora()
                ):
                    answer = output
        except EngineDeadError:
            os._exit(1)  # Ray restarts the actor and repeats its tasks; an exception would come back to a dead engine
        except Exception as error:
            row[FAILED] = failure(type(error).__name__, str(error))
            return
        assert answer is not None
        row["time_taken_llm"] = time.monotonic() - start
        row["num_input_tokens"] = len(answer.prompt_token_ids or ())
        row["num_generated_tokens"] = len(answer.outputs[0].token_ids)
        row["generated_text"] = answer.outputs[0].text

    def _params(self, row: dict[str, Any]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        params = dict(row["sampling_params"])
        if "structured_outputs" in params:
            params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
        return SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)

    def _lora(self) -> Any:
        if self.job.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", 1, self.job.adapter)

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.shutdown()

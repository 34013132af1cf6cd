"""Batched generation with transformers."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from vlrank.config import EngineConfig
from vlrank.engines.resources import engine_actor
from vlrank.generation.job import DATA, FAILED, PREPARE_CPUS, Job, failure, load_processor, load_tokenizer, prepare

if TYPE_CHECKING:
    import ray.data


def transformers_batches(dataset: ray.data.Dataset, job: Job, engine: EngineConfig) -> ray.data.Dataset:
    """Rows of `job` -> rows with ``generated_text``, in the column DATA."""
    from ray.data import ActorPoolStrategy

    dataset = dataset.map(functools.partial(_with_inputs, job=job), num_cpus=PREPARE_CPUS)
    return dataset.map_batches(
        TransformersGenerator,
        fn_constructor_kwargs={"job": job, "dtype": engine.dtype},
        batch_size=engine.batch_size,
        compute=ActorPoolStrategy(size=engine.replicas),
        **engine_actor(engine),
    )


def _with_inputs(row: dict[str, Any], job: Job) -> dict[str, Any]:
    return {DATA: {**row, **prepare(row, job)}}


def _gpu_is_lost(error: Exception) -> bool:
    """Whether this process cannot compute anything on its GPU any more, as after a failed assertion there."""
    import torch

    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("CUDA error", "CUBLAS_STATUS"))
    )


class TransformersGenerator:
    """Batched generation with transformers: the engine where vLLM is not installed, with the same rows in and out."""

    def __init__(self, job: Job, dtype: str = "auto") -> None:
        from transformers import GenerationConfig

        from vlrank.engines.transformers_scorer import load_model

        self.job = job
        self.model = load_model(job.folder, dtype)
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        # transformers fills fields that `_generate` leaves unset from here: with the model's own generation_config.json
        # it would sample or punish repetition, which vLLM does not.
        plain = GenerationConfig()
        self.model.generation_config = plain
        if job.adapter:
            self.model.get_base_model().generation_config = plain
        self.processor = load_processor(job.model, job.revision) if job.sees else None
        self.tokenizer = self.processor.tokenizer if self.processor else load_tokenizer(job.model, job.revision)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Rows with ``prompt`` get ``generated_text``, ``num_input_tokens``, ``num_generated_tokens``."""
        rows = batch[DATA].tolist()
        start = time.monotonic()
        self._answer([row for row in rows if not row[FAILED]])
        for row in rows:
            row.pop("multimodal_data", None)
            row["time_taken_llm"] = time.monotonic() - start
        # One dictionary per row in one column; a list of dictionaries would be taken apart into columns.
        return {DATA: rows}

    def _answer(self, rows: list[dict[str, Any]]) -> None:
        import torch

        if not rows:
            return
        try:
            self._generate(rows)
        except torch.OutOfMemoryError:
            raise  # not the rows' fault: the run stops and says which setting to lower
        except Exception as error:
            if _gpu_is_lost(error):
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(
                    1
                )  # Ray restarts the actor and repeats its tasks; in this process every later row would fail as well
            if len(rows) == 1:
                rows[0][FAILED] = failure(type(error).__name__, str(error))
                return
            for row in rows:  # find the one that does not work
                self._answer([row])

    def _generate(self, rows: list[dict[str, Any]]) -> None:
        import torch
        from transformers import GenerationConfig

        prompts = [row["prompt"] for row in rows]
        pictures = [row["multimodal_data"]["image"] for row in rows if row.get("multimodal_data")]
        if self.processor:
            inputs = self.processor(text=prompts, images=pictures or None, padding=True, return_tensors="pt")
        else:
            inputs = self.tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
        inputs = inputs.to(self.model.device)
        ends = self.ends | {self.tokenizer.eos_token_id}
        sampling: dict[str, Any] = {"do_sample": False}
        if self.job.effective_temperature > 0:
            seeds = ",".join(str(row["sampling_params"]["seed"]) for row in rows)
            torch.manual_seed(int.from_bytes(hashlib.sha256(seeds.encode()).digest()[:4], "little"))
            sampling = {"do_sample": True, "temperature": self.job.effective_temperature, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=self.job.max_tokens,
            eos_token_id=sorted(end for end in ends if end is not None),
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = inputs["attention_mask"].sum(1).tolist()
        for row, answer, length in zip(rows, tokens, lengths, strict=True):
            end = next((i for i, token in enumerate(answer) if token in ends), None)
            row["num_input_tokens"] = length
            row["num_generated_tokens"] = len(answer) if end is None else end + 1
            row["generated_text"] = self.tokenizer.decode(answer[:end], skip_special_tokens=True)

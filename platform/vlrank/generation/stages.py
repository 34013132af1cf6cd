"""The Ray Data stages of generation: prepare on CPUs, ask an engine, judge the answer.

Rows travel in one column of dictionaries, ``__data``, as `ray.data.llm` has it, whatever the engine: a picture exists
as pixels only between its preparation and the engine, a few blocks at a time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlrank.bulk import ENGINE_PROCESS, ENGINE_SECONDS, ERROR, ERROR_TYPE, RETRY, TOKENS_IN, TOKENS_OUT
from vlrank.config import EngineConfig
from vlrank.engines.base import engine_gpus, engine_name, kv_cache_bytes, vllm_env
from vlrank.errors import UserError
from vlrank.generation.prompts import Prompt
from vlrank.generation.quality import problem
from vlrank.storage import fetch

if TYPE_CHECKING:
    import ray.data
    from PIL import Image

DATA = "__data"
FAILED = "__inference_error__"  # ray.data.llm skips rows in which this is not ""
PREPARE_CPUS = 0.9  # not 1, or Ray Data runs the step inside the engine's actor, one picture after the other
_RETRY_TEMPERATURE = 0.7  # another seed changes nothing in greedy decoding


@dataclass(frozen=True, slots=True)
class Job:
    """All that workers need to know.

    Attributes:
        prompt: The question.
        model: Hugging Face name or absolute folder; goes to the engine and into the rows.
        model_name: As it stands in the rows' ``model`` column.
        revision: Branch, tag or commit of a Hugging Face model.
        adapter: LoRA adapter folder.
        sees: Whether the model takes pictures.
        max_tokens, temperature, seed, image_side, language: As in `GenerateConfig`.
        gate: Whether texts have to pass the quality gate.
        attempt: 0 in the first pass; later passes sample with another seed.
        last: Rejected texts go to the quarantine instead of into another pass.
    """

    prompt: Prompt
    model: str
    model_name: str
    revision: str | None = None
    adapter: str | None = None
    sees: bool = True
    max_tokens: int = 96
    temperature: float = 0.0
    seed: int = 0
    image_side: int = 448
    language: str = "en"
    gate: bool = True
    attempt: int = 0
    last: bool = True

    def shows_picture(self, path: str | None) -> bool:
        """Whether the prompt for an item with this picture carries it."""
        return self.sees and self.prompt.image != "none" and path is not None

    @property
    def effective_temperature(self) -> float:
        """Of this attempt."""
        return self.temperature if self.attempt == 0 else max(self.temperature, _RETRY_TEMPERATURE)


class PictureError(Exception):
    """A picture that cannot be used; the class name of the reason is the first argument."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


def load_picture(path: str, side: int) -> Image.Image:
    """Decode a picture: RGB, upright, at most ``side`` pixels on the longer side, transparency on white.

    Raises:
        PictureError: ``PictureMissing`` or ``PictureBroken``.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(fetch(path)) as file:
            file.draft("RGB", (side, side))  # JPEG: decode at a half, a quarter or an eighth where that is enough
            picture = ImageOps.exif_transpose(file)
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("RGB")
    except FileNotFoundError:
        raise PictureError("PictureMissing", f"{path} does not exist") from None
    except (MemoryError, UserError):
        raise
    except Exception as error:  # decoders have errors of many kinds for bad files
        raise PictureError("PictureBroken", f"{path}: {error}") from None
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    return picture


@functools.lru_cache(maxsize=2)
def _tokenizer(model: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, revision=revision)


@functools.lru_cache(maxsize=4096)
def _rendered(model: str, revision: str | None, prompt: Prompt, text: str, with_image: bool) -> str:
    """The prompt after the chat template; captions ask the same question of every picture, hence the cache."""
    tokenizer = _tokenizer(model, revision)
    messages = prompt.messages(text, with_image=with_image)
    rendered: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return rendered


def prepare(row: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """What an engine needs for one row; ``__inference_error__`` says why a row cannot be asked.

    Args:
        row: ``item_id``, ``text``, ``picture`` (absolute path or None), ``picture_hash``.
        job: The job.
    """
    with_image = job.shows_picture(row["picture"])
    text = (row["text"] or "") if "{text}" in job.prompt.template else ""
    inputs: dict[str, Any] = {FAILED: "", "prompt": None, "sampling_params": None, "with_image": with_image}
    try:
        if with_image:
            picture = load_picture(row["picture"], job.image_side)
            inputs["multimodal_data"] = {"image": picture}
            # The content's hash is known: the engine need not compute one of its own over the pixels.
            inputs["multimodal_uuids"] = {"image": f"{row['picture_hash']}-{job.image_side}"}
        elif not text.strip():
            raise PictureError("NothingToDescribe", "the item has neither a picture nor text")
    except PictureError as error:
        return {**inputs, FAILED: _failure(error.kind, error.message)}
    inputs["prompt"] = _rendered(job.model, job.revision, job.prompt, text, with_image)
    inputs["sampling_params"] = _sampling(job, row["item_id"])
    if job.adapter:
        inputs["model"] = job.adapter  # another name than the engine's: ray.data.llm takes it for a LoRA adapter
    return inputs


def _failure(kind: str, message: str) -> str:
    return f"{kind}: {message}"


def _sampling(job: Job, item_id: int) -> dict[str, Any]:
    """vLLM's SamplingParams. The seed depends on the item alone, so a resumed run equals an unbroken one."""
    params: dict[str, Any] = {"temperature": job.effective_temperature, "max_tokens": job.max_tokens}
    if job.effective_temperature > 0:
        digest = hashlib.sha256(f"{job.seed}:{job.attempt}:{item_id}".encode()).digest()
        params["seed"] = int.from_bytes(digest[:4], "little")
    if job.prompt.json_schema is not None:
        params["structured_outputs"] = {"json": json.dumps(job.prompt.json_schema)}
    return params


def judge(batch: dict[str, Any], job: Job) -> dict[str, list[Any]]:
    """From an engine's rows to the rows of `schemas.GENERATED` with the columns that `vlrank.bulk` reads."""
    rows = [_judged(row, job) for row in batch[DATA].tolist()]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _judged(row: Mapping[str, Any], job: Job) -> dict[str, Any]:
    kind, message, again, text = "", "", False, ""
    if row[FAILED]:
        kind, _, message = str(row[FAILED]).partition(": ")
    else:
        # Half a character at the end (bytes of a cut-off answer) is U+FFFD in transformers and nothing in vLLM.
        text = " ".join(str(row["generated_text"]).replace("\ufffd", "").split())
        cut_off = row["num_generated_tokens"] >= job.max_tokens
        if job.prompt.json_field is not None:
            text, kind, message = _field(text, job.prompt.json_field)
        if job.gate and not kind:
            reason = problem(
                text, question=job.prompt.question(row["text"] or ""), cut_off=cut_off, language=job.language
            )
            if reason:
                kind, message = f"Quality.{reason}", text[:500]
        again = bool(kind) and not job.last
    return {
        "item_id": row["item_id"],
        "text": text,
        "model": job.model_name,
        "prompt_id": job.prompt.prompt_id,
        "input_hash": row["input_hash"],
        ERROR_TYPE: kind,
        ERROR: message,
        RETRY: again,
        TOKENS_IN: int(row.get("num_input_tokens") or 0),
        TOKENS_OUT: int(row.get("num_generated_tokens") or 0),
        ENGINE_SECONDS: max(0.0, float(row.get("time_taken_llm") or 0.0)),
    }


def _field(text: str, name: str) -> tuple[str, str, str]:
    try:
        value = json.loads(text)[name]
    except (ValueError, KeyError, TypeError) as error:
        return "", "Quality.not_json", f"{type(error).__name__}: {text[:400]}"
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value)), "", ""


# ---- engines ---------------------------------------------------------------------------------------------------------


def build(
    dataset: ray.data.Dataset, job: Job, engine: EngineConfig, shard_rows: int, render_workers: int = 0
) -> ray.data.Dataset:
    """All stages: from rows ``item_id, input_hash, text, picture, picture_hash`` to what `vlrank.bulk` commits."""
    # A batch larger than a shard would join shards, and commit fewer and larger ones than asked for.
    engine = engine.model_copy(update={"batch_size": min(engine.batch_size, shard_rows)})
    if engine_name(engine) == "transformers":
        dataset = _transformers(dataset, job, engine)
    elif render_workers:
        from vlrank.generation.rendered import rendered_vllm

        dataset = rendered_vllm(dataset, job, engine, render_workers)
    else:
        dataset = _vllm(dataset, job, engine)
    return dataset.map_batches(functools.partial(judge, job=job), batch_size=None, num_cpus=0.5)


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


def _vllm(dataset: ray.data.Dataset, job: Job, engine: EngineConfig) -> ray.data.Dataset:
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


def _transformers(dataset: ray.data.Dataset, job: Job, engine: EngineConfig) -> ray.data.Dataset:
    from ray.data import ActorPoolStrategy

    gpus = engine_gpus(engine)
    dataset = dataset.map(functools.partial(_with_inputs, job=job), num_cpus=PREPARE_CPUS)
    return dataset.map_batches(
        TransformersGenerator,
        fn_constructor_kwargs={"job": job, "dtype": engine.dtype},
        batch_size=engine.batch_size,
        compute=ActorPoolStrategy(size=engine.replicas),
        num_cpus=engine.cpus,
        num_gpus=math.ceil(gpus * engine.tensor_parallel_size) if gpus >= 1 else gpus,
        **ENGINE_PROCESS,
    )


def _with_inputs(row: dict[str, Any], job: Job) -> dict[str, Any]:
    return {DATA: {**row, **prepare(row, job)}}


def _gpu_is_lost(error: Exception) -> bool:
    """Whether an error leaves nothing that this process could compute on its GPU, as a failed assertion there does."""
    import torch

    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("CUDA error", "CUBLAS_STATUS"))
    )


class TransformersGenerator:
    """Batched generation with transformers: the engine where vLLM is not installed, with the same rows in and out."""

    def __init__(self, job: Job, dtype: str = "auto") -> None:
        from vlrank.compat import patch_torchvision

        patch_torchvision()
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

        source = {"pretrained_model_name_or_path": job.model, "revision": job.revision}
        self.job = job
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = AutoModelForImageTextToText if job.sees else AutoModelForCausalLM
        self.model = kind.from_pretrained(**source, dtype=dtype, device_map=device if device == "cuda" else None).eval()
        if job.adapter:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, job.adapter).eval()
        self.processor = AutoProcessor.from_pretrained(**source) if job.sees else None
        self.tokenizer = self.processor.tokenizer if self.processor else _tokenizer(job.model, job.revision)
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
                os._exit(1)  # Ray starts the actor anew and repeats its tasks; here every later row would fail as well
            if len(rows) == 1:
                rows[0][FAILED] = _failure(type(error).__name__, str(error))
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
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        sampling: dict[str, Any] = {"do_sample": False}
        if self.job.effective_temperature > 0:
            seeds = ",".join(str(row["sampling_params"]["seed"]) for row in rows)
            torch.manual_seed(int.from_bytes(hashlib.sha256(seeds.encode()).digest()[:4], "little"))
            sampling = {"do_sample": True, "temperature": self.job.effective_temperature, "top_k": 0}
        # A configuration of its own: a model's generation_config.json may sample and punish repetition by default.
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

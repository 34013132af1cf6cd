"""``vlrank generate``: captions and semantic summaries for a dataset's items, resumable and in bulk."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from vlrank.bulk import BulkResult, Shards, Stages, run_bulk
from vlrank.config import GenerateConfig
from vlrank.console import Summary, announce, console, duration
from vlrank.data import schemas
from vlrank.data.dataset import GENERATED_FOLDERS, Dataset
from vlrank.data.quarantine import by_error, quarantine_folder
from vlrank.data.tables import file_sha256
from vlrank.engines.adapters import check_adapter
from vlrank.engines.families import VISION_FAMILIES
from vlrank.engines.models import model_config, model_place
from vlrank.engines.resources import engine_gpus, engine_name
from vlrank.engines.vllm_args import context_length
from vlrank.errors import UserError
from vlrank.generation.job import Job, RowLength, longest_row
from vlrank.generation.prompts import PromptTemplate, load_prompt
from vlrank.generation.writing import build, engine_lines
from vlrank.installation import install_command
from vlrank.prompting.chat_template import check_chat_template
from vlrank.runtime import ray_session
from vlrank.storage import Location, is_url, remove_tree, require_writable

ESTIMATE_ROWS = 32
"""Items that ``--dry_run`` generates, to extrapolate from."""

_COUNTED_TEXTS = 1000
_CONTENT_NAME = re.compile(r"[0-9a-f]{64}")


def run(config: GenerateConfig) -> Summary:
    """Generate what is missing.

    Raises:
        UserError: an unusable dataset, prompt or model; an engine that ran out of memory.
    """
    work = _plan(config)
    require_writable(work.shards.folder, "Texts become part of their dataset: generate them in a copy of it.")
    if not work.shards.pending(work.wanted, retry_failed=config.retry_failed).is_empty():
        work = _sized(config, work)
    with ray_session(config.ray, data=True):
        gpus = engine_gpus(config.engine) * config.engine.tensor_parallel_size * config.engine.replicas
        engines = _engine_lines(config, work)
        result, retried = _passes(config, work)
    output = work.shards.folder
    if config.sample is not None:
        output = _contact_sheet(config, work)
    lines: dict[str, object] = {
        "engine": engine_name(config.engine),
        "model": config.model,
        "prompt": work.job.prompt.prompt_id,
    }
    lines |= engines | {
        "done": result.done,
        "reused": result.reused,
        "retried": retried,
        "quarantined": result.quarantined,
    }
    if result.failed_before:
        lines["in quarantine already"] = f"{result.failed_before} (try again with --retry_failed)"
    if result.quarantined or result.failed_before:
        lines["in quarantine"] = by_error(work.shards.quarantined())
    if work.without_picture:
        lines["items without a picture"] = work.without_picture
    if work.apart:
        lines["kept apart"] = f"{work.shards.folder}: the dataset has texts of other settings for these items"
    lines |= _cost(config, result.done + result.quarantined, result.seconds, gpus)
    if result.working_seconds:
        lines["items/s while generating"] = (result.done + result.quarantined) / result.working_seconds
        lines["tokens in, out"] = f"{result.tokens_in:,}, {result.tokens_out:,}"
    counts = {
        "wanted": work.wanted.height,
        "done": result.done,
        "reused": result.reused,
        "retried": retried,
        "quarantined": result.quarantined,
        "failed_before": result.failed_before,
        "without_picture": work.without_picture,
        "tokens_in": result.tokens_in,
        "tokens_out": result.tokens_out,
    }
    failure = result.failure(work.shards)
    return Summary(f"generate: {config.what} for {config.dataset}", lines, output, counts, failure)


def dry_run(config: GenerateConfig) -> Summary:
    """``--dry_run``: what `run` would do, with an estimate from a few real items; commits nothing.

    Raises:
        UserError: as `run`.
    """
    work = _plan(config)
    pending = work.shards.pending(work.wanted, retry_failed=config.retry_failed)
    lines: dict[str, object] = {
        "engine": engine_name(config.engine),
        "model": config.model,
        "prompt": work.job.prompt.prompt_id,
        "wanted": work.wanted.height,
        "reused": work.wanted.height - pending.height,
        "to do": pending.height,
    }
    counts = {"wanted": work.wanted.height, "pending": pending.height}
    if work.without_picture:
        lines["items without a picture"] = work.without_picture
    if pending.is_empty():
        return Summary(f"generate (dry run): {config.what} for {config.dataset}", lines, None, counts)
    work = _sized(config, work)
    sample = _sample(pending, ESTIMATE_ROWS, config.seed)
    with _trial(config, work) as trial, ray_session(config.ray):
        gpus = engine_gpus(config.engine) * config.engine.tensor_parallel_size * config.engine.replicas
        lines |= _engine_lines(config, work)
        shard_rows = max(1, ESTIMATE_ROWS // 4)
        result = run_bulk(
            sample,
            _stages(config, replace(work.job, last=True), shard_rows),
            trial,
            shard_rows=shard_rows,
            description=f"estimate from {sample.height} items",
        )
    rows = max(1, sample.height)
    working = result.working_seconds or result.seconds
    starting = result.seconds - working
    seconds = starting + working * pending.height / rows
    lines |= {"engine start": f"{starting:,.0f} s", "items/s in the sample": rows / working}
    lines["sample rejected"] = f"{result.quarantined} of {sample.height}"
    lines["tokens out, estimated"] = round(result.tokens_out * pending.height / rows)
    lines |= {"time, estimated": duration(seconds)} | _cost(config, pending.height, seconds, gpus)
    counts |= {"sampled": sample.height, "sample_quarantined": result.quarantined, "estimated_seconds": round(seconds)}
    return Summary(f"generate (dry run): {config.what} for {config.dataset}", lines, None, counts)


@contextmanager
def _trial(config: GenerateConfig, work: _Work) -> Iterator[Shards]:
    """Temporary shards inside the dataset: workers on other nodes do not see the driver's temporary folder."""
    folder = Dataset.open(config.dataset).path / f".dryrun-{uuid.uuid4().hex[:8]}"
    try:
        yield replace(work.shards, folder=folder / "shards", quarantine=folder / "quarantine")
    finally:
        with suppress(OSError):  # a task that outlives an error may still write here; the error must reach the user
            remove_tree(folder)


# ---- what is wanted --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    job: Job
    shards: Shards
    wanted: pl.DataFrame  # item_id, input_hash, text, picture, picture_hash
    without_picture: int
    longest: RowLength | None = None
    apart: bool = False  # a sample beside texts of other settings


def generated_shards(dataset: Dataset, what: str) -> Shards:
    """The captions or summaries of a dataset, for `vlrank.bulk`."""
    folder = dataset.path / GENERATED_FOLDERS[what]
    return Shards(folder, schemas.GENERATED, "item_id", quarantine_folder(dataset.path, what), what)


def _holds_others(shards: Shards, wanted: pl.DataFrame) -> bool:
    """Whether wanted items have texts of other settings."""
    kept = shards.committed().join(wanted.select("item_id", wanted="input_hash"), on="item_id")
    return not kept.filter(pl.col("input_hash") != pl.col("wanted")).is_empty()


def _plan(config: GenerateConfig) -> _Work:
    prompt = load_prompt(config.prompt, config.what)
    dataset = Dataset.open(config.dataset)
    model, sees = _check_model(config.model, config.revision)
    if prompt.image == "required" and not sees:
        raise UserError(
            f"model {config.model} cannot see pictures, and prompt {prompt.prompt_id} shows one",
            "Choose a Qwen3-VL model, e.g. --model Qwen/Qwen3-VL-2B-Instruct.",
        )
    kind = model_config(model, config.revision).get("model_type")
    if sees and kind not in VISION_FAMILIES:
        tried = ", ".join(family.name for family in VISION_FAMILIES.values())
        announce("Note:", f"{config.model} is a {kind}; texts were tried with {tried} alone", "yellow")
    if note := check_chat_template(model, pictures=sees and prompt.image != "none"):
        announce("Note:", note, "yellow")
    if prompt.json_schema is not None and engine_name(config.engine) != "vllm":
        raise UserError(
            f"prompt {prompt.prompt_id} wants structured output, which only engine vllm can give",
            f"Install vLLM ({install_command('vllm')}), or choose another prompt.",
        )
    if config.adapter is not None and not (config.adapter / "adapter_config.json").is_file():
        raise UserError(f"adapter {config.adapter} is not a LoRA adapter folder (it has no adapter_config.json)")
    job = Job(
        prompt=prompt,
        model=model,
        model_name=config.model,
        revision=config.revision,
        adapter=None if config.adapter is None else str(config.adapter.absolute()),
        sees=sees,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=config.seed,
        image_side=config.image_side,
        language=config.language,
        gate=config.quality,
    )
    check_adapter(job.folder, engine_name(config.engine))
    items = dataset.items().select("item_id", "text", "image_path")
    without = 0
    if prompt.image == "required":
        without = items["image_path"].null_count()
        items = items.filter(pl.col("image_path").is_not_null())
        if items.is_empty():
            raise UserError(
                f"no item of dataset {dataset.path} has a picture",
                "Prepare it with pictures: `vlrank prepare ... --use_image`.",
            )
    if config.limit is not None:
        items = items.head(config.limit)
    if config.sample is not None:
        items = _sample(items, config.sample, config.seed)
    wanted = _wanted(items, job, dataset.path)
    shards = generated_shards(dataset, config.what)
    apart = config.sample is not None and _holds_others(shards, wanted)
    if apart:  # a sample must not replace them
        folder = dataset.path / "samples" / config.what
        shards = replace(shards, folder=folder, quarantine=folder / "quarantine")
    return _Work(job, shards, wanted, without, apart=apart)


def _sized(config: GenerateConfig, work: _Work) -> _Work:
    """The work with `Job.max_model_len`: as set in the config, or as long as the wanted rows need."""
    job = work.job
    texts = work.wanted.select(text=pl.col("text").fill_null("").str.replace_all("<|", "< |", literal=True)).unique()
    texts = texts if "{text}" in job.prompt.template else texts.clear()
    by_length = texts.with_columns(n=pl.col("text").str.len_bytes()).sort("n", descending=True)
    longest = longest_row(
        job,
        by_length["text"][:_COUNTED_TEXTS].to_list(),
        by_length["n"][_COUNTED_TEXTS] if by_length.height > _COUNTED_TEXTS else 0,
        pictures=job.prompt.image != "none" and work.wanted["picture"].null_count() < work.wanted.height,
    )
    room = config.engine.max_model_len or -(-(longest.total + 32) // 64) * 64
    room = min(room, context_length(job.model, job.revision) or room)
    return replace(work, job=replace(job, max_model_len=room), longest=longest)


def _sample(table: pl.DataFrame, n: int, seed: int) -> pl.DataFrame:
    """``n`` random rows, in the table's order."""
    if n >= table.height:
        return table
    rows = np.random.default_rng([seed, 5]).choice(table.height, size=n, replace=False)
    return table[sorted(rows.tolist())]


def _check_model(model: str, revision: str | None) -> tuple[str, bool]:
    """(name or absolute folder, whether it takes pictures); a name on the Hugging Face hub is judged by its config.

    Raises:
        UserError: a folder that lacks what every engine needs, or an unknown model.
    """
    if is_url(model):
        raise UserError(
            f"model {model}: engines that generate load no models by URL",
            "Give a folder that every node has, or a Hugging Face name like Qwen/Qwen3-VL-2B-Instruct.",
        )
    folder = model_place(model)
    if isinstance(folder, Path):
        for needed, what in (("config.json", "model"), ("tokenizer_config.json", "tokenizer")):
            if not (folder / needed).is_file():
                raise UserError(
                    f"model folder {folder} has no {what} ({needed} is missing)",
                    "Save model and tokenizer (and, for pictures, the processor) into one folder with save_pretrained.",
                )
        model = str(folder.absolute())
    return model, "vision_config" in model_config(model, revision)


def _wanted(items: pl.DataFrame, job: Job, root: Location) -> pl.DataFrame:
    """The rows with the hash of all that their result depends on; the engine is not part of it."""
    absolute = root.resolve()
    common = hashlib.sha256(json.dumps(_identity(job), sort_keys=True).encode()).digest()
    uses_text = "{text}" in job.prompt.template
    hashes, pictures, picture_hashes = [], [], []
    for _, text, image_path in items.iter_rows():
        picture = str(absolute / image_path) if job.shows_picture(image_path) else None
        digest = _picture_hash(absolute / image_path) if picture else ""
        parts = json.dumps([text if uses_text else "", digest]).encode()
        hashes.append(hashlib.sha256(common + parts).hexdigest()[:32])
        pictures.append(picture)
        picture_hashes.append(digest)
    return items.select(
        "item_id",
        pl.Series("input_hash", hashes, dtype=pl.String),
        "text",
        pl.Series("picture", pictures, dtype=pl.String),
        pl.Series("picture_hash", picture_hashes, dtype=pl.String),
    )


def _identity(job: Job) -> dict[str, object]:
    prompt: PromptTemplate = job.prompt
    return {
        "model": _model_hash(job.model, job.revision),
        "adapter": None if job.adapter is None else _model_hash(job.adapter, None),
        "prompt": [prompt.prompt_id, prompt.image, prompt.template, prompt.json_schema, prompt.json_field],
        "sampling": [job.max_tokens, job.temperature, job.seed if job.temperature else None],
        "image_side": job.image_side,
    }


def _model_hash(model: str, revision: str | None) -> str:
    """A folder's content (weights, configs, tokenizer), or name and revision of a model on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", ".safetensors", ".jinja", ".txt", ".model"} and file.name != "vlrank.json":
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _picture_hash(path: Location) -> str:
    """Of a picture's content. Prepared datasets name pictures by it; others are read."""
    if _CONTENT_NAME.fullmatch(path.stem):
        return path.stem
    try:
        return file_sha256(path)
    except OSError:
        return "missing"


# ---- passes ----------------------------------------------------------------------------------------------------------


def _passes(config: GenerateConfig, work: _Work) -> tuple[BulkResult, int]:
    """The first pass over all rows, then one over the rejected rows per further attempt.

    A further pass starts an engine again, but only when something was rejected; a second try within the first pass
    would need two engines side by side.
    """
    attempts = config.attempts if work.job.gate else 1
    total, only, retried = BulkResult(), None, 0
    for attempt in range(attempts):
        job = replace(work.job, attempt=attempt, last=attempt == attempts - 1)
        result = run_bulk(
            work.wanted,
            _stages(config, job, config.shard_rows),
            work.shards,
            shard_rows=config.shard_rows,
            description=f"{config.what}" + (f", try {attempt + 1}" if attempt else ""),
            retry_failed=config.retry_failed,
            only=only,
        )
        first = result if attempt == 0 else total
        total = BulkResult(
            done=total.done + result.done,
            reused=first.reused,
            failed_before=first.failed_before,
            quarantined=total.quarantined + result.quarantined,
            tokens_in=total.tokens_in + result.tokens_in,
            tokens_out=total.tokens_out + result.tokens_out,
            seconds=total.seconds + result.seconds,
            working_seconds=total.working_seconds + result.working_seconds,
        )
        only = result.retry
        if not only:
            break
        retried += len(only)
        console.print(f"{len(only):,} rejected by the quality gate: trying again with another seed")
    return total, retried


def _stages(config: GenerateConfig, job: Job, shard_rows: int) -> Stages:
    workers = config.render_workers if job.sees and job.prompt.image != "none" else 0
    return partial(build, job=job, engine=config.engine, shard_rows=shard_rows, render_workers=workers)


def _engine_lines(config: GenerateConfig, work: _Work) -> dict[str, object]:
    """The longest row and the engines that take it; nothing where no engine starts."""
    if work.longest is None:
        return {}
    return {"longest row": work.longest, **engine_lines(work.job, config.engine)}


def _cost(config: GenerateConfig, items: int, seconds: float, gpus: float) -> dict[str, object]:
    lines: dict[str, object] = {"time": duration(seconds)}
    if gpus:
        hours = seconds / 3600 * gpus
        lines["GPU-hours"] = hours
        if config.gpu_hour_price is not None and items:
            lines["cost"] = f"{hours * config.gpu_hour_price:,.2f}"
            lines["cost per 1,000 items"] = f"{hours * config.gpu_hour_price / items * 1000:,.4f}"
    return lines


def _contact_sheet(config: GenerateConfig, work: _Work) -> Location:
    from vlrank.generation.contact_sheet import Card, write_contact_sheet

    dataset = Dataset.open(config.dataset)
    titles = {"caption": "caption", "semantic_summary": "semantic summary"}
    tables = {
        title: work.shards.committed() if what == config.what else dataset.generated(what)  # type: ignore[arg-type]
        for what, title in titles.items()
    }
    made = {
        title: dict(zip(table["item_id"], table["text"], strict=True))
        for title, table in tables.items()
        if table is not None
    }
    failed = work.shards.quarantined()
    problems = {
        int(key): f"{kind}: {message}"
        for key, kind, message in failed.select("key", "error_type", "message").iter_rows()
    }
    meta = dataset.item_meta()
    cards = [
        Card(
            item_id,
            meta[item_id]["text"],
            meta[item_id]["image_path"],
            {title: texts[item_id] for title, texts in made.items() if item_id in texts},
            problems.get(item_id),
        )
        for item_id in work.wanted["item_id"].to_list()
    ]
    path = dataset.path / "samples" / f"{config.what}.html"
    facts = f"{len(cards)} random items, model {config.model}, prompt {work.job.prompt.prompt_id}"
    write_contact_sheet(path, f"{titles[config.what]}: {dataset.path.name}", facts, cards)
    return path

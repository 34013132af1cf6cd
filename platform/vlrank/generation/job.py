"""One generation job: what workers need to know, how a row is prepared, how an answer is judged.

Rows travel in one column of dictionaries, ``__data``, as `ray.data.llm` has it, whatever the engine: a picture exists
as pixels only between its preparation and the engine, a few blocks at a time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlrank.bulk import ENGINE_SECONDS, ERROR, ERROR_TYPE, RETRY, TOKENS_IN, TOKENS_OUT
from vlrank.config import RankingConfig
from vlrank.data.picture import UnreadablePicture, read_rgb
from vlrank.engines.models import ModelFolder
from vlrank.generation.prompts import PromptTemplate
from vlrank.generation.quality import problem
from vlrank.prompting.chat_template import complete_tokenizer, render_messages

if TYPE_CHECKING:
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
        max_model_len: Tokens of a prompt and its answer that the engine has room for; None where that is not known.
        attempt: 0 in the first pass; later passes sample with another seed.
        last: Rejected texts go to the quarantine instead of into another pass.
    """

    prompt: PromptTemplate
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
    max_model_len: int | None = None
    attempt: int = 0
    last: bool = True

    @property
    def folder(self) -> ModelFolder:
        """The model as engines load it."""
        return ModelFolder(
            path=self.adapter or self.model,
            base=self.model,
            mode=None,
            ranking=RankingConfig(),
            family="vision" if self.sees else "text",
            revision=self.revision,
        )

    def shows_picture(self, path: str | None) -> bool:
        """Whether the prompt for an item with this picture carries it."""
        return self.sees and self.prompt.image != "none" and path is not None

    @property
    def effective_temperature(self) -> float:
        """Of this attempt."""
        return self.temperature if self.attempt == 0 else max(self.temperature, _RETRY_TEMPERATURE)


def load_picture(path: str, side: int) -> Image.Image:
    """A picture as `read_rgb` reads it, at most ``side`` pixels on the longer side.

    Raises:
        UnreadablePicture: ``PictureMissing`` or ``PictureBroken``.
    """
    from PIL.Image import Resampling

    picture = read_rgb(path, at_least=side)
    picture.thumbnail((side, side), Resampling.BICUBIC)
    return picture


@functools.lru_cache(maxsize=2)
def load_tokenizer(model: str, revision: str | None) -> Any:
    """The model's tokenizer; cached."""
    from transformers import AutoTokenizer

    return complete_tokenizer(AutoTokenizer.from_pretrained(model, revision=revision), model, revision)


@functools.lru_cache(maxsize=4096)
def _rendered(model: str, revision: str | None, prompt: PromptTemplate, text: str, with_image: bool) -> str:
    """The prompt after the chat template; cached, because captions have the same prompt for every picture."""
    return render_messages(load_tokenizer(model, revision), prompt.messages(text, with_image=with_image))


@functools.lru_cache(maxsize=4096)
def text_tokens(model: str, revision: str | None, rendered: str) -> int:
    """Tokens of a rendered prompt, each picture counted as one."""
    return len(load_tokenizer(model, revision)(rendered, add_special_tokens=False)["input_ids"])


@functools.lru_cache(maxsize=2)
def load_processor(model: str, revision: str | None) -> Any:
    """Tokenizer and image processor of a model that takes pictures; cached."""
    from transformers import AutoProcessor

    from vlrank.compat import patch_torchvision

    patch_torchvision()
    return AutoProcessor.from_pretrained(model, revision=revision)


@functools.lru_cache(maxsize=4096)
def picture_tokens(model: str, revision: str | None, size: tuple[int, int]) -> int:
    """Tokens that a picture of this size (width, height) adds to its prompt; 0 for processors that cannot tell."""
    count = getattr(load_processor(model, revision), "_get_num_multimodal_tokens", None)
    if count is None:
        return 0
    try:
        (tokens,) = count(image_sizes=[size[::-1]])["num_image_tokens"]
    except ValueError:  # e.g. 300 times as wide as high: the engine's own error will say so
        return 0
    return int(tokens) - 1  # its placeholder is among the text's tokens


def prepare(row: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """What the engine needs for one row; ``__inference_error__`` says why the engine must not get the row.

    Args:
        row: ``item_id``, ``text``, ``picture`` (absolute path or None), ``picture_hash``.
        job: The job.
    """
    with_image = job.shows_picture(row["picture"])
    text = (row["text"] or "") if "{text}" in job.prompt.template else ""
    inputs: dict[str, Any] = {FAILED: "", "prompt": None, "sampling_params": None, "with_image": with_image}
    picture = None
    if with_image:
        try:
            picture = load_picture(row["picture"], job.image_side)
        except UnreadablePicture as error:
            return {**inputs, FAILED: failure(type(error).__name__, str(error))}
        inputs["multimodal_data"] = {"image": picture}
        # With a known hash of the content the engine does not hash the pixels.
        inputs["multimodal_uuids"] = {"image": f"{row['picture_hash']}-{job.image_side}"}
    elif not text.strip():
        return {**inputs, FAILED: failure("NothingToDescribe", "the item has neither a picture nor text")}
    rendered = _rendered(job.model, job.revision, job.prompt, text, with_image)
    if job.max_model_len is not None:
        tokens = text_tokens(job.model, job.revision, rendered)
        tokens += picture_tokens(job.model, job.revision, picture.size) if picture else 0
        if tokens + job.max_tokens > job.max_model_len:
            why = (
                f"{tokens} tokens and {job.max_tokens} for the answer; the engine has room for {job.max_model_len}. "
                "Raise engine.max_model_len, or lower image_side or max_tokens."
            )
            return {**inputs, FAILED: failure("PromptTooLong", why)}
    inputs["prompt"] = rendered
    inputs["sampling_params"] = _sampling(job, row["item_id"])
    if job.adapter:
        inputs["model"] = job.adapter  # another name than the engine's: ray.data.llm takes it for a LoRA adapter
    return inputs


def failure(kind: str, message: str) -> str:
    """What stands in FAILED."""
    return f"{kind}: {message}"


@dataclass(frozen=True, slots=True)
class RowLength:
    """Tokens that no row exceeds.

    Attributes:
        prompt: The question after the chat template, without the picture.
        picture: The picture.
        answer: ``max_tokens``.
    """

    prompt: int
    picture: int
    answer: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.prompt + self.picture + self.answer

    def __str__(self) -> str:
        parts = [f"prompt {self.prompt:,}", *([f"picture {self.picture:,}"] if self.picture else [])]
        return f"{self.total:,} tokens ({', '.join(parts)}, answer {self.answer:,})"


def longest_row(job: Job, texts: Sequence[str], other_bytes: int, *, pictures: bool) -> RowLength:
    """How many tokens the rows of a job can have.

    Args:
        job: The job.
        texts: The items' longest texts, which are counted exactly.
        other_bytes: UTF-8 bytes of the longest other text: a token is at least one byte.
        pictures: Whether any prompt carries a picture.
    """

    def tokens(text: str) -> int:
        return text_tokens(job.model, job.revision, _rendered(job.model, job.revision, job.prompt, text, pictures))

    # Processors scale pictures of few pixels up: the square is not always the one with the most tokens.
    sizes = [(job.image_side, height) for height in range(1, job.image_side + 1)] if pictures else []
    return RowLength(
        max([tokens("") + other_bytes, *map(tokens, texts)]),
        max((picture_tokens(job.model, job.revision, size) for size in sizes), default=0),
        job.max_tokens,
    )


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
        # An answer may end within the bytes of a character: U+FFFD in transformers, nothing in vLLM.
        text = " ".join(str(row["generated_text"]).replace("\ufffd", "").split())
        tokens = row["num_input_tokens"] + row["num_generated_tokens"]
        cut_off = row["num_generated_tokens"] >= job.max_tokens or tokens >= (job.max_model_len or math.inf)
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

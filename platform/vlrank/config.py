"""One pydantic model per stage. YAML files, ``key=value`` overrides and flags become these, or one clear error.

Precedence, weakest first: the defaults below, the mode's file (``configs/modes/MODE.yaml``), ``--config FILE``,
``key=value`` overrides, explicit flags.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from vlrank.errors import UserError
from vlrank.storage import ConfigLocation, LocalPath, Location
from vlrank.text_template import parse_template

Mode = Literal["raw_image", "caption", "semantic_summary", "semantic_summary_small"]
MODES: tuple[Mode, ...] = ("raw_image", "caption", "semantic_summary", "semantic_summary_small")
What = Literal["caption", "semantic_summary"]
Split = Literal["val", "test"]
Seed = Annotated[int, Field(ge=0)]  # NumPy takes no other
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of all configs: unknown keys are errors, values are checked, instances cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    verbatim: ClassVar[frozenset[str]] = frozenset()
    """Keys that hold text with braces, which YAML would read as a mapping: overrides take it as it is."""
    positional: ClassVar[str] = "dataset"
    """The key that the command line takes by position, if the config has it."""
    file_argument: ClassVar[str | None] = None
    """On the command line, the name of the YAML file as an argument; None where it is an option."""

    @field_validator("*", mode="before")
    @classmethod
    def _several_with_commas(cls, value: Any, info: ValidationInfo) -> Any:
        """Take ``1,5,10`` for three values, where no value can hold a comma: numbers and fixed words."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if get_origin(kind) is not tuple:
            return value
        item = get_args(kind)[0]
        return _parted(value) if get_origin(item) is Literal or item in (int, Share) else value


def _parted(value: Any) -> Any:
    """A word, or words of a list, parted at commas; other values as they are."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        return value
    return [part for word in words for part in (word.split(",") if isinstance(word, str) else [word])]


class RayConfig(Config):
    """Where the work runs."""

    address: str | None = Field(
        None,
        description="Address of a running Ray cluster. By default vlrank joins RAY_ADDRESS or the cluster of its job, "
        "and else starts Ray on this machine.",
    )
    num_cpus: int | None = Field(
        None, ge=1, description="Logical CPUs of a Ray that is started here. Default: the number of cores, at least 8."
    )


class EngineConfig(Config):
    """A pool of inference engines for generation and reranking."""

    name: Literal["auto", "packed", "vllm", "transformers"] = Field(
        "auto",
        description="`auto` ranks with packed. For texts, and for models that packed cannot read, it takes vLLM where "
        "it is installed, else transformers.",
    )
    replicas: int = Field(1, ge=1, description="Number of engines that work side by side.")
    gpus: float | None = Field(
        None, ge=0, description="GPUs per engine, fractions allowed. Default: 1 where there is a GPU, else 0."
    )
    cpus: float = Field(1, gt=0, description="CPUs per engine.")
    batch_size: int = Field(64, ge=1, description="Number of prompts that an engine gets at once.")
    max_model_len: int | None = Field(
        None, ge=16, description="Longest prompt plus answer, in tokens. Default: what the longest prompt needs."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="Number of GPUs that one vLLM engine is spread over.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the weights. auto takes what the model folder says."
    )
    enforce_eager: bool | None = Field(
        None, description="Skip vLLM's compilation and CUDA graphs. Default: true on a CPU."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory that the engines on it may take."
    )
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments, passed to vLLM unchanged."
    )
    row_tokens: int | None = Field(
        None,
        ge=1024,
        description="Tokens of a row of the packed engine on a GPU. Default: 65536, halved where the memory is full.",
    )
    low_latency: bool = Field(
        False,
        description="Answer few prompts sooner (packed engine on a GPU): rows are as short as what waits, and their "
        "passes are recorded before the first prompt comes.",
    )
    quantization: Literal["fp8"] | None = Field(
        None,
        description="Compute products in 8 bits (packed, vLLM). The packed engine says how rankings change.",
    )


class ColumnsConfig(Config):
    """What the columns of raw files are called; unset ones are found by the names that public data sets use."""

    user: str | None = Field(None, description="Column of the reviews with the user's id.")
    item: str | None = Field(None, description="Column of both files with the item's id.")
    meta_item: str | None = Field(
        None, description="Column of the metadata with the item's id, where the reviews call it otherwise."
    )
    timestamp: str | None = Field(None, description="Column of the reviews with the time.")
    rating: str | None = Field(None, description="Column of the reviews with the rating.")
    title: str | None = Field(None, description="Column of the metadata with the title.")
    brand: str | None = Field(None, description="Column of the metadata with the brand.")
    categories: str | None = Field(None, description="Column of the metadata with the categories.")
    description: str | None = Field(None, description="Column of the metadata with the description.")
    image: str | None = Field(
        None, description="Column of the metadata with the picture: a path relative to the metadata file, or a URL."
    )
    names: tuple[str, ...] = Field((), description="Column names of a delimited reviews file that has no header line.")
    delimiter: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="Character between two columns. Default: the one by which the header names the columns needed.",
    )


class PictureLimits(Config):
    """How one picture is fetched, and what is refused."""

    concurrency_per_host: int = Field(8, ge=1, description="Simultaneous requests to one host, all workers together.")
    requests_per_second: float = Field(20, gt=0, description="Requests per second to one host, all workers together.")
    attempts: int = Field(
        4, ge=1, description="Tries per picture. Only errors that may pass (429, 5xx, time-outs) are tried again."
    )
    backoff_s: float = Field(
        1.0, ge=0, description="Seconds before the first retry; each further pause is twice as long."
    )
    timeout_s: float = Field(30, gt=0, description="Seconds for one try, redirects included.")
    max_bytes: int = Field(20_000_000, ge=1, description="Larger files are refused.")
    max_pixels: int = Field(50_000_000, ge=1, description="Larger pictures are refused before they are decoded.")
    max_redirects: int = Field(5, ge=0, description="Redirects that one request may follow.")
    allow_private: bool = Field(False, description="Allow addresses that are not public (localhost, 10.x, ...).")


class PicturesConfig(PictureLimits):
    """How the pictures of a dataset are fetched and what is refused."""

    workers: int = Field(
        2, ge=0, description="Number of Ray actors that fetch pictures. 0 fetches them in this process, without Ray."
    )
    shard_rows: int = Field(256, ge=1, description="Pictures committed at once: a crash costs no more than these.")


class PrepareConfig(Config):
    """``vlrank prepare``: turn raw reviews, metadata and pictures into a dataset folder."""

    reviews: tuple[ConfigLocation, ...] = Field(
        (), description="Files of interactions: .json(l), .csv, .tsv, .inter or .parquet, also compressed."
    )
    meta: tuple[ConfigLocation, ...] = Field(
        (), description="Files of items: .json(l), .csv, .tsv, .item or .parquet, also compressed."
    )
    dataset_code: str | None = Field(
        None,
        description="An Amazon data set, instead of --reviews and --meta: beauty, games, sports, ... or its full name.",
    )
    release: Literal["2014", "2018", "2023"] = Field("2014", description="Amazon release of --dataset_code.")
    raw_dir: LocalPath = Field(
        Path("data/raw"), description="Folder where the raw files of --dataset_code are looked for and downloaded to."
    )
    download: bool = Field(True, description="Download missing raw files of --dataset_code.")
    out: ConfigLocation | None = Field(None, description="Dataset folder. Default: data/DATASET_CODE.")
    min_rating: float = Field(0, ge=0, description="Keep interactions rated at least this; 0 keeps all.")
    min_uc: int = Field(
        5,
        ge=1,
        description="Keep users with at least this many interactions. Repeated together with --min_sc until nothing "
        "changes.",
    )
    min_sc: int = Field(
        5,
        ge=1,
        description="Keep items with at least this many interactions. Repeated together with --min_uc until nothing "
        "changes.",
    )
    keep_duplicates: bool = Field(False, description="Keep repeated (user, item) pairs instead of the first alone.")
    keep_untitled: bool = Field(
        False, description="Keep items without title, brand, categories and description, shown by their id."
    )
    text: str | None = Field(
        None,
        description="Template of the item text, such as '{title:.40} [{categories[-1]}]': fields title, brand, "
        "categories, description, [0] or [-1] for the first or last category, :.40 for a cut at 40 characters. "
        "Default: title | brand | A > B | description.",
    )
    split: Literal["leave_one_out", "temporal"] = Field(
        "leave_one_out",
        description="leave_one_out takes each user's last item for test and the one before for validation; temporal "
        "divides at two points in time.",
    )
    val_fraction: float = Field(
        0.1, gt=0, lt=1, description="Temporal split: share of the interactions in the validation period."
    )
    test_fraction: float = Field(
        0.1, gt=0, lt=1, description="Temporal split: share of the interactions in the test period."
    )
    val_from: int | None = Field(
        None, description="Temporal split: start of the validation period in seconds since 1970, instead of a share."
    )
    test_from: int | None = Field(
        None, description="Temporal split: start of the test period in seconds since 1970, instead of a share."
    )
    timestamp_unit: Literal["auto", "s", "ms", "us", "ns"] = Field(
        "auto", description="Unit of the timestamps. auto decides by the size of the numbers."
    )
    impossible_times: Literal["keep", "quarantine"] = Field(
        "keep", description="Interactions before 1990 or in the future are kept and counted, or put in quarantine."
    )
    use_image: bool = Field(False, description="Copy or download the items' pictures.")
    retry_failed: bool = Field(False, description="Try again only the pictures that failed before.")
    image_root: LocalPath | None = Field(
        None, description="Folder of relative picture paths. Default: the folder of the metadata file."
    )
    max_text_chars: int = Field(600, ge=16, description="Item text is cut to this many characters.")
    max_line_mb: int = Field(
        64, ge=1, description="Lines of JSON files that are longer than this many megabytes go to quarantine."
    )
    allow_truncated: bool = Field(False, description="Use what can be read of a compressed file that was cut off.")
    overwrite: bool = Field(False, description="Replace an existing dataset that was made with other options.")
    columns: ColumnsConfig = Field(ColumnsConfig(), description="What the columns of the raw files are called.")
    pictures: PicturesConfig = Field(PicturesConfig(), description="How pictures are fetched and which are refused.")
    ray: RayConfig = Field(RayConfig(), description="Where the work runs.")

    verbatim: ClassVar[frozenset[str]] = frozenset({"text"})

    @field_validator("text")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            parse_template(text)
        return text

    @model_validator(mode="after")
    def _has_input(self) -> PrepareConfig:
        if bool(self.reviews) == bool(self.dataset_code):
            raise ValueError("give either reviews (and meta) or dataset_code")
        if self.out is None and not self.dataset_code:
            raise ValueError("config key `out` is required")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must leave something to train on")
        if (self.val_from is None) != (self.test_from is None):
            raise ValueError("val_from and test_from are given together")
        if self.val_from is not None and self.test_from is not None and self.val_from > self.test_from:
            raise ValueError(f"val_from {self.val_from} is later than test_from {self.test_from}")
        return self

    @property
    def folder(self) -> Location:
        """Where the dataset will be."""
        return self.out if self.out is not None else Path("data") / str(self.dataset_code)


class GenerateConfig(Config):
    """``vlrank generate``: write captions or semantic summaries for every item."""

    dataset: ConfigLocation = Field(..., description="Dataset folder of `vlrank prepare`.")
    what: What = Field(..., description="What to write for each item.")
    model: str = Field(
        "Qwen/Qwen3-VL-2B-Instruct", description="Hugging Face name or local folder of the model that writes."
    )
    prompt: str | None = Field(
        None, description="Prompt id such as caption/v1, or a YAML file. Default: the newest prompt of its kind."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face model.")
    adapter: LocalPath | None = Field(None, description="Folder of a LoRA adapter to use with the model.")
    max_tokens: int = Field(96, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 is greedy decoding.")
    seed: Seed = Field(0, description="Seed of sampling and of the choice of --sample.")
    image_side: int = Field(448, ge=32, description="Pictures are scaled down to this many pixels on the longer side.")
    quality: bool = Field(True, description="Reject answers that are empty, cut off, repetitive, copied or refusals.")
    language: Literal["en", "any"] = Field("en", description="Language that the quality check expects.")
    attempts: int = Field(
        2, ge=1, description="Tries per item, each with another seed, before a rejected answer goes to quarantine."
    )
    shard_rows: int = Field(512, ge=1, description="Items committed at once: a crash costs no more than these.")
    retry_failed: bool = Field(False, description="Try items in quarantine again.")
    limit: int | None = Field(None, ge=1, description="Only the first items, for a trial.")
    sample: int | None = Field(None, ge=1, description="Only this many random items, shown on a contact sheet (HTML).")
    render_workers: int = Field(
        0, ge=0, description="CPU processes that prepare pictures for vLLM. 0 leaves that to the engine's own process."
    )
    gpu_hour_price: float | None = Field(
        None, ge=0, description="Price of a GPU-hour, for the cost line of the summary."
    )
    engine: EngineConfig = Field(EngineConfig(), description="The engines that write.")
    ray: RayConfig = Field(RayConfig(), description="Where the work runs.")


class SequentialConfig(Config):
    """The sequential retrievers SASRec and BSARec: sizes, training, and where they run."""

    hidden: int = Field(64, ge=4, description="Width of item embeddings and layers.")
    layers: int = Field(2, ge=1, description="Number of blocks.")
    heads: int = Field(1, ge=1, description="Attention heads; they divide `hidden`.")
    max_length: int = Field(50, ge=2, description="Most recent items of a history that the model reads.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout of embeddings, attention and layers.")
    alpha: float = Field(0.7, ge=0, le=1, description="bsarec: share of the frequency filter; the rest is attention.")
    c: int = Field(5, ge=1, description="bsarec: the filter keeps the lowest c // 2 + 1 frequencies as they are.")
    lr: float | None = Field(
        None, gt=0, description="Learning rate of Adam. Default: 0.001 for sasrec, 0.0005 for bsarec."
    )
    samples: Literal["prefixes", "histories"] = Field(
        "prefixes",
        description="Learn the next item of every prefix of a history, one sample each, or of all places of a history "
        "at once: faster, and for sasrec only.",
    )
    batch_size: int = Field(256, ge=1, description="Samples per step.")
    epochs: int = Field(200, ge=1, description="Passes over the training part, at most.")
    patience: int = Field(10, ge=1, description="Stop after this many epochs without a better validation NDCG@10.")
    val_users: int = Field(25_000, ge=1, description="Validation users, a seeded sample that stays the same.")
    negatives: int | None = Field(
        None,
        ge=1,
        description="Items drawn per step for a sampled softmax with logQ correction. Default: the softmax is over the "
        "whole catalogue, or over 8,192 drawn items where the catalogue has more than 50,000.",
    )
    cpus: int = Field(2, ge=1, description="CPU cores of the training process.")
    gpus: float | None = Field(
        None, ge=0, description="GPUs of the training process. Default: 1 where there is a GPU, else 0."
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> SequentialConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} cannot be divided among {self.heads} heads")
        if self.c // 2 + 1 > self.max_length // 2 + 1:
            raise ValueError(f"c {self.c} is larger than max_length {self.max_length}: no frequency would be filtered")
        return self


class RetrieveConfig(Config):
    """``vlrank retrieve``: make candidate lists, or import those of another program."""

    dataset: ConfigLocation = Field(..., description="Dataset folder of `vlrank prepare`.")
    method: str = Field(
        "popularity",
        description="A retriever (popularity, item_knn, als, sasrec or bsarec), ensemble:A,B to mix the lists A and B, "
        "or a file with the lists of another program.",
    )
    name: str | None = Field(
        None, description="The lists become candidates/NAME. Default: the method, or the file's name."
    )
    top_k: int = Field(50, ge=1, description="Candidates per user.")
    split: Split = Field("test", description="Split of an imported file that does not name its split.")
    ids: Literal["auto", "source", "vlrank"] = Field(
        "auto", description="Ids in an imported file: those of the raw data (source), or user_id and item_id (vlrank)."
    )
    exclude_history: bool = Field(True, description="Remove items from imported lists that the user already had.")
    seed: Seed = Field(0, description="Seed of the retriever.")
    sequential: SequentialConfig = Field(SequentialConfig(), description="Settings of sasrec and bsarec.")
    ray: RayConfig = Field(RayConfig(), description="Where sasrec and bsarec are trained.")


class ListsConfig(Config):
    """``vlrank lists``: write candidates or rankings for other programs."""

    dataset: ConfigLocation = Field(..., description="Dataset folder of `vlrank prepare`.")
    lists: str = Field(..., description="Lists to write: candidates/NAME, or a file of rankings or candidates.")
    out: ConfigLocation = Field(
        ...,
        description="File: .tsv, .csv or .parquet with a line of user_id, item_id, score and rank per item, .jsonl, "
        "or .trec.",
    )
    split: Split = Field("test", description="Split to write.")


class LoraConfig(Config):
    """LoRA adapter shape (Hu et al. 2021)."""

    r: int = Field(8, ge=1, description="Rank of the adapter.")
    alpha: int = Field(16, ge=1, description="The adapter's output is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="Layers that get an adapter.",
    )


class RankingConfig(Config):
    """What a prompt holds and how a ranking is read from it; the same in training, validation and reranking."""

    top_k: int = Field(50, ge=1, description="Candidates reranked per user.")
    max_history: int = Field(20, ge=1, description="Most recent items shown in the prompt.")
    max_item_chars: int = Field(400, ge=8, description="An item's line in the prompt is cut to this many characters.")
    max_prompt_tokens: int = Field(4096, ge=64, description="Longer prompts lose their oldest history items.")
    max_image_pixels: int = Field(
        224 * 224, ge=32 * 32, description="Larger pictures are scaled down to this many pixels."
    )
    window: int = Field(20, ge=2, description="Candidates per prompt; longer lists go through sliding windows.")
    stride: int = Field(10, ge=1, description="Places between the starts of two windows.")
    permutations: int = Field(1, ge=1, description="Average over this many seeded shuffles of the candidates.")
    missing: Literal["drop", "text"] = Field(
        "drop", description="Items without what the mode shows are left out (drop) or shown by their text (text)."
    )
    popularity_prior: bool | None = Field(
        None,
        description="Multiply probabilities by the item's training interactions + 1. Default: true where training "
        "drew its negatives in proportion to these.",
    )

    @model_validator(mode="after")
    def _stride_fits(self) -> RankingConfig:
        if self.stride > self.window:
            raise ValueError(f"stride {self.stride} is larger than window {self.window}: candidates would be skipped")
        return self


class TrainConfig(Config):
    """``vlrank train``: train one reranker in one mode."""

    dataset: ConfigLocation = Field(..., description="Dataset folder of `vlrank prepare`.")
    out: ConfigLocation = Field(..., description="Run folder. A run that is there already continues.")
    mode: Mode = Field(..., description="What the prompt shows of an item.")
    model: str | None = Field(
        None,
        description="Hugging Face name, model folder or run folder of a fully trained model. Default: the mode's base "
        "model.",
    )
    method: Literal["lora", "full"] | None = Field(
        None, description="Train a LoRA adapter or all weights. Default: the mode's method."
    )
    train_vision: bool = Field(False, description="With --method full: train the vision tower too.")
    train_inputs: Literal["mode", "caption"] = Field(
        "mode", description="raw_image only: `caption` trains on captions and ranks with pictures."
    )
    epochs: int = Field(10, ge=1, description="Passes over the training users.")
    batch_size: int = Field(8, ge=1, description="Samples per optimizer step, whatever the number of workers.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Samples per forward pass. Default: a worker's whole share of the batch."
    )
    auto_batch: bool = Field(
        True,
        description="On a GPU: fit passes, recomputed layers and optimizer states to its memory; --batch_size stays.",
    )
    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    warmup_ratio: float = Field(
        0.05, ge=0, lt=1, description="Share of the steps in which the learning rate rises to its peak."
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the optimizer.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    optim: Literal["auto", "adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "auto",
        description="Optimizer. auto is adamw with float32 moments and weights, or an 8-bit one where the GPU's memory "
        "asks for it; adamw_bf16 keeps both in bfloat16; the 8-bit ones are those of bitsandbytes.",
    )
    patience: int = Field(5, ge=1, description="Stop after this many evaluations without improvement.")
    loss: Literal["answer", "all"] = Field(
        "answer", description="Train on the answer alone, or on all tokens of the prompt."
    )
    negatives: int = Field(19, ge=1, description="Negatives per target.")
    negative_sampling: Literal["uniform", "popularity"] = Field(
        "uniform",
        description="Draw negatives from all items alike, or in proportion to their training interactions + 1.",
    )
    candidates: str = Field(
        "ground_truth", description="ground_truth samples negatives; retrieval:NAME takes them from candidates/NAME."
    )
    random_share: tuple[Share, Share] = Field(
        (0.0, 0.0), description="With retrieval:NAME: share of random negatives in the first and in the last epoch."
    )
    samples_per_user: int | Literal["every_prefix"] = Field(
        1, description="Random targets per user and epoch, or every_prefix for all of them."
    )
    val_users: int | None = Field(
        None,
        ge=1,
        description="Validation users, a seeded sample that stays the same. Default: 15% of the training users, which "
        "takes about 5% of the training time, and between 200 and 10,000.",
    )
    eval_steps: int | None = Field(None, ge=1, description="Validate every so many steps. Default: after each epoch.")
    metric: str | None = Field(
        None,
        pattern=r"^(recall|ndcg|mrr)@[1-9][0-9]*$",
        description="Validation metric that selects the best checkpoint, e.g. recall@5 or ndcg@10. Default: "
        "recall@min(10, top_k).",
    )
    max_missing: float = Field(
        0.2, ge=0, le=1, description="Refuse a dataset in which a larger share of the items lacks what the mode shows."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of the computation. auto is bfloat16 on a GPU, float16 on one without it (T4, "
        "V100), and float32 on a CPU.",
    )
    backend: Literal["auto", "unsloth", "transformers"] = Field(
        "auto", description="Library behind text models. auto takes Unsloth for LoRA where it is installed."
    )
    load_in_4bit: bool | None = Field(
        None,
        description="LoRA on text models: keep the base weights in 4 bits (NF4). Default: true where bitsandbytes is "
        "installed.",
    )
    packing: bool | None = Field(
        None,
        description="Put prompts back to back in rows of --pack_tokens instead of padding them. Default: true on a "
        "GPU.",
    )
    pack_tokens: int | None = Field(
        None,
        ge=64,
        description="Tokens of a packed row. Default: as many as a step fills well, in at most half of the free GPU "
        "memory.",
    )
    compile: bool | None = Field(
        None,
        description="Compile each decoder layer. Default: true on a GPU with packing; Unsloth has kernels of its own.",
    )
    cache_vision: bool = Field(
        True, description="Compute the features of a frozen vision tower once per picture and keep them."
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute layers in the backward pass: same result, less memory, about a third slower. Default: "
        "where the GPU's memory asks for it.",
    )
    gpu_memory_gib: float | None = Field(
        None, gt=0, description="GPU memory in GiB that a worker may take. Default: what is free."
    )
    parallel: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        description="Several workers: each holds a whole copy of the model (ddp) or a part of the weights (fsdp2).",
    )
    lora: LoraConfig = Field(LoraConfig(), description="Shape of the LoRA adapter.")
    ranking: RankingConfig = Field(
        RankingConfig(), description="What a prompt holds and how a ranking is read from it."
    )
    seed: Seed = Field(0, description="Seed of sampling, shuffling and initialisation.")
    workers: int = Field(1, ge=1, description="Number of training processes.")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs per worker. Default: 1 where there is a GPU, else 0."
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs per worker.")
    loader_workers: int | None = Field(
        None, ge=0, description="Processes per worker that prepare batches ahead. Default: 4 on a GPU, else 0."
    )
    max_failures: int = Field(
        2, ge=0, description="Worker failures after which the run still resumes from its last checkpoint."
    )
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept, the best one included.")
    resume_minutes: Annotated[float, Field(ge=0)] | Literal["never"] = Field(
        10,
        description="A large optimizer state (over 1 GiB) is saved at most this often: a killed run repeats as much, "
        "and from the start with `never`. A smaller one is saved at every evaluation.",
    )
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="`auto` resumes from the last state saved in --out; `never` deletes the run in --out and starts "
        "again.",
    )
    report_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (), description="Where to send metrics, besides the run folder. TensorBoard's files go to OUT/logs."
    )
    ray: RayConfig = Field(RayConfig(), description="Where the work runs.")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.train_vision and self.method != "full":
            raise ValueError("train_vision needs method: full (LoRA adapts the language model)")
        if self.train_inputs == "caption" and self.mode != "raw_image":
            raise ValueError(f"train_inputs: caption belongs to mode raw_image, not {self.mode}")
        if isinstance(self.samples_per_user, int) and self.samples_per_user < 1:
            raise ValueError(f"samples_per_user must be at least 1 or every_prefix, got {self.samples_per_user}")
        if self.candidates != "ground_truth" and not self.candidates.removeprefix("retrieval:").strip():
            raise ValueError("candidates: retrieval needs a name, e.g. retrieval:popularity")
        if self.candidates != "ground_truth" and not self.candidates.startswith("retrieval:"):
            raise ValueError(f"candidates is ground_truth or retrieval:NAME, got {self.candidates!r}")
        return self

    @property
    def resolved_ranking(self) -> RankingConfig:
        """`ranking` for validation and for the trained model, with ``popularity_prior`` decided.

        Only negatives drawn by popularity need the prior: a retriever's lists are no such draw.
        """
        prior = self.ranking.popularity_prior
        if prior is None:
            prior = self.negative_sampling == "popularity" and self.candidates == "ground_truth"
        return self.ranking.model_copy(update={"popularity_prior": prior})


class TuneConfig(Config):
    """``vlrank tune``: search the best training settings of each mode with ASHA."""

    dataset: ConfigLocation = Field(..., description="Dataset folder of `vlrank prepare`.")
    out: LocalPath = Field(..., description="Sweep folder. A sweep that is there already continues.")
    modes: tuple[Mode, ...] = Field(MODES, description="Modes to search: all, or some of them.")
    space: dict[str, Any] = Field(
        default_factory=dict,
        description="Search space: a training key -> {loguniform|uniform|randint: [low, high]}, {choice: [...]} or a "
        "fixed value. Replaces keys of configs/tune/MODE.yaml.",
    )
    spaces: dict[Mode, dict[str, Any]] = Field(
        default_factory=dict, description="Search space of single modes; replaces keys of `space`."
    )
    trials: int = Field(8, ge=1, description="Trials per mode. The first is the mode's default configuration.")
    search: Literal["random", "grid", "optuna"] = Field(
        "random", description="How points are chosen. grid tries every combination, whatever --trials says."
    )
    scheduler: Literal["asha", "none"] = Field(
        "asha", description="asha pauses trials that fall behind; none trains every trial to its end."
    )
    grace_period: int = Field(1, ge=1, description="Epochs before ASHA may pause a trial.")
    reduction_factor: int = Field(3, ge=2, description="ASHA lets the best 1/N of the trials at a rung train on.")
    max_concurrent_trials: int | None = Field(
        None, ge=1, description="Trials that run at the same time. Default: as many as the resources allow."
    )
    trial_retries: int = Field(1, ge=0, description="A failed trial is tried again this often and then reported.")
    confirm_seeds: int = Field(
        0, ge=0, description="Train each mode's best and default configuration again on this many fresh seeds."
    )
    test: bool = Field(False, description="Rank the test users once, with each mode's winner.")
    engine: EngineConfig = Field(EngineConfig(), description="The engine that ranks the test users.")
    keep_checkpoints: Literal["best", "all"] = Field(
        "best", description="Checkpoints of finished trials to keep: each mode's best, or all."
    )
    train: dict[str, Any] = Field(default_factory=dict, description="Training keys of all trials.")
    per_mode: dict[Mode, dict[str, Any]] = Field(
        default_factory=dict, description="Training keys of one mode's trials."
    )
    seed: Seed = Field(0, description="Seed of the choice of points.")
    ray: RayConfig = Field(RayConfig(), description="Where the work runs.")

    @field_validator("modes", mode="before")
    @classmethod
    def _modes_from_words(cls, value: Any) -> Any:
        """``all``, ``a,b`` or ``[a, b]``, each mode once."""
        words = _parted(value)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return value
        names = [word.strip() for word in words if word.strip()]
        return tuple(dict.fromkeys(mode for name in names for mode in (MODES if name == "all" else (name,))))


class RerankConfig(Config):
    """``vlrank rerank``: rank candidates with a trained model, in bulk."""

    dataset: ConfigLocation = Field(..., description="Dataset folder of `vlrank prepare`.")
    model: str = Field(..., description="Run folder of `vlrank train`, checkpoint folder, or sweep folder of one mode.")
    candidates: str = Field(
        "ground_truth", description="NAME of candidates/NAME, or ground_truth: the target among sampled negatives."
    )
    split: Split = Field("test", description="Users whose target belongs to this split.")
    out: ConfigLocation = Field(..., description="File for the rankings: .parquet, .trec or .jsonl.")
    limit: int | None = Field(None, ge=1, description="Only the first users, for a trial.")
    negatives: int = Field(19, ge=1, description="With --candidates ground_truth: negatives per target.")
    ranking: dict[str, Any] = Field(
        default_factory=dict, description="Replaces ranking settings of the run, e.g. ranking.permutations=3."
    )
    as_mode: Mode | None = Field(None, description="Mode of a model that vlrank did not train.")
    fusion_weight: Literal["auto"] | float | None = Field(
        None,
        description="Weight from 0 to 1 of the retriever's scores; auto chooses it on validation users. Default: "
        "scores are not fused.",
    )
    fusion_users: int = Field(1000, ge=1, description="Validation users that --fusion_weight auto ranks.")
    scores_of: ConfigLocation | None = Field(
        None,
        description="Another file of rankings whose scores are used again, e.g. to fuse them as well: only users that "
        "it lacks are ranked.",
    )
    prompt_workers: int | None = Field(
        None,
        ge=0,
        description="Processes that make prompts. 0 leaves that to the engines. Default: 4 to 12 per engine on GPUs, "
        "as the CPUs allow, else 0.",
    )
    shard_rows: int = Field(256, ge=1, description="Users committed at once: a crash costs no more than these.")
    retry_failed: bool = Field(False, description="Try users in quarantine again.")
    seed: Seed = Field(0, description="Seed of sampled negatives and of permutations.")
    engine: EngineConfig = Field(EngineConfig(), description="The engines that score.")
    ray: RayConfig = Field(RayConfig(), description="Where the work runs.")

    @model_validator(mode="after")
    def _weight_is_a_share(self) -> RerankConfig:
        if isinstance(self.fusion_weight, float) and not 0 <= self.fusion_weight <= 1:
            raise ValueError(f"fusion_weight must be between 0 and 1 or auto, got {self.fusion_weight}")
        return self


class ServeConfig(Config):
    """``vlrank serve``: answer requests to rank over HTTP, on Ray Serve."""

    positional: ClassVar[str] = "model"

    model: str = Field(..., description="Run folder of `vlrank train`, checkpoint folder, or sweep folder of one mode.")
    dataset: ConfigLocation = Field(..., description="Dataset folder whose items and users requests name by their ids.")
    host: str = Field(
        "127.0.0.1", description="Address to listen on. Any but this machine's own needs VLRANK_SERVE_TOKEN."
    )
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    replicas: int = Field(1, ge=1, description="Number of replicas, each with an engine of its own.")
    as_mode: Mode | None = Field(None, description="Mode of a model that vlrank did not train.")
    ranking: dict[str, Any] = Field(
        default_factory=dict, description="Replaces ranking settings of the run, e.g. ranking.top_k=100."
    )
    seed: Seed = Field(0, description="Seed of permutations, as in `vlrank rerank`.")
    users_at_once: int = Field(
        32, ge=1, description="Users that a replica ranks at the same time; their prompts share the engine's passes."
    )
    batch_wait_ms: float = Field(
        2, ge=0, description="How long a request waits for others, with engines that do not fill their own rows."
    )
    max_queue: int = Field(
        256, ge=1, description="Requests that wait at a replica; further ones are answered with status 429."
    )
    max_body_mb: float = Field(16, gt=0, description="Larger bodies of requests are answered with status 413.")
    timeout_s: float = Field(60, gt=0, description="Requests that take longer are answered with status 408.")
    drain_s: float = Field(30, ge=1, description="Time for accepted requests after a signal to end.")
    prompt_workers: int | None = Field(
        None,
        ge=0,
        description="Processes per replica that make prompts; 0: the replica itself. Default: 4 to 12 on GPUs, as the "
        "CPUs allow, else 0.",
    )
    inline_pictures: int = Field(1024, ge=1, description="Pictures sent with requests that are kept for further ones.")
    pictures: PictureLimits = Field(
        PictureLimits(attempts=1, timeout_s=10, concurrency_per_host=32, requests_per_second=1000),
        description="How pictures sent with requests are fetched and which are refused.",
    )
    engine: EngineConfig = Field(
        EngineConfig(row_tokens=16384, low_latency=True), description="The engine of each replica."
    )
    ray: RayConfig = Field(RayConfig(), description="Where the work runs.")

    @model_validator(mode="before")
    @classmethod
    def _partly_given(cls, values: Any) -> Any:
        """Keep this stage's own defaults of nested keys where only some of them are given."""
        if not isinstance(values, dict):
            return values
        own = {key: cls.model_fields[key].default.model_dump(exclude_unset=True) for key in ("engine", "pictures")}
        given = {key: values[key] for key in own if isinstance(values.get(key), dict)}
        return values | {key: own[key] | value for key, value in given.items()}

    @model_validator(mode="after")
    def _replicas_have_one_engine(self) -> ServeConfig:
        if self.engine.replicas != 1:
            raise ValueError(f"a replica has one engine: give replicas={self.engine.replicas}, not engine.replicas")
        return self


class EvaluateConfig(Config):
    """``vlrank evaluate``: compare rankings with rivals and write a report."""

    dataset: ConfigLocation = Field(..., description="Dataset folder of `vlrank prepare`.")
    rankings: tuple[ConfigLocation, ...] = Field(
        ..., min_length=1, description="Files of rankings, of `vlrank rerank` or of other programs."
    )
    out: ConfigLocation = Field(..., description="Folder for report.html and metrics.json.")
    split: Split = Field("test", description="Split of rankings files that do not name their split.")
    ks: tuple[int, ...] = Field((1, 5, 10, 20, 50), min_length=1, description="Cut-offs K of the metrics.")
    baselines: tuple[str, ...] = Field(
        ("identity", "random", "popularity", "item_knn", "als", "bm25"),
        description="Rivals that rank the same candidates. Also embedding and pointwise, which need a model.",
    )
    embedding_model: str | None = Field(None, description="Text embedding model of the embedding rival.")
    pointwise_model: str | None = Field(None, description="Language model of the pointwise (yes/no) rival.")
    pointwise_mode: Mode | None = Field(
        None, description="What the pointwise rival shows of an item. Default: its text."
    )
    max_history: int = Field(20, ge=1, description="Most recent items that bm25, embedding and pointwise look at.")
    candidates: str | None = Field(
        None, description="NAME of the candidates/NAME that were reranked. Default: found by comparing the lists."
    )
    protocol: Literal["auto", "ground_truth", "retrieval"] = Field(
        "auto",
        description="Whether the target was put among the candidates (ground_truth) or had to be retrieved. auto "
        "finds it by comparing the lists.",
    )
    compare: tuple[str, ...] = Field(
        (), description="Two methods, by name or file, whose difference is shown in every metric."
    )
    bootstrap: int = Field(2000, ge=100, description="Resamples behind each interval.")
    runs: tuple[ConfigLocation, ...] = Field(
        (), description="Run folders of `vlrank train` whose curves the report shows."
    )
    sweep: LocalPath | None = Field(None, description="Sweep folder of `vlrank tune` that the report shows.")
    stage_times: dict[str, float] = Field(default_factory=dict, description="Stage -> seconds, shown in the report.")
    sample_users: int = Field(60, ge=0, description="Users whose lists can be browsed in the report.")
    seed: Seed = Field(0, description="Seed of resampling and of the users to browse.")

    @model_validator(mode="after")
    def _two_to_compare(self) -> EvaluateConfig:
        if self.compare and len(self.compare) != 2:
            raise ValueError(f"compare takes two methods, got {len(self.compare)}: {', '.join(self.compare)}")
        if min(self.ks) < 1:
            raise ValueError(f"ks must be at least 1, got {min(self.ks)}")
        return self


class ExportConfig(Config):
    """``vlrank export``: write a trained model as a folder to publish."""

    positional: ClassVar[str] = "run"

    run: str = Field(..., description="Run folder of `vlrank train`, checkpoint folder, or sweep folder of one mode.")
    out: LocalPath = Field(..., description="Folder for the model, new or empty.")
    merge: bool = Field(
        True, description="Merge an adapter into its base model. Without, the adapter alone is written."
    )
    quantization: Literal["fp8"] | None = Field(
        None,
        description="Write the decoder's linear layers in 8 bits (compressed-tensors, FP8 with dynamic activations).",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of merged weights. auto is the base model's, bfloat16 for one in 4 bits."
    )
    dataset: ConfigLocation | None = Field(
        None, description="Dataset that sample prompts are made from. Default: the one that the run was trained on."
    )
    sample: int = Field(
        64, ge=0, description="Validation users whose rankings by run and by exported model are compared; 0 for none."
    )
    evaluation: ConfigLocation | None = Field(
        None, description="Report folder of `vlrank evaluate` whose numbers the model card shows."
    )
    engine: EngineConfig = Field(
        EngineConfig(name="transformers"), description="The engine that makes the compared rankings."
    )


class DemoConfig(Config):
    """``vlrank demo``: run every stage on an embedded shop, without a GPU."""

    out: LocalPath = Field(Path("vlrank-demo"), description="Folder for everything that the demo makes.")
    modes: tuple[Mode, ...] = Field(MODES, description="Modes to train.")
    seed: Seed = Field(0, description="Seed of the shop and of training.")
    trials: int = Field(2, ge=0, description="Trials of the sweep; 0 leaves the sweep out.")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="Inference engine. auto takes vLLM where it is installed."
    )
    fresh: bool = Field(False, description="First delete what an earlier demo left in the folder.")


C = TypeVar("C", bound=Config)


def config_dir() -> Path:
    """Folder of the YAML files that ship with vlrank: inside an installed wheel, or the checkout's ``configs/``."""
    packaged = Path(__file__).parent / "_configs"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "configs"


def mode_defaults(mode: str) -> dict[str, Any]:
    """Training keys of ``configs/modes/MODE.yaml``.

    Raises:
        UserError: unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}", f"Choose one of: {', '.join(MODES)}.")
    return read_yaml(config_dir() / "modes" / f"{mode}.yaml")


class _UniqueKeys(yaml.SafeLoader):
    """YAML's rule that the keys of a mapping differ, which PyYAML leaves out: the last one would win in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, in which no key is given twice.

    Raises:
        UserError: missing, unreadable, or not a mapping.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist", "Check the path.") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"config file {path} cannot be read: {line}{error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"config file {path} holds a {type(loaded).__name__}, expected `key: value` lines")
    return loaded


def parse_overrides(overrides: Sequence[str], verbatim: Collection[str] = ()) -> dict[str, Any]:
    """``["ranking.top_k=20", "lr=1e-4"]`` -> ``{"ranking": {"top_k": 20}, "lr": "1e-4"}``; values are read as YAML.

    Args:
        overrides: ``key=value`` words.
        verbatim: Keys, also of a stage in a recipe, whose values are taken as they are if they hold a brace and are
            not in quotes.

    Raises:
        UserError: an override without ``=`` or with an unreadable value.
    """
    result: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} is not of the form key=value", "Example: vlrank train ... lr=1e-4")
        try:
            as_it_is = key.rpartition(".")[2] in verbatim and "{" in text and text[0] not in "\"'"
            value: Any = text if as_it_is else yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"the value of override {override!r} cannot be read as YAML") from None
        *parents, leaf = key.split(".")
        nested: dict[str, Any] = reduce(lambda tree, name: {name: tree}, reversed([*parents, leaf]), value)
        result = merge(result, nested)
    return result


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries joined; ``high`` wins."""
    joined = dict(low)
    for key, value in high.items():
        old = joined.get(key)
        joined[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return joined


def load_config(
    kind: type[C],
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    **flags: Any,
) -> C:
    """Build a stage's config from all its sources; flags that are None or empty count as not given.

    Raises:
        UserError: an unknown key, a wrong type or a missing value, each named with its source key.
    """
    given = {key: value for key, value in flags.items() if value is not None and value != () and value != []}
    values = merge(defaults or {}, read_yaml(file) if file else {})
    values = merge(merge(values, parse_overrides(overrides, kind.verbatim)), given)
    return validate(kind, with_mode_defaults(kind, values) if defaults is None else values)


def with_mode_defaults(kind: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's values over those of its mode's file, if it has a mode.

    Raises:
        UserError: unknown mode.
    """
    if "mode" in kind.model_fields and isinstance(values.get("mode"), str):
        return merge(mode_defaults(values["mode"]), values)
    return dict(values)


def validate(kind: type[C], values: Mapping[str, Any], *, within: tuple[type[Config], str] | None = None) -> C:
    """``kind(**values)`` with pydantic's errors turned into one `UserError` that names every wrong key.

    Args:
        kind: What to make.
        values: Its fields.
        within: The stage's config that this is a part of, and its key there.
    """
    stage, prefix = (within[0], f"{within[1]}.") if within else (kind, "")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [
            _explain(kind, item["loc"], item["type"], item["msg"], item.get("input"), prefix) for item in error.errors()
        ]
        listed = f"`vlrank {_stage(stage)} --help` lists the options."
        if stage in (RankingConfig, EngineConfig):  # given in Python, to `Qwen3VLReranker`
            listed = f"`vlrank.config.{stage.__name__}` lists the options."
        raise UserError("\n".join(problems), listed) from None


def _stage(kind: type[Config]) -> str:
    return kind.__name__.removesuffix("Config").lower()


def _explain(
    kind: type[Config], loc: tuple[int | str, ...], error_type: str, message: str, value: Any, prefix: str
) -> str:
    key = prefix + ".".join(str(part) for part in loc) if loc else ""
    message = message.removeprefix("Value error, ")  # pydantic's, for what our own validators say
    if error_type == "extra_forbidden":
        near = difflib.get_close_matches(key, _keys(kind, prefix), n=1)
        return f"unknown config key `{key}`" + (f", did you mean `{near[0]}`?" if near else "")
    if error_type == "missing":
        return f"config key `{key}` is required"
    given = repr(value)
    if len(given) > _LONGEST_SHOWN:
        given = f"{given[:_LONGEST_SHOWN]}..."
    return f"config key `{key}`: {message[0].lower()}{message[1:]}, got {given}" if key else message


_LONGEST_SHOWN = 60
"""Characters of a wrong value in a message, which has said before what is wrong with it."""


def _keys(kind: type[Config], prefix: str = "") -> list[str]:
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys

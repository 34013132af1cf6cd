"""One pydantic model per stage. YAML files, ``key=value`` overrides and flags become these, or one clear error.

Precedence, weakest first: the defaults below, the mode's file (``configs/modes/MODE.yaml``), ``--config FILE``,
``key=value`` overrides, explicit flags.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlrank.errors import UserError
from vlrank.storage import ConfigLocation, LocalPath, Location

Mode = Literal["raw_image", "caption", "semantic_summary", "semantic_summary_small"]
MODES: tuple[Mode, ...] = ("raw_image", "caption", "semantic_summary", "semantic_summary_small")
What = Literal["caption", "semantic_summary"]
Split = Literal["val", "test"]
Seed = Annotated[int, Field(ge=0)]  # NumPy takes no other
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of all configs: unknown keys are errors, values are checked, instances cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class RayConfig(Config):
    """Where the work runs."""

    address: str | None = Field(
        None,
        description="Ray address; unset joins RAY_ADDRESS or the job's own cluster, else starts Ray on this machine",
    )
    num_cpus: int | None = Field(None, ge=1, description="logical CPUs of a Ray started here; default max(8, cores)")


class EngineConfig(Config):
    """A pool of inference engines for generation and reranking."""

    name: Literal["auto", "vllm", "transformers"] = Field("auto", description="auto takes vLLM where it is installed")
    replicas: int = Field(1, ge=1, description="engines in the fixed pool")
    gpus: float | None = Field(
        None, ge=0, description="GPUs per engine, fractions allowed; default 1 where there is one, else 0"
    )
    cpus: float = Field(1, gt=0, description="CPUs per engine")
    batch_size: int = Field(64, ge=1, description="prompts handed to an engine at once")
    max_model_len: int | None = Field(
        None, ge=16, description="longest prompt plus answer, tokens; default the model's own"
    )
    tensor_parallel_size: int = Field(1, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    enforce_eager: bool | None = Field(None, description="skip vLLM's compilation; default true on a CPU")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="passed to vLLM as they are")


class ColumnsConfig(Config):
    """What the columns of raw files are called; unset ones are found by the names that public data sets use."""

    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    rating: str | None = None
    title: str | None = None
    brand: str | None = None
    categories: str | None = None
    description: str | None = None
    image: str | None = Field(None, description="path relative to the metadata file, or URL")
    names: tuple[str, ...] = Field((), description="column names of a delimited reviews file without a header line")
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="default comma, or tab in .tsv, .inter, .item"
    )


class PicturesConfig(Config):
    """How pictures are fetched and what is refused."""

    workers: int = Field(2, ge=0, description="Ray actors; 0 works in this process without Ray")
    concurrency_per_host: int = Field(8, ge=1, description="simultaneous requests to one host, all workers together")
    requests_per_second: float = Field(20, gt=0, description="to one host, all workers together")
    attempts: int = Field(
        4, ge=1, description="tries per picture; only what may pass (429, 5xx, time-outs) is tried again"
    )
    backoff_s: float = Field(1.0, ge=0, description="first pause before a retry, doubled each time")
    timeout_s: float = Field(30, gt=0, description="for one try, redirects included")
    max_bytes: int = Field(20_000_000, ge=1, description="larger files are refused")
    max_pixels: int = Field(50_000_000, ge=1, description="larger pictures are refused before they are decoded")
    max_redirects: int = Field(5, ge=0)
    allow_private: bool = Field(False, description="allow addresses that are not public (localhost, 10.x, ...)")
    shard_rows: int = Field(256, ge=1, description="pictures committed at once: what a crash can cost at most")


class PrepareConfig(Config):
    """``vlrank prepare``: raw reviews, metadata and pictures become a dataset folder."""

    reviews: tuple[ConfigLocation, ...] = Field(
        (), description="interactions: .json(l), .csv, .tsv, .inter or .parquet, also compressed"
    )
    meta: tuple[ConfigLocation, ...] = Field(
        (), description="items: .json(l), .csv, .tsv, .item or .parquet, also compressed"
    )
    dataset_code: str | None = Field(
        None,
        description="an Amazon data set instead of --reviews and --meta: beauty, games, sports, ... or its full name",
    )
    release: Literal["2014", "2018", "2023"] = Field("2014", description="Amazon release of dataset_code")
    raw_dir: LocalPath = Field(
        Path("data/raw"), description="where raw files of dataset_code are looked for and downloaded to"
    )
    download: bool = Field(True, description="download missing raw files of dataset_code")
    out: ConfigLocation | None = Field(None, description="dataset folder; default data/DATASET_CODE")
    min_rating: float = Field(0, ge=0, description="keep interactions rated at least this; 0 keeps all")
    min_uc: int = Field(5, ge=1, description="fewest interactions of a user, to the fixpoint with min_sc")
    min_sc: int = Field(5, ge=1, description="fewest interactions of an item, to the fixpoint with min_uc")
    keep_duplicates: bool = Field(False, description="keep repeated (user, item) pairs instead of the first only")
    keep_untitled: bool = Field(False, description="keep items without a title, shown by their id")
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    val_fraction: float = Field(
        0.1, gt=0, lt=1, description="temporal: share of the interactions in the validation period"
    )
    test_fraction: float = Field(0.1, gt=0, lt=1, description="temporal: share of the interactions in the test period")
    val_from: int | None = Field(
        None, description="temporal: start of validation, seconds since 1970, instead of a share"
    )
    test_from: int | None = Field(None, description="temporal: start of the test period, seconds since 1970")
    timestamp_unit: Literal["auto", "s", "ms", "us", "ns"] = Field(
        "auto", description="auto tells by the size of the number"
    )
    impossible_times: Literal["keep", "quarantine"] = Field(
        "keep", description="interactions before 1990 or in the future: kept and counted, or put aside"
    )
    use_image: bool = Field(False, description="copy or download the items' pictures")
    retry_failed: bool = Field(False, description="try only the pictures that failed before")
    image_root: LocalPath | None = Field(
        None, description="folder of relative picture paths; default the metadata file's"
    )
    max_text_chars: int = Field(600, ge=16, description="item text is cut to this many characters")
    max_line_mb: int = Field(64, ge=1, description="longer lines of JSON files go to quarantine")
    allow_truncated: bool = Field(False, description="use what can be read of a compressed file that was cut off")
    overwrite: bool = Field(False, description="replace an existing dataset made with other options")
    columns: ColumnsConfig = ColumnsConfig()
    pictures: PicturesConfig = PicturesConfig()
    ray: RayConfig = RayConfig()

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
    """``vlrank generate``: captions or semantic summaries for every item."""

    dataset: ConfigLocation
    what: What
    model: str = Field("Qwen/Qwen3-VL-2B-Instruct", description="Hugging Face name or local folder")
    prompt: str | None = Field(None, description="prompt id, e.g. caption/v1; default the newest of its kind")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face model")
    adapter: LocalPath | None = Field(None, description="LoRA adapter folder, used with the model")
    max_tokens: int = Field(96, ge=1)
    temperature: float = Field(0.0, ge=0)
    seed: Seed = 0
    image_side: int = Field(448, ge=32, description="pictures are scaled down to this many pixels on the longer side")
    quality: bool = Field(True, description="reject empty, cut off, repetitive, ... texts")
    language: Literal["en", "any"] = Field("en", description="what the quality gate takes for the right language")
    attempts: int = Field(2, ge=1, description="tries, each with another seed, before a rejected text is quarantined")
    shard_rows: int = Field(512, ge=1, description="rows committed at once: what a crash can cost at most")
    retry_failed: bool = Field(False, description="try quarantined items again")
    limit: int | None = Field(None, ge=1, description="only the first items, for a trial")
    sample: int | None = Field(None, ge=1, description="only this many random items, with a contact sheet (HTML)")
    render_workers: int = Field(
        0, ge=0, description="CPU processes that prepare pictures for vLLM; 0 leaves that to the engine's own process"
    )
    gpu_hour_price: float | None = Field(None, ge=0, description="for the cost line of the summary")
    engine: EngineConfig = EngineConfig()
    ray: RayConfig = RayConfig()


class RetrieveConfig(Config):
    """``vlrank retrieve``: candidate lists from a first-stage retriever."""

    dataset: ConfigLocation
    method: str = Field("popularity", description="popularity, item_knn, als, or a file to import")
    name: str | None = Field(None, description="candidates/NAME; default the method, or the file's name")
    top_k: int = Field(50, ge=1, description="candidates per user")
    split: Split = Field("test", description="the split of an imported file that does not say it")
    ids: Literal["auto", "source", "vlrank"] = Field(
        "auto", description="whose ids an imported file holds: those of the raw data, or user_id and item_id"
    )
    exclude_history: bool = Field(True, description="remove what the user already had from imported lists")
    seed: Seed = 0


class ExportConfig(Config):
    """``vlrank export``: candidates or rankings as a file for other programs, with the ids of the raw data."""

    dataset: ConfigLocation
    lists: str = Field(..., description="candidates/NAME, or a file of rankings or candidates")
    out: ConfigLocation = Field(
        ..., description=".tsv, .csv or .parquet: user_id, item_id, score, rank a line; .jsonl; .trec"
    )
    split: Split = "test"


class LoraConfig(Config):
    """LoRA adapter shape (Hu et al. 2021)."""

    r: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class RankingConfig(Config):
    """What a prompt holds and how a ranking is read from it; the same in training, validation and reranking."""

    top_k: int = Field(50, ge=1, description="candidates reranked per user")
    max_history: int = Field(20, ge=1, description="most recent items shown")
    max_item_chars: int = Field(400, ge=8, description="an item's line in the prompt is cut to this many characters")
    max_prompt_tokens: int = Field(4096, ge=64, description="longer prompts lose their oldest history items")
    max_image_pixels: int = Field(
        224 * 224, ge=32 * 32, description="larger pictures are scaled down to this many pixels"
    )
    window: int = Field(20, ge=2, description="candidates per prompt; more go through sliding windows")
    stride: int = Field(10, ge=1)
    permutations: int = Field(1, ge=1, description="average over this many seeded shuffles of the candidates")
    missing: Literal["drop", "text"] = Field(
        "drop", description="items without what the mode shows: left out, or shown by text"
    )
    popularity_prior: bool | None = Field(
        None,
        description="multiply probabilities by an item's training interactions + 1; default where training drew its "
        "negatives in proportion to them",
    )

    @model_validator(mode="after")
    def _stride_fits(self) -> RankingConfig:
        if self.stride > self.window:
            raise ValueError(f"stride {self.stride} is larger than window {self.window}: candidates would be skipped")
        return self


class TrainConfig(Config):
    """``vlrank train``: one reranker in one mode."""

    dataset: ConfigLocation
    out: ConfigLocation
    mode: Mode
    model: str | None = Field(
        None, description="Hugging Face name, model folder or fully fine-tuned run; default the mode's base model"
    )
    method: Literal["lora", "full"] | None = Field(None, description="default the mode's")
    train_vision: bool = Field(False, description="full fine-tuning only: train the vision tower too")
    train_inputs: Literal["mode", "caption"] = Field(
        "mode", description="raw_image only: caption trains on captions and ranks with pictures"
    )
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(8, ge=1, description="global batch, whatever the number of workers")
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples per forward pass; default as many as a worker's share"
    )
    auto_batch: bool = Field(False, description="GPU: find the largest micro-batch that fits; the global batch stays")
    lr: float = Field(1e-4, gt=0)
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optim: Literal["auto", "adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "auto", description="auto is adamw: float32 moments and weights; adamw_bf16 keeps both in bfloat16"
    )
    patience: int = Field(5, ge=1, description="evaluations without improvement before stopping")
    loss: Literal["answer", "all"] = "answer"
    negatives: int = Field(19, ge=1, description="sampled per target")
    negative_sampling: Literal["uniform", "popularity"] = Field(
        "uniform", description="random negatives: all items alike, or in proportion to their training interactions + 1"
    )
    candidates: str = Field(
        "ground_truth", description="ground_truth, or retrieval:NAME for negatives from candidates/NAME"
    )
    random_share: tuple[Share, Share] = Field(
        (0.0, 0.0), description="retrieval: share of random negatives in the first and in the last epoch"
    )
    samples_per_user: int | Literal["every_prefix"] = Field(1, description="random split points per user and epoch")
    val_users: int = Field(1000, ge=1, description="validation users, a fixed seeded sample")
    eval_steps: int | None = Field(None, ge=1, description="validate every so many steps; default after each epoch")
    metric: str | None = Field(
        None,
        pattern=r"^(recall|ndcg|mrr)@[1-9][0-9]*$",
        description="e.g. recall@5 or ndcg@10; default recall@min(10, top_k)",
    )
    max_missing: float = Field(0.2, ge=0, le=1, description="largest share of items without what the mode shows")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    backend: Literal["auto", "unsloth", "transformers"] = Field(
        "auto", description="text models; auto takes Unsloth for LoRA where it is installed"
    )
    load_in_4bit: bool | None = Field(
        None, description="text LoRA: NF4 base weights; default true where bitsandbytes is installed"
    )
    packing: bool | None = Field(None, description="prompts back to back in rows of pack_tokens; default true on a GPU")
    pack_tokens: int | None = Field(
        None,
        ge=64,
        description="tokens of a packed row; default what a step fills well, at most half of the free GPU memory",
    )
    compile: bool | None = Field(None, description="compile each decoder layer; default true on a GPU with packing")
    cache_vision: bool = Field(True, description="features of a frozen vision tower are computed once per picture")
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp2"] = Field("ddp", description="several workers: whole copies, or sharded weights")
    lora: LoraConfig = LoraConfig()
    ranking: RankingConfig = RankingConfig()
    seed: Seed = 0
    workers: int = Field(1, ge=1)
    gpus_per_worker: float | None = Field(None, ge=0, description="default 1 where there is one, else 0")
    cpus_per_worker: float = Field(1, gt=0)
    loader_workers: int | None = Field(
        None, ge=0, description="processes that prepare batches ahead; default 4 on a GPU, else 0"
    )
    max_failures: int = Field(2, ge=0, description="worker failures survived by resuming from the last checkpoint")
    save_total_limit: int = Field(2, ge=1)
    resume: Literal["auto", "never"] = Field("auto", description="auto goes on from the last checkpoint in out")
    report_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (), description="TensorBoard's files lie in OUT/logs"
    )
    ray: RayConfig = RayConfig()

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
    def asked(self) -> RankingConfig:
        """`ranking` as validation and the trained model follow it: with ``popularity_prior`` decided.

        A retriever's lists are no draw by popularity, so the answers learned from them leave nothing out.
        """
        prior = self.ranking.popularity_prior
        if prior is None:
            prior = self.negative_sampling == "popularity" and self.candidates == "ground_truth"
        return self.ranking.model_copy(update={"popularity_prior": prior})


class TuneConfig(Config):
    """``vlrank tune``: ASHA over learning rate, batch size and any other training key, per mode."""

    dataset: ConfigLocation
    out: LocalPath
    modes: tuple[Mode, ...] = Field(MODES, description="all, or some of them")
    space: dict[str, Any] = Field(
        default_factory=dict,
        description="training key -> {loguniform|uniform|randint: [low, high]}, {choice: [...]} or a fixed value; "
        "over configs/tune/MODE.yaml, key by key",
    )
    spaces: dict[Mode, dict[str, Any]] = Field(default_factory=dict, description="the same for one mode, over space")
    trials: int = Field(8, ge=1, description="per mode, the default configuration first")
    search: Literal["random", "grid", "optuna"] = "random"
    scheduler: Literal["asha", "none"] = Field("asha", description="none trains every trial to its end")
    grace_period: int = Field(1, ge=1, description="epochs before ASHA may let a trial wait")
    reduction_factor: int = Field(3, ge=2, description="ASHA lets the best 1/N of a rung go on")
    max_concurrent_trials: int | None = Field(None, ge=1, description="default what the resources allow")
    trial_retries: int = Field(1, ge=0, description="a failed trial is tried again this often, then reported")
    confirm_seeds: int = Field(0, ge=0, description="train each mode's best and default again on so many fresh seeds")
    test: bool = Field(False, description="rank the test users once with each mode's winner")
    engine: EngineConfig = Field(EngineConfig(), description="for test")
    keep_checkpoints: Literal["best", "all"] = Field("best", description="of finished trials; per mode")
    train: dict[str, Any] = Field(default_factory=dict, description="training keys shared by all trials")
    per_mode: dict[Mode, dict[str, Any]] = Field(default_factory=dict, description="training keys of one mode's trials")
    seed: Seed = 0
    ray: RayConfig = RayConfig()

    @field_validator("modes", mode="before")
    @classmethod
    def _modes_from_words(cls, value: Any) -> Any:
        """``all``, ``a,b`` or ``[a, b]``, each mode once."""
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            return value
        split = [name.strip() for word in words for name in word.split(",") if name.strip()]
        return tuple(dict.fromkeys(mode for name in split for mode in (MODES if name == "all" else (name,))))


class RerankConfig(Config):
    """``vlrank rerank``: candidates in, full rankings out."""

    dataset: ConfigLocation
    model: str = Field(..., description="a run folder of vlrank train, or a checkpoint folder")
    candidates: str = Field("ground_truth", description="candidates/NAME, or ground_truth: target + sampled negatives")
    split: Split = "test"
    out: ConfigLocation
    limit: int | None = Field(None, ge=1, description="only the first users")
    negatives: int = Field(19, ge=1, description="for candidates: ground_truth")
    ranking: dict[str, Any] = Field(default_factory=dict, description="overrides of the run's ranking settings")
    as_mode: Mode | None = Field(None, description="the mode of a model that vlrank did not train")
    fusion_weight: Literal["auto"] | float | None = Field(
        None, description="weight 0..1 of the retriever's scores; auto chooses it on validation users; unset: none"
    )
    fusion_users: int = Field(1000, ge=1, description="validation users that fusion_weight=auto looks at")
    prompt_workers: int | None = Field(
        None, ge=0, description="processes that make prompts; default 2 per engine on GPUs; 0: the engines do it"
    )
    shard_rows: int = Field(256, ge=1, description="users committed at once: what a crash can cost at most")
    retry_failed: bool = Field(False, description="try quarantined users again")
    seed: Seed = 0
    engine: EngineConfig = EngineConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _weight_is_a_share(self) -> RerankConfig:
        if isinstance(self.fusion_weight, float) and not 0 <= self.fusion_weight <= 1:
            raise ValueError(f"fusion_weight must be between 0 and 1 or auto, got {self.fusion_weight}")
        return self


class EvaluateConfig(Config):
    """``vlrank evaluate``: metrics with intervals and a report."""

    dataset: ConfigLocation
    rankings: tuple[ConfigLocation, ...] = Field(..., min_length=1)
    out: ConfigLocation = Field(..., description="folder for report.html and metrics.json")
    split: Split = Field("test", description="of rankings files that do not say it")
    ks: tuple[int, ...] = Field((1, 5, 10, 20, 50), min_length=1, description="cut-offs of the metrics")
    baselines: tuple[str, ...] = Field(
        ("identity", "random", "popularity", "item_knn", "als", "bm25"),
        description="rivals on the same lists; also embedding and pointwise, with a model",
    )
    embedding_model: str | None = Field(None, description="text embedding model for the embedding baseline")
    pointwise_model: str | None = Field(None, description="language model for the pointwise (yes/no) baseline")
    pointwise_mode: Mode | None = Field(None, description="what the pointwise baseline shows of items; unset: texts")
    max_history: int = Field(20, ge=1, description="recent items that bm25, embedding and pointwise look at")
    candidates: str | None = Field(None, description="candidates/NAME that were reranked; default found by content")
    protocol: Literal["auto", "ground_truth", "retrieval"] = Field("auto", description="default found by content")
    compare: tuple[str, ...] = Field((), description="two methods (names or files): their paired difference")
    bootstrap: int = Field(2000, ge=100, description="resamples for the intervals")
    runs: tuple[ConfigLocation, ...] = Field((), description="training runs whose curves the report shows")
    sweep: LocalPath | None = Field(None, description="a sweep of vlrank tune to show")
    stage_times: dict[str, float] = Field(default_factory=dict, description="stage -> seconds, shown in the report")
    sample_users: int = Field(60, ge=0, description="users to browse in the report")
    seed: Seed = 0

    @model_validator(mode="after")
    def _two_to_compare(self) -> EvaluateConfig:
        if self.compare and len(self.compare) != 2:
            raise ValueError(f"compare takes two methods, got {len(self.compare)}: {', '.join(self.compare)}")
        if min(self.ks) < 1:
            raise ValueError(f"ks must be at least 1, got {min(self.ks)}")
        return self


class DemoConfig(Config):
    """``vlrank demo``: the whole platform on an embedded shop, without a GPU."""

    out: LocalPath = Field(Path("vlrank-demo"), description="folder for everything the demo makes")
    modes: tuple[Mode, ...] = MODES
    seed: Seed = 0
    trials: int = Field(3, ge=0, description="trials of the sweep; 0 leaves it out")
    engine: Literal["auto", "vllm", "transformers"] = Field("auto", description="auto takes vLLM where it is installed")
    fresh: bool = Field(False, description="delete what an earlier demo left in the folder first")


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


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        UserError: missing, unreadable, or not a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist", "Check the path given to --config.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"config file {path} holds a {type(loaded).__name__}, expected `key: value` lines")
    return loaded


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["ranking.top_k=20", "lr=1e-4"]`` -> ``{"ranking": {"top_k": 20}, "lr": "1e-4"}``; values are read as YAML.

    Raises:
        UserError: an override without ``=`` or with an unreadable value.
    """
    result: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} is not of the form key=value", "Example: vlrank train ... lr=1e-4")
        try:
            value = yaml.safe_load(text)
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
    values = merge(merge(values, parse_overrides(overrides)), given)
    if "mode" in kind.model_fields and defaults is None and isinstance(values.get("mode"), str):
        values = merge(mode_defaults(values["mode"]), values)
    return validate(kind, values)


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
    return f"config key `{key}`: {message[0].lower()}{message[1:]}, got {value!r}" if key else message


def _keys(kind: type[Config], prefix: str = "") -> list[str]:
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys

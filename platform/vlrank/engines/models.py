"""Which model a folder holds: run folders, checkpoints, adapters, plain models, hub names."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlrank.config import Mode, RankingConfig
from vlrank.data.tables import read_json
from vlrank.engines.families import check_architecture
from vlrank.errors import UserError
from vlrank.prompting.modes import Family, mode_spec
from vlrank.storage import BucketPath, Location, fetch_model, location

_LIKE_A_FOLDER = (".", "~", "runs/")  # the hub has no such names


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model as engines load it.

    Attributes:
        path: Folder (or Hugging Face name) with the weights, or with the adapter.
        base: The base model of an adapter; equal to ``path`` where there is none.
        mode: What it was trained for; None for a plain base model.
        ranking: The prompts that it was trained on; defaults for a plain base model.
        family: ``vision`` or ``text``.
        details: The rest of ``vlrank.json``.
        revision: Branch, tag or commit of a model on the hub.
    """

    path: str
    base: str
    mode: Mode | None
    ranking: RankingConfig
    family: Family
    details: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None

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
        UserError: nothing usable there, or a model that the mode is not for.
    """
    place = model_place(model)
    if place is None:
        spec = mode_spec(mode) if mode else None
        if spec is not None and (config := known_config(str(model))):
            check_architecture(config, str(model), spec)
        return ModelFolder(
            str(model), str(model), spec.name if spec else None, RankingConfig(), spec.family if spec else "text"
        )
    path = best_checkpoint(place)
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
    if name is not None and trained_for is None and (config := known_config(base)):
        check_architecture(config, base, mode_spec(name))
    return ModelFolder(
        str(path), base, mode_spec(name).name if name else None, ranking, _family(base, details), details
    )


def model_place(model: str | Location) -> Location | None:
    """The folder that is meant by a model's name; None where only the hub can have it.

    Raises:
        UserError: there is no such folder, and the hub has no such names.
    """
    path = location(model)
    if isinstance(path, Path):
        path = Path(os.path.expanduser(path))  # pathlib's raises where there is no such user
    if path.is_dir():
        return path
    name = str(model)
    if path.is_file():
        raise UserError(f"model {name} is a file, not a folder", _MODELS)
    like_a_folder = isinstance(path, BucketPath) or path.is_absolute() or name.startswith(_LIKE_A_FOLDER)
    if like_a_folder or (name.count("/") != 1 and known_config(name) is None):  # a few old names have no owner
        raise UserError(f"model folder {name} does not exist", _MODELS)
    return None


_MODELS = (
    "Give a model folder, a run folder of `vlrank train`, or a Hugging Face name with its owner, like "
    "Qwen/Qwen3-VL-2B-Instruct."
)


def unknown_mode(model: ModelFolder, remedy: str) -> UserError:
    """For a model that does not say what it was trained for, where that is needed; ``remedy`` begins in lower case."""
    if not location(model.path).is_dir():  # more often a wrong path than a model on the hub
        return UserError(
            f"model folder {model.path} does not exist",
            f"Check the path. If it is a model on the hub, its mode is unknown: {remedy}",
        )
    return UserError(f"{model.path} has no vlrank.json, so its mode is unknown", remedy[0].upper() + remedy[1:])


def best_checkpoint(path: Location) -> Location:
    """The best checkpoint of a run folder, or of the best run of a sweep of one mode; any other folder itself.

    Raises:
        UserError: a run without a first evaluation, one whose checkpoint is gone, or a sweep of several modes.
    """
    best = path / "best.json"
    if not best.is_file():
        if (path / "config.yaml").is_file():
            raise UserError(
                f"run {path} has no best.json: its training has not reached a first evaluation",
                "Continue it: run the same `vlrank train` again.",
            )
        return path
    found = read_json(best)
    if (path / "trials.jsonl").is_file():
        runs = {mode: path / "runs" / winner["trial_id"] for mode, winner in found.items()}
        if len(runs) != 1:
            listed = ", ".join(f"{run} ({mode})" for mode, run in runs.items())
            raise UserError(f"{path} is a sweep of {len(runs)} modes", f"Give the run folder of one: {listed}.")
        return best_checkpoint(next(iter(runs.values())))
    checkpoint = path / str(found.get("checkpoint"))
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


def model_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """``config.json`` of a model folder, or of a model on the hub.

    Raises:
        UserError: neither exists.
    """
    file = location(model) / "config.json"
    if file.is_file():
        return read_json(file)
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(model, revision=revision).to_dict()
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {model} was not found: {str(error).splitlines()[0]}",
            "Check the name and the network, or give a local folder with --model.",
        ) from None
    return config


def known_config(model: str) -> dict[str, Any] | None:
    """``config.json`` of a model folder, or of a hub model in this machine's cache; None where neither is at hand."""
    file = location(model) / "config.json"
    if file.is_file():
        return read_json(file)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return read_json(Path(cached)) if isinstance(cached, str) else None


def on_this_node(model: ModelFolder) -> ModelFolder:
    """The model in folders of this node: from a bucket it is downloaded once, into the node's cache."""
    return replace(model, path=fetch_model(model.path), base=fetch_model(model.base))

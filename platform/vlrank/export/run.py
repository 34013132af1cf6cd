"""``vlrank export``: from a run to a folder that transformers and vLLM load, with a model card."""

from __future__ import annotations

import re
import shlex
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlrank.config import ExportConfig, RerankConfig
from vlrank.console import Summary, announce, console
from vlrank.data.dataset import Dataset
from vlrank.data.tables import atomic_write_text, disk_errors, read_json
from vlrank.engines.models import ModelFolder, on_this_node, open_model, unknown_mode
from vlrank.errors import UserError
from vlrank.export.card import Facts, card
from vlrank.installation import install_command
from vlrank.reranking.plan import Setup, open_setup, users_to_rank
from vlrank.reranking.ranker import Ranking, UserLists, agreement, describe_agreement, open_ranker
from vlrank.storage import Location, location


def _hub_name(folder: str) -> str:
    """A folder's name as the hub takes it: letters, digits, ``_``, and single ``-`` and ``.`` inside."""
    name = re.sub(r"[^A-Za-z0-9_]+", lambda marks: marks[0] if marks[0] in ("-", ".") else "-", folder)
    return name.strip(".-") or "reranker"


def run(config: ExportConfig) -> Summary:
    """Export a model. The folder appears in one rename, when the sample has been ranked with it.

    Raises:
        UserError: no model of vlrank, an output in the way, unreadable metrics, or a model that cannot be merged.
    """
    # What is exported; mistakes are found before a model is loaded.
    model = open_model(config.run)
    if model.mode is None:
        raise unknown_mode(model, "give a run of `vlrank train`.")
    if config.quantization and model.is_adapter and not config.merge:
        raise UserError("an adapter has no weights of its own to quantise", "Leave --no_merge out.")
    if config.quantization and find_spec("compressed_tensors") is None:
        raise UserError("quantization needs the package compressed-tensors", install_command("compressed-tensors"))
    if config.out.exists() and any(config.out.iterdir()):
        raise UserError(f"{config.out} exists and is not empty", "Choose another --out.")
    if model.is_adapter and not config.merge and location(model.base).is_dir():
        announce("Note:", f"the adapter names its base model {model.base}, which others do not have", "yellow")
    metrics = _metrics(config.evaluation)
    settings, result = _of_run(location(model.path))
    dataset = _dataset(config, settings)
    setup = _sample_setup(config, dataset) if dataset is not None and config.sample else None

    # The files, then the same prompts through the run's model and through them.
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{config.out.name}-", dir=config.out.parent) as parent:
        draft = Path(parent) / config.out.name
        draft.mkdir()
        from vlrank.export.weights import write_model  # imports torch

        console.print(f"writing {model.path} to {config.out}")
        here = on_this_node(model)
        with disk_errors(config.out):
            write_model(here, draft, merge=config.merge, quantization=config.quantization, dtype=config.dtype)
        agreed = _agreement(config, setup, draft) if setup else {}
        facts = Facts(
            model=model,
            name=config.out.name,
            merged=config.merge and model.is_adapter,
            quantization=config.quantization,
            settings=settings,
            result=result,
            dataset=dataset,
            metrics=metrics,
            agreed=agreed,
        )
        atomic_write_text(draft / "README.md", card(facts))
        draft.replace(config.out)
    size = sum(file.stat().st_size for file in config.out.iterdir())
    compared = f"{agreed['compared']} users: {describe_agreement(agreed)}" if agreed.get("compared") else _NOT_COMPARED
    lines: dict[str, object] = {
        "model": f"{model.path} ({model.mode})",
        "weights": _weights(config, model),
        "size": f"{size / 1e6:,.1f} MB",
        "agreement with the run": compared,
        "metrics in the card": str(config.evaluation) if metrics else "none (--evaluation REPORT)",
        "to publish": "the command below, with your name on the hub for USER",
    }
    upload = f"hf upload USER/{_hub_name(config.out.name)} {shlex.quote(str(config.out))}"
    return Summary(f"export: {config.run}", lines, config.out, agreed, next=upload)


_NOT_COMPARED = "not measured: no sample (--dataset names one)"


def _weights(config: ExportConfig, model: ModelFolder) -> str:
    whole = f"adapter merged into {model.base}" if model.is_adapter else "all weights"
    if model.is_adapter and not config.merge:
        return f"adapter of {model.base}"
    return whole + (f", {config.quantization}" if config.quantization else "")


def _metrics(evaluation: Location | None) -> dict[str, Any]:
    if evaluation is None:
        return {}
    file = evaluation / "metrics.json"
    if not file.is_file():
        raise UserError(f"{evaluation} has no metrics.json", "Give the report folder of `vlrank evaluate`.")
    found = read_json(file)
    if not found.get("groups"):
        raise UserError(f"{file} holds no metrics of `vlrank evaluate`", "Give the report folder of `vlrank evaluate`.")
    return found


def _of_run(checkpoint: Location) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and result of the run that a checkpoint belongs to; empty for a checkpoint alone."""
    import yaml

    folder = checkpoint.parent.parent
    if not (folder / "config.yaml").is_file() or not (folder / "best.json").is_file():
        return {}, {}
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    best = read_json(folder / "best.json")
    return settings, (read_json(folder / "result.json") if (folder / "result.json").is_file() else {}) | {"best": best}


def _dataset(config: ExportConfig, settings: dict[str, Any]) -> Dataset | None:
    """The dataset of the card and of the sample; None where the run's own is not here."""
    if config.dataset is not None:
        return Dataset.open(config.dataset)
    place = settings.get("dataset")
    if place is None:
        return None
    try:
        return Dataset.open(place)
    except UserError as error:
        announce("Note:", f"{error.problem}; the card says nothing about it, and no rankings are compared", "yellow")
        return None


def _sample_setup(config: ExportConfig, dataset: Dataset) -> Setup:
    return open_setup(
        RerankConfig(
            dataset=dataset.path, model=config.run, split="val", out=config.out / "sample.parquet", engine=config.engine
        )
    )


def _agreement(config: ExportConfig, setup: Setup, exported: Path) -> dict[str, int]:
    """`agreement` of the exported model's rankings with the run's, on validation users with sampled candidates."""
    wanted = users_to_rank(setup, "val", config.sample).wanted
    users = [UserLists(row["history"], row["candidates"], seed=row["user_id"]) for row in wanted.to_dicts()]

    def ranked(folder: ModelFolder) -> list[Ranking | Exception]:
        ranker = open_ranker(replace(folder, ranking=setup.folder.ranking), config.engine, setup.meta)
        try:
            return ranker.rank(users)
        finally:
            ranker.engine.close()

    console.print(f"ranking for {len(users)} validation users with the run and with what was written")
    before, after = ranked(setup.folder), ranked(open_model(exported))
    failed = next((outcome for outcome in after if isinstance(outcome, Exception)), None)
    if failed is not None and not any(isinstance(outcome, Exception) for outcome in before):
        raise UserError(f"what was written cannot rank: {type(failed).__name__}: {failed}", "Leave --quantization out.")
    return agreement(zip(after, before, strict=True))

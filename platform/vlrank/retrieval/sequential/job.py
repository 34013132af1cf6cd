"""A sequential retriever as one Ray Train worker, and what the user sees of it.

A dataset keeps each retriever in ``retrievers/NAME``: ``state.safetensors`` while it is trained, ``model.safetensors``
(the best weights) when it is done. The same settings on the same data go on from the last epoch, or only list again;
anything else starts from the first epoch.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from vlrank.config import RetrieveConfig, Split
from vlrank.console import progress
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Lists
from vlrank.data.tables import atomic_write_text, disk_errors, read_json_lines
from vlrank.errors import UserError
from vlrank.ray_train import fit_trainer, followed, preload_for, ray_storage, with_failure_policy
from vlrank.retrieval.sequential.data import SequenceData, Task, samples
from vlrank.runtime import cluster_resources, ray_session
from vlrank.storage import BucketPath, Location, exclusive, location, remove_tree

_HISTORY = "history.jsonl"
_MAX_FAILURES = 2


def retrieve(dataset: Dataset, config: RetrieveConfig, name: str) -> tuple[dict[Split, Lists], dict[str, object]]:
    """Train a retriever, or take the one that is there, and list the best items of each user.

    Returns:
        The lists of each split, and facts for the summary.

    Raises:
        UserError: data that shows no order, or resources that the cluster lacks.
    """
    data, task = SequenceData.of(dataset, config.method), Task.of(config, dataset)
    folder = (dataset.path / "retrievers" / name).resolve()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder), ray_session(config.ray, preload=preload_for(1)):
        outcome = _run_worker(config, task, data, folder)
    history, trained = outcome["history"], outcome["trained"]
    best = max(history, key=lambda line: (line["ndcg"], -line["epoch"]))
    lines: dict[str, object] = {
        "method": config.method,
        "trained": (f"{trained} epochs, " if trained else "before, with these settings on these data: ")
        + f"best validation NDCG@10 {best['ndcg']:.4f} in epoch {best['epoch']} of {len(history)}",
        "seconds": f"{sum(line['seconds'] for line in history):.0f} for all epochs, on {outcome['device']}",
    }
    if cold := _cold(data):
        lines["cold items"] = cold
    return outcome["lists"], lines


def plan(dataset: Dataset, config: RetrieveConfig) -> dict[str, object]:
    """What `retrieve` would train, for a dry run."""
    data, task = SequenceData.of(dataset, config.method), Task.of(config, dataset)
    settings, count = task.settings, len(samples(data.train, task.settings)[0])
    weights = (dataset.n_items + settings.max_length) * settings.hidden + settings.layers * 12 * settings.hidden**2
    softmax = f"{settings.negatives:,} drawn items, logQ-corrected" if settings.negatives else "all items"
    lines: dict[str, object] = {
        "samples per epoch": count,
        "steps per epoch": -(-count // settings.batch_size),
        "epochs": f"at most {settings.epochs}, {settings.patience} without a gain",
        "softmax over": softmax,
        "parameters": f"about {weights:,}",
    }
    return lines | ({"cold items": cold} if (cold := _cold(data)) else {})


def _cold(data: SequenceData) -> str:
    cold = int((data.popularity[1:] == 0).sum())
    targets = f"{data.cold_targets('val'):,} validation and {data.cold_targets('test'):,} test targets"
    return f"{cold:,} without a training interaction are never listed ({targets})" if cold else ""


def _run_worker(config: RetrieveConfig, task: Task, data: SequenceData, folder: Location) -> dict[str, Any]:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    have = cluster_resources()
    gpus = task.settings.gpus if task.settings.gpus is not None else min(1.0, have.get("GPU", 0.0))
    for key, kind, needed in (("cpus", "CPU", task.settings.cpus), ("gpus", "GPU", gpus)):
        if needed > have.get(kind, 0):
            raise UserError(f"sequential.{key} is {needed:g}, the cluster has {have.get(kind, 0):g}", f"Lower {key}.")
    remove_tree(folder / "ray")  # of a run that was killed
    trainer = with_failure_policy(DataParallelTrainer, lambda: len(read_json_lines(folder / _HISTORY)))(
        train_and_list,
        train_loop_config={
            "task": ray.put(replace(task, settings=task.settings.model_copy(update={"gpus": gpus}))),
            "data": ray.put(data),
            "folder": str(folder),
            "top_k": config.top_k,
        },
        scaling_config=ScalingConfig(
            num_workers=1,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": task.settings.cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name="ray", **ray_storage(folder), failure_config=FailureConfig(max_failures=_MAX_FAILURES)
        ),
    )
    (folder / _HISTORY).unlink(missing_ok=True)
    try:
        with _watch(task, folder):
            outcome: dict[str, Any] = fit_trainer(trainer).return_value
    finally:
        with suppress(OSError):
            remove_tree(folder / "ray")
    (folder / _HISTORY).unlink(missing_ok=True)
    return outcome


@contextmanager
def _watch(task: Task, folder: Location) -> Iterator[None]:
    """Show the epochs while the block runs."""
    shown = 0
    with progress(f"train {task.method}", total=task.settings.epochs) as bar:

        def look(finished: bool) -> None:
            nonlocal shown
            history: list[dict[str, Any]] = []
            with suppress(OSError, UserError):
                history = read_json_lines(folder / _HISTORY)
            for line in history[shown:]:
                bar.advance(1, note=f"loss {line['loss']:.3f}, val NDCG@10 {line['ndcg']:.4f}")
            shown = max(shown, len(history))

        with followed(look, 5.0 if isinstance(folder, BucketPath) else 0.3):
            yield


def train_and_list(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker does: train, unless the trained model is there, and list.

    Args:
        settings: References to the `Task` (``task``) and the `SequenceData` (``data``), ``folder`` and ``top_k``.

    Returns:
        ``lists`` by split, ``history``, ``trained`` (epochs of this run) and ``device``.
    """
    import ray
    import ray.train.torch
    import torch

    from vlrank.cuda_graphs import CudaGraphs
    from vlrank.retrieval.sequential.training import Training, read_tensors, write_tensors

    task, data, folder = ray.get(settings["task"]), ray.get(settings["data"]), location(settings["folder"])
    device = ray.train.torch.get_device()
    torch.set_num_threads(task.settings.cpus)
    try:
        recordable = device.type == "cuda" and task.settings.samples == "prefixes"
        training = Training(task, data, folder, device, CudaGraphs() if recordable else None)
        before = len(training.history)

        def show(history: list[dict[str, Any]]) -> None:
            atomic_write_text(folder / _HISTORY, "".join(json.dumps(line) + "\n" for line in history))

        weights, history = read_tensors(folder / "model.safetensors", task)
        if weights:
            training.model.load_state_dict(weights)
            before = len(history)
            show(history)
        else:
            show(training.history)
            training.run(show)
            history = training.history
            write_tensors(folder / "model.safetensors", training.model.state_dict(), task, history)
        (folder / "state.safetensors").unlink(missing_ok=True)
        lists = {
            split: training.ranker.top(histories, settings["top_k"]) for split, histories in data.histories.items()
        }
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{task.method}: the memory of {device} is full",
            "Lower sequential.batch_size or sequential.hidden, or have the softmax over fewer items: "
            "sequential.negatives=4096.",
        ) from error
    except Exception as error:
        error.add_note(traceback.format_exc())  # for `ray_train.worker_error`: exceptions travel without a traceback
        raise
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{task.settings.cpus} CPU cores"
    return {"lists": lists, "history": history, "trained": len(history) - before, "device": name}

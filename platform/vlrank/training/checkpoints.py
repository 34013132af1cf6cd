"""Whole and torn checkpoints, and those that a crash has left unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlrank.data.tables import atomic_write_json, file_size, read_json
from vlrank.errors import UserError
from vlrank.storage import BucketPath, Location, listing, remove_tree
from vlrank.training.history import read_history, write_history
from vlrank.training.selection import best_evaluation

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints of a run; names of folders beside it."""
_FORMER = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth")


def torn_file(folder: Location) -> Location | None:
    """The first file of a checkpoint that was cut off, or the folder if it is empty; None if all is whole.

    Of a safetensors file the head is read, which says where each tensor ends (8 bytes of length, then JSON): reading
    all of a checkpoint, and from a bucket at that, is not needed.
    """
    files = [file for file in listing(folder, "*") if not file.is_dir()]
    return next((file for file in files if not whole_file(file)), None if files else folder)


def whole_file(file: Location) -> bool:
    """Whether a safetensors or JSON file has its end; true for any other."""
    if file.suffix == ".safetensors":
        size = file_size(file)
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if not 0 < length <= size - 8:
                return False
            tensors = json.loads(content.read(length))
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        return bool(size == 8 + length + max(ends, default=0))
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return False
    return True


def mend_run(out: Location, home: Location) -> dict[str, str]:
    """Have the history of a run and Ray Train's list of its checkpoints name what is there and whole.

    Evaluations are dropped from the newest on until the checkpoint of the newest and that of the best are whole; the
    run makes them again. So it does with what Ray Train has listed and a killed driver has not recorded.

    Args:
        out: The run folder.
        home: The folder of its checkpoints and of `SNAPSHOT`.

    Returns:
        Name of a torn checkpoint -> its torn file. On a disk a torn folder is now called ``torn-NAME``; in a bucket it
        is gone.

    Raises:
        UserError: the checkpoints hold pickled optimizer states of a former format.
    """
    snapshot = home / SNAPSHOT
    if not snapshot.is_file():
        return {}
    state = read_json(snapshot)
    listed = {result["checkpoint_dir_name"]: result["metrics"]["step"] for result in state["checkpoint_results"]}
    former = next((name for name in listed for file in _FORMER if (home / name / file).is_file()), None)
    if former is not None:
        raise UserError(
            f"{home / former} holds the optimizer's state in a former format, which is not read any more",
            f"Finish {out} with the version that began it, or set resume=never to train again.",
        )
    history = before = read_history(out)
    torn: dict[str, str] = {}
    while history:
        names = {Path(line["checkpoint"]).name for line in (history[-1], best_evaluation(history))}
        torn |= {name: file.name for name in names & listed.keys() if (file := torn_file(home / name))}
        if names <= listed.keys() - torn.keys():
            break
        history = history[:-1]
    committed = history[-1]["step"] if history else 0
    dropped = [name for name, step in listed.items() if step > committed or name in torn]
    for name in dropped:
        _forget(state, name)
    if dropped:
        atomic_write_json(snapshot, state)  # first: what Ray Train lists has to be there
    if len(history) < len(before):
        write_history(out, history)
    for name in torn:
        _put_aside(home / name)
    return torn


def _forget(state: dict[str, Any], name: str) -> None:
    """Remove a checkpoint from the list; the newest of the others becomes the latest."""
    for results, beside in (
        ("checkpoint_results", "checkpoint_report_indices"),
        ("pending_training_results", "pending_validation_specs"),
    ):
        kept = [number for number, each in enumerate(state[results]) if each["checkpoint_dir_name"] != name]
        for key in (results, beside):
            state[key] = [state[key][number] for number in kept]
    for key in state:
        if key.endswith("_checkpoint_dir_names"):
            state[key] = [each for each in state[key] if each != name]
    newest = max(state["checkpoint_results"], key=lambda result: result["metrics"]["step"], default=None)
    state["latest_checkpoint_result"] = newest


def _put_aside(folder: Location) -> None:
    if isinstance(folder, BucketPath):
        remove_tree(folder)
        return
    aside = folder.with_name(f"torn-{folder.name}")
    remove_tree(aside)
    if folder.exists():
        folder.rename(aside)


def remove_orphans(home: Location) -> list[str]:
    """Delete checkpoint folders that Ray Train does not know because a crash interrupted their report.

    Returns:
        Names of the deleted folders.
    """
    snapshot = home / SNAPSHOT
    known: set[str] = set()
    if snapshot.is_file():
        state = read_json(snapshot)
        known = {result["checkpoint_dir_name"] for result in state["checkpoint_results"]}
    orphans = [folder for folder in listing(home, "checkpoint-*") if folder.name not in known and folder.is_dir()]
    for folder in orphans:
        remove_tree(folder)
    return [folder.name for folder in orphans]

"""Whole and torn checkpoints: a run goes on from the newest one that can be read."""

from __future__ import annotations

import json
import zipfile
from typing import Any

from vlrank.data.tables import atomic_write_json, file_size, read_json
from vlrank.storage import BucketPath, Location, listing, remove_tree

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints of a run; names of folders beside it."""
_ARCHIVES = (".bin", ".pt", ".pth")


def torn_file(folder: Location) -> Location | None:
    """The first file of a checkpoint that was cut off, or the folder if it is empty; None if all is whole.

    Read are the heads of safetensors files, which say where each tensor ends (8 bytes of length, then JSON), and the
    ends of torch's zip archives: reading all of a checkpoint, and from a bucket at that, is not needed.
    """
    files = [file for file in listing(folder, "*") if not file.is_dir()]
    return next((file for file in files if not _whole(file)), None if files else folder)


def _whole(file: Location) -> bool:
    if file.suffix == ".safetensors":
        size = file_size(file)
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if not 0 < length <= size - 8:
                return False
            tensors = json.loads(content.read(length))
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        return bool(size == 8 + length + max(ends, default=0))
    if file.suffix in _ARCHIVES:
        with file.open("rb") as content:
            return zipfile.is_zipfile(content)
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return False
    return True


def set_torn_aside(home: Location) -> tuple[dict[str, str], int]:
    """Take torn checkpoints from the newest on out of Ray Train's list, until one is whole.

    Args:
        home: The folder of a run's checkpoints and of `SNAPSHOT`.

    Returns:
        Name of a torn checkpoint -> its torn file, and the step of the newest whole one, 0 without one. On a disk a
        torn folder is now called ``torn-NAME``; in a bucket it is gone.
    """
    snapshot = home / SNAPSHOT
    if not snapshot.is_file():
        return {}, 0
    state = read_json(snapshot)
    torn: dict[str, str] = {}
    while (latest := state["latest_checkpoint_result"]) is not None:
        name = latest["checkpoint_dir_name"]
        file = torn_file(home / name)
        if file is None:
            break
        torn[name] = file.name
        _forget(state, name)
    if torn:
        atomic_write_json(snapshot, state)  # first: what Ray Train lists has to be there
        for name in torn:
            _put_aside(home / name)
    return torn, latest["metrics"]["step"] if latest else 0


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

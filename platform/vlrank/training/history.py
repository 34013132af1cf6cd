"""``history.jsonl`` and ``best.json``: the evaluations of a run that are committed, and the best of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vlrank.data.tables import atomic_write_json, atomic_write_text, read_json_lines
from vlrank.storage import Location
from vlrank.training.selection import best_evaluation


def record_evaluation(folder: Location, metrics: Mapping[str, Any]) -> None:
    """Add an evaluation to a run folder; one that is repeated after a crash replaces the earlier line."""
    history = [line for line in read_history(folder) if line["step"] < metrics["step"]]
    history.append({**metrics, "time": time.time()})
    write_history(folder, history)


def write_history(folder: Location, history: Sequence[Mapping[str, Any]]) -> None:
    """Replace the evaluations of a run, oldest first, and name the best one."""
    atomic_write_text(folder / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    if history:
        best = best_evaluation(history)
        facts = {key: best[key] for key in ("checkpoint", "metric", "value", "epoch", "step")}
        atomic_write_json(folder / "best.json", facts)
    else:
        (folder / "best.json").unlink(missing_ok=True)


def read_history(folder: Location) -> list[dict[str, Any]]:
    """The evaluations of a run, oldest first."""
    return read_json_lines(folder / "history.jsonl")


def committed_step(folder: Location) -> int:
    """The step of the newest evaluation; 0 without one."""
    history = read_history(folder)
    return int(history[-1]["step"]) if history else 0

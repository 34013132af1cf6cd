"""The state of a sweep, in one plain file: ``SWEEP/trials.jsonl``, a line per trial with its whole learning curve.

The file is rewritten, whole or not at all, at every event. It alone decides what a killed sweep still has to do. Ray
Tune's pickled state is not used: it is saved every ten seconds at most and does not contain ASHA's rungs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from vlrank.data.tables import atomic_write_text
from vlrank.errors import UserError
from vlrank.tuning.space import Point

Status = Literal["pending", "running", "paused", "completed", "stopped", "failed"]
FINISHED: tuple[Status, ...] = ("completed", "stopped", "failed")


@dataclass(slots=True)
class Trial:
    """One configuration of one mode.

    Attributes:
        mode: Mode.
        trial_id: ``MODE-000`` is the mode's default configuration; also the name of the run folder.
        config: The searched training keys.
        metric: The metric of `epochs` and `value`, e.g. ``recall@10``; higher is better.
        users: Validation users behind the metric; 0 where unknown.
        status: ``paused``: at one of ASHA's rungs; ``stopped``: still paused when the sweep ended; ``completed``:
            trained to its own end.
        stop_reason: Why the trial ended or paused, in words.
        epochs: One entry per evaluation: ``{"epoch": 1, "metric": 0.31, "step": 40, "seconds": 12.0}``.
        seconds: Wall-clock seconds spent, all attempts together.
        gpus: GPUs the trial held.
        attempts: The number of starts.
        passed: The last rung (epoch) that the trial passed.
    """

    mode: str
    trial_id: str
    config: Point
    metric: str
    users: int = 0
    status: Status = "pending"
    stop_reason: str | None = None
    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    gpus: float = 0.0
    attempts: int = 0
    passed: int = 0

    @property
    def finished(self) -> bool:
        """Whether the trial will not run again in this sweep."""
        return self.status in FINISHED

    @property
    def best(self) -> dict[str, float] | None:
        """The entry of `epochs` with the highest metric, the earliest among equals."""
        return max(self.epochs, key=lambda entry: (entry["metric"], -_when(entry)), default=None)

    @property
    def value(self) -> float:
        """Best metric so far; -inf before the first evaluation."""
        return self.best["metric"] if self.best else -math.inf

    @property
    def epochs_run(self) -> float:
        """The last epoch that was evaluated."""
        return max((entry["epoch"] for entry in self.epochs), default=0)

    def record(self, epoch: float, metric: float, **more: float) -> None:
        """Add an evaluation; one that is repeated after a resume replaces its first copy.

        ``step`` identifies an evaluation where there is one, as an epoch may have several.
        """
        entry = {"epoch": epoch, "metric": metric, **more}
        for old in self.epochs:
            if _when(old) == _when(entry) and "seconds" in old:
                entry["seconds"] = old["seconds"]  # a repeated report must not change the time
        self.epochs = sorted([old for old in self.epochs if _when(old) != _when(entry)] + [entry], key=_when)


def _when(entry: dict[str, float]) -> float:
    return entry.get("step", entry["epoch"])


class Sweep:
    """All trials of a sweep, in their order, and their file.

    Args:
        path: ``SWEEP/trials.jsonl``; read if it exists.

    Raises:
        UserError: the file is not what a sweep wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: dict[str, Trial] = {}
        if path.exists():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    trial = Trial(**json.loads(line))
                except (ValueError, TypeError) as error:
                    remedy = "Restore the file, or choose another --out."
                    raise UserError(f"{path} line {number} is not a trial: {error}", remedy) from None
                self.trials[trial.trial_id] = trial

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials.values())

    def add(self, trial: Trial) -> Trial:
        """Add a trial unless it is known; returns the known one."""
        return self.trials.setdefault(trial.trial_id, trial)

    def of(self, mode: str) -> list[Trial]:
        """The mode's trials, the default first."""
        return [trial for trial in self if trial.mode == mode]

    def unfinished(self) -> list[Trial]:
        """Trials that have not ended: interrupted ones first, then one of each mode in turn."""
        position = {trial.trial_id: self.of(trial.mode).index(trial) for trial in self}
        waiting = [trial for trial in self if not trial.finished]
        return sorted(waiting, key=lambda trial: (trial.status != "running", position[trial.trial_id]))

    def best_of(self, mode: str) -> Trial | None:
        """The mode's winner: among trials that ran to their own end where there are any, the earliest among equals.

        A trial that ASHA stopped is no candidate beside completed ones: its best value came early in a schedule that
        was cut off, and training that config to its end would be another run.
        """
        tried = [trial for trial in self.of(mode) if trial.epochs and trial.status != "failed"]
        completed = [trial for trial in tried if trial.status == "completed"]
        return max(completed or tried, key=lambda trial: trial.value, default=None)

    def save(self) -> None:
        """Write the file."""
        atomic_write_text(self.path, "".join(json.dumps(asdict(trial)) + "\n" for trial in self))


def interval(trial: Trial, z: float = 1.96) -> tuple[float, float] | None:
    """95% interval of the trial's best value over validation users: Wilson's score interval (1927).

    Recall is a proportion. NDCG and MRR of a user are between 0 and 1 too, so their variance is at most that of a
    proportion with the same mean (Bhatia and Davis 2000), and their interval is a little too wide. None before the
    first evaluation, or where the number of users is unknown.
    """
    if trial.best is None or not trial.users:
        return None
    value, n = trial.value, trial.users
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def drop_checkpoints(sweep: Sweep, mode: str, runs: Path, *, keep_best: bool) -> None:
    """Delete the checkpoints of the mode's finished trials, except the winner's if ``keep_best``; curves stay.

    Failed trials keep theirs: the next run of the sweep continues from them.
    """
    best = sweep.best_of(mode) if keep_best else None
    for trial in sweep.of(mode):
        folder = runs / trial.trial_id
        if trial is best or trial.status not in ("completed", "stopped") or not folder.is_dir():
            continue
        for child in folder.iterdir():
            if child.is_dir():
                # A worker that is just being killed may still write there; the end of the sweep deletes once more.
                shutil.rmtree(child, ignore_errors=True)
        (folder / "best.json").unlink(missing_ok=True)

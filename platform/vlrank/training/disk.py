"""How much a run writes, how much it keeps, and whether the disk has room for that."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlrank.config import TrainConfig
from vlrank.engines.resources import GIB
from vlrank.errors import UserError
from vlrank.training.memory import Work
from vlrank.training.model import FOLDERS, Base, weight_dtype
from vlrank.training.state import FOLDER

_GB = 1e9


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What a run puts on a disk.

    Attributes:
        checkpoint: Bytes of a kept checkpoint: the model's weights, or the adapter's.
        state: Bytes of the state to resume from, over all ranks; the weights of frozen layers are not in it.
        checkpoints: Written, at most one per evaluation.
        kept: Checkpoints that are there at the end: `save_total_limit` and the last one.
        states: Of `state`'s size that are there at once; none after the last evaluation.
        minutes: Between two states; 0 where each evaluation saves one.
    """

    checkpoint: float
    state: float
    checkpoints: int
    kept: int
    states: int
    minutes: float | Literal["never"]

    @property
    def peak(self) -> float:
        """Bytes while the run goes on: the kept checkpoints, one that is being written, and the states."""
        return min(self.kept + 1, self.checkpoints) * self.checkpoint + self.states * self.state

    def __str__(self) -> str:
        state = ""
        if self.states:
            often = f"at most every {self.minutes:g} minutes" if self.minutes else "after every evaluation"
            state = f"; to resume from, {_size(self.state)} {often}, gone at the end"
        return (
            f"writes up to {self.checkpoints} checkpoints of {_size(self.checkpoint)} "
            f"({_size(self.checkpoints * self.checkpoint)}) and keeps {self.kept}{state}; needs up to "
            f"{_size(self.peak)} at once"
        )


def _size(number: float) -> str:
    """
    >>> _size(4.26e9), _size(20e6)
    ('4.3 GB', '20 MB')
    """
    return f"{number / _GB:.1f} GB" if number >= _GB else f"{number / 1e6:.0f} MB"


def disk_plan(config: TrainConfig, base: Base, *, weights: float, trained: float, steps: int) -> DiskPlan:
    """The plan of a run.

    Args:
        config: With ``dtype`` decided, and ``optim`` where a GPU's memory decides it.
        base: The base model.
        weights, trained: How many weights the model has, and how many of them (or of its adapter) are trained.
        steps: Optimizer steps of the whole run.
    """
    item = weight_dtype(config, base).itemsize
    kept = 2 if config.parallel == "fsdp2" and config.dtype == "bfloat16" else item
    # Weights or their masters, and two moments.
    a_weight = item + 2.05 if "8bit" in config.optim else 3 * item if config.optim == "adamw_bf16" else 12
    state = trained * a_weight
    per_epoch = steps // config.epochs
    evaluations = max(1, steps // config.eval_steps if config.eval_steps else steps // max(1, per_epoch))
    minutes = config.resume_minutes if state > GIB else 0
    return DiskPlan(
        checkpoint=kept * (weights if base.method == "full" else trained),
        state=state,
        checkpoints=evaluations,
        kept=min(config.save_total_limit + 1, evaluations),
        states=0 if minutes == "never" else min(2, evaluations - 1),
        minutes=minutes,
    )


def foreseen_plan(config: TrainConfig, base: Base, work: Work, steps: int) -> DiskPlan:
    """The plan of a run whose model is not loaded; ``work`` is from `foreseen_work`."""
    trained = work.shape.trained
    # Of a fully trained model all weights have the type in which the work was foreseen.
    weights = work.shape.weight_bytes / (work.shape.trained_bytes / max(1, trained) or 1)
    return disk_plan(config, base, weights=weights, trained=trained, steps=steps)


def check_disk(config: TrainConfig, base: Base, model: Any, steps: int) -> None:
    """Refuse a run that would fill its disk; nothing is known of a bucket.

    Args:
        config: As it is used.
        base: The base model.
        model: Loaded and adapted.
        steps: Optimizer steps of the whole run.

    Raises:
        UserError: it would.
    """
    if not isinstance(config.out, Path):
        return
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    trained = sum(number for number, learns in sizes if learns)
    plan = disk_plan(config, base, weights=sum(number for number, _ in sizes), trained=trained, steps=steps)
    own = [config.out / FOLDERS[base.family], config.out / FOLDER]  # of a run that goes on
    there = sum(file.stat().st_size for folder in own for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(config.out).free
    if plan.peak > free + there:
        raise UserError(
            f"{config.out} is on a disk with {_size(free)} free, and this run {plan}",
            "Free some space, choose an --out on another disk, lower save_total_limit, train with method: lora, or set "
            "resume_minutes=never (a killed run then trains again).",
        )

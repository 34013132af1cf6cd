"""What a trial takes of a cluster, and how many trials run side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlrank.config import TrainConfig
from vlrank.errors import UserError


@dataclass(frozen=True, slots=True)
class TrialResources:
    """GPUs and CPUs that one trial holds while it runs, all its workers together."""

    gpus: float
    cpus: float

    def __str__(self) -> str:
        return f"{self.gpus:g} GPU, {self.cpus:g} CPU each" if self.gpus else f"{self.cpus:g} CPU each"


def trial_resources(base: TrainConfig, cluster: Mapping[str, float]) -> TrialResources:
    """GPUs and CPUs of a trial's workers on that cluster.

    Raises:
        UserError: several workers sharing one GPU, which NCCL does not support.
    """
    from vlrank.training.run import gpus_per_worker

    per_worker = gpus_per_worker(base, cluster.get("GPU", 0))
    if 0 < per_worker < 1 and base.workers > 1:
        raise UserError(
            f"{base.workers} workers with {per_worker:g} GPU each would share GPUs, which NCCL does not support",
            "Set workers to 1, or gpus_per_worker to a whole number.",
        )
    return TrialResources(base.workers * per_worker, base.workers * base.cpus_per_worker)


def concurrency(trials: Sequence[TrialResources], cluster: Mapping[str, float], *, local: bool) -> int:
    """Trials side by side: as many as fit when each is of the largest kind; at least one.

    Args:
        trials: What a trial of each mode holds.
        cluster: The cluster's resources.
        local: Ray runs on this machine alone and claims more CPUs than there are (see `vlrank.runtime`), so the
            machine's own cores count.
    """
    if any(trial.gpus for trial in trials):  # a GPU trial's CPUs are few on any GPU host: only GPUs are scarce
        fits = [cluster.get("GPU", 0) / trial.gpus for trial in trials if trial.gpus]
    else:
        cpus = float(os.cpu_count() or 1) if local else cluster.get("CPU", 1.0)
        fits = [cpus / trial.cpus for trial in trials]
    return max(1, math.floor(min(fits) + 1e-9))

"""A running sweep on a dashboard, through Ray's metrics (Prometheus names in brackets)."""

from __future__ import annotations

from typing import Any

from vlrank.tuning.trials import Sweep, Trial


class SweepGauges:
    """``vlrank_trial_metric`` (ray_vlrank_trial_metric), ``vlrank_trial_epoch`` and ``vlrank_trials`` by status."""

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        keys = ("mode", "trial")
        self._metric: Any = Gauge("vlrank_trial_metric", "Validation metric of a trial's last epoch", tag_keys=keys)
        self._epoch: Any = Gauge("vlrank_trial_epoch", "Last evaluated epoch of a trial", tag_keys=keys)
        self._trials: Any = Gauge("vlrank_trials", "Trials of the running sweep", tag_keys=("status",))

    def show(self, sweep: Sweep, trial: Trial) -> None:
        """Publish the state of a sweep after an event of one trial."""
        if trial.epochs:
            tags = {"mode": trial.mode, "trial": trial.trial_id}
            self._metric.set(trial.epochs[-1]["metric"], tags=tags)
            self._epoch.set(trial.epochs_run, tags=tags)
        for status in ("pending", "running", "paused", "completed", "stopped", "failed"):
            self._trials.set(sum(other.status == status for other in sweep), tags={"status": status})

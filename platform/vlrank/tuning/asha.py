"""Asynchronous successive halving (ASHA; Li et al. 2020), decided from a sweep's curves alone.

A trial that reaches a rung trains on if it is among the best ``1 / reduction_factor`` of all trials that have reached
the rung. Otherwise it pauses, and resumes from its checkpoint when later arrivals have put it among the best. Ray
Tune's ASHA stops trials for good instead and always lets the first arrivals at a rung pass (docs/tuning.md compares).

There is no state beside `Trial.passed`, so a sweep that was killed continues with the same decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from vlrank.tuning.trials import Sweep, Trial


def rungs(grace_period: int, reduction_factor: int, epochs: int) -> list[int]:
    """The epochs at which ASHA compares trials; the last epoch is none, as stopping there saves nothing."""
    milestones = []
    milestone = grace_period
    while milestone < epochs:
        milestones.append(milestone)
        milestone *= reduction_factor
    return milestones


def expected_epochs(trials: int, grace_period: int, reduction_factor: int, epochs: int) -> tuple[float, int]:
    """Epochs to expect in all, and trials stopped, if 1 in ``reduction_factor`` passes each rung (at least one does).

    Asynchronous runs stop fewer: a trial may pass a rung before better ones arrive.
    """
    left, total, previous = trials, 0.0, 0
    for milestone in rungs(grace_period, reduction_factor, epochs):
        total += left * (milestone - previous)
        left = max(1, left // reduction_factor)
        previous = milestone
    return total + left * (epochs - previous), trials - left


class Asha:
    """Decides which trials train on; each mode has its own rungs.

    Args:
        sweep: The trials.
        longest: Per mode, the epochs of its longest trial.
        epochs: The number of epochs that a trial is to train.
        grace_period: The first rung, in epochs.
        reduction_factor: One in so many trials passes a rung.
    """

    def __init__(
        self,
        sweep: Sweep,
        longest: Mapping[str, int],
        epochs: Callable[[Trial], int],
        grace_period: int,
        reduction_factor: int,
    ) -> None:
        self._sweep, self._epochs, self._factor = sweep, epochs, reduction_factor
        self._rungs = {mode: rungs(grace_period, reduction_factor, last) for mode, last in longest.items()}

    @property
    def most_rungs(self) -> int:
        """Rungs of the mode that has the most: how often a trial may pause."""
        return max(len(own) for own in self._rungs.values())

    def trains_on(self, trial: Trial) -> bool:
        """Whether a trial that has just been evaluated trains on; if not, it pauses."""
        rung = self._highest_rung(trial)
        if rung <= trial.passed or trial.epochs_run >= self._epochs(trial):
            return True
        if trial in self._best_at(trial.mode, rung):
            trial.passed = rung
            return True
        return False

    def promote(self, running: Collection[str] = ()) -> Trial | None:
        """The paused trial that may resume, from the highest rung that has one; marks the rung as passed.

        Args:
            running: Ids of trials that are already starting, whatever their status says.
        """
        paused = [trial for trial in self._sweep if trial.status == "paused" and trial.trial_id not in running]
        for trial in paused:
            if trial.passed >= self._highest_rung(trial):  # promoted by a run that was killed before the trial started
                return trial
        for trial in sorted(paused, key=self._highest_rung, reverse=True):
            rung = self._highest_rung(trial)
            if trial in self._best_at(trial.mode, rung):
                trial.passed = rung
                return trial
        return None

    def _highest_rung(self, trial: Trial) -> int:
        """The highest rung that the trial has reached; 0 before the first."""
        return max((rung for rung in self._rungs[trial.mode] if rung <= trial.epochs_run), default=0)

    def _best_at(self, mode: str, rung: int) -> list[Trial]:
        """The trials that may pass the rung, best first."""
        arrived = [trial for trial in self._sweep.of(mode) if trial.epochs_run >= rung and trial.status != "failed"]
        arrived.sort(key=lambda trial: -_best_value_until(trial, rung))
        quota = len(arrived) // self._factor
        # Fewer arrivals than the factor leave a quota of 0: one passes once no other trial can arrive.
        return arrived[: quota if quota or self._another_may_arrive(mode, rung) else 1]

    def _another_may_arrive(self, mode: str, rung: int) -> bool:
        for trial in self._sweep.of(mode):
            if trial.epochs_run >= rung or trial.finished or self._epochs(trial) <= rung:
                continue
            if trial.status != "paused" or trial in self._best_at(mode, self._highest_rung(trial)):
                return True
        return False


def _best_value_until(trial: Trial, rung: int) -> float:
    # Evaluations may come more often than epochs: up to the first one at or above the rung.
    first = min(entry["epoch"] for entry in trial.epochs if entry["epoch"] >= rung)
    return max(entry["metric"] for entry in trial.epochs if entry["epoch"] <= first)

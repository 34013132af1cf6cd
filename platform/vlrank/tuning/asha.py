"""Asynchronous successive halving (ASHA; Li et al. 2020), decided from a sweep's curves alone.

A trial that reaches a rung goes on if it is among the best ``1 / reduction_factor`` of all trials that have; otherwise
it waits there, and goes on from its checkpoint when later arrivals have put it among them. Ray Tune's ASHA stops trials
for good instead, and lets the first arrivals at a rung pass whatever they are: of the epochs of 16 trials on the
embedded shop it took 45% with a factor of 3, where this takes 31% (docs/tuning.md).

There is no state beside `Trial.passed`: a sweep that is killed goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from vlrank.tuning.trials import Sweep, Trial, rungs


class Halving:
    """Who goes on, mode by mode.

    Args:
        sweep: The trials.
        longest: Per mode, the epochs of its longest trial.
        epochs: How many epochs a trial is to run.
        grace_period: The first rung, in epochs.
        reduction_factor: One in so many goes on.
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

    def goes_on(self, trial: Trial) -> bool:
        """Whether a trial that has just been evaluated trains on; if not, it waits."""
        rung = self._reached(trial)
        if rung <= trial.passed or trial.epochs_run >= self._epochs(trial):
            return True
        if trial in self._best(trial.mode, rung):
            trial.passed = rung
            return True
        return False

    def promoted(self, running: Collection[str] = ()) -> Trial | None:
        """The waiting trial that may go on now, from the highest rung that has one; it counts as passed.

        Args:
            running: Ids of trials that are on their way, whatever their status says.
        """
        waiting = [trial for trial in self._sweep if trial.status == "paused" and trial.trial_id not in running]
        for trial in waiting:
            if trial.passed >= self._reached(trial):  # an earlier run was killed before it went on
                return trial
        for trial in sorted(waiting, key=self._reached, reverse=True):
            if trial in self._best(trial.mode, self._reached(trial)):
                trial.passed = self._reached(trial)
                return trial
        return None

    def _reached(self, trial: Trial) -> int:
        return max((rung for rung in self._rungs[trial.mode] if rung <= trial.epochs_run), default=0)

    def _best(self, mode: str, rung: int) -> list[Trial]:
        """The trials that may leave the rung, best first."""
        arrived = [trial for trial in self._sweep.of(mode) if trial.epochs_run >= rung and trial.status != "failed"]
        arrived.sort(key=lambda trial: -_best_until(trial, rung))
        quota = len(arrived) // self._factor
        # One in three of two trials is none of them; somebody has to win when nobody else can come.
        return arrived[: quota if quota or self._awaited(mode, rung) else 1]

    def _awaited(self, mode: str, rung: int) -> bool:
        """Whether another trial may still reach the rung."""
        for trial in self._sweep.of(mode):
            if trial.epochs_run >= rung or trial.finished or self._epochs(trial) <= rung:
                continue
            if trial.status != "paused" or trial in self._best(mode, self._reached(trial)):
                return True
        return False


def _best_until(trial: Trial, rung: int) -> float:
    # Evaluations may come more often than epochs: up to the first one at or above the rung.
    first = min(entry["epoch"] for entry in trial.epochs if entry["epoch"] >= rung)
    return max(entry["metric"] for entry in trial.epochs if entry["epoch"] <= first)

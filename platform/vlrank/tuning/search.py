"""The sweep's side of Ray Tune: which trial comes next, when one has to wait, and what is written down.

A trial of Ray Tune's is one stretch of a trial of the sweep: where ASHA lets it wait, Tune's ends, and a new one goes
on from the run folder when it may.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from vlrank.tuning.halving import Halving
from vlrank.tuning.space import Choice, Dimension, Point, RandInt, Uniform
from vlrank.tuning.trials import Sweep, Trial

Launch = Callable[[Trial], dict[str, Any]]
"""What the driver function of a trial is called with."""

_WIND_DOWN = 5.0
"""Seconds in which the workers of a trial that has to wait may end, before others go on in its folder."""


class Stateless:
    """Ray Tune pickles its searcher, scheduler and callbacks into a state that a sweep never reads: save nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class PendingTrials(Stateless, Searcher):
    """Hands Ray Tune the sweep's unfinished trials; further points come from ``suggest_point`` as results arrive.

    Args:
        sweep: The trials.
        launch: Makes the driver function's config; must contain ``trial_id``.
        suggest: Called before a trial of an adaptive search first starts; returns its point.
        halving: Says which waiting trial goes on; without it none ever waits.
    """

    def __init__(
        self,
        sweep: Sweep,
        launch: Launch,
        suggest: Callable[[Trial], Point] | None = None,
        halving: Halving | None = None,
    ) -> None:
        super().__init__()
        self._sweep, self._launch, self._suggest, self._halving = sweep, launch, suggest, halving
        self._queue = [trial.trial_id for trial in sweep.unfinished() if trial.status != "paused"]
        self._running: dict[str, str] = {}  # Tune's ids of trials -> ours
        self._ended: dict[str, float] = {}  # our ids -> when a stretch ended

    def suggest(self, trial_id: str) -> Any:
        """The next trial's config; Tune's own id is not used, as it changes from run to run."""
        recent = [name for name, ended in self._ended.items() if time.monotonic() < ended + _WIND_DOWN]
        trial = None
        if self._halving is not None:
            trial = self._halving.promoted([*self._running.values(), *recent])
        if trial is None and self._queue:
            trial = self._sweep.trials[self._queue.pop(0)]
        if trial is None:
            return None if self._running or (recent and self._halving is not None) else Searcher.FINISHED
        self._running[trial_id] = trial.trial_id
        if not trial.config and self._suggest is not None:
            trial.config = self._suggest(trial)
            self._sweep.save()
        return self._launch(trial)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Somebody else may go on now; what is written down is `Recorder`'s."""
        if (name := self._running.pop(trial_id, None)) is not None:
            self._ended[name] = time.monotonic()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's own file is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class Rungs(Stateless, FIFOScheduler):
    """Ends Ray Tune's trial where the sweep's trial has to wait.

    Args:
        sweep: The trials.
        halving: Decides.
    """

    def __init__(self, sweep: Sweep, halving: Halving) -> None:
        super().__init__()
        self._sweep, self._halving = sweep, halving

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Nothing to set."""
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """See `TrialScheduler`."""
        known = self._sweep.trials[trial.config["trial_id"]]
        # Recorded here too: Tune asks its scheduler before it tells its callbacks.
        if not _record(known, result) or self._halving.goes_on(known):
            return TrialScheduler.CONTINUE
        known.stop_reason = f"ASHA at epoch {known.epochs_run:g}"
        return TrialScheduler.STOP


def _record(known: Trial, result: dict) -> bool:
    """Add an evaluation to a trial's curve; False where the result is none."""
    if "epoch" not in result or known.metric not in result:
        return False
    more = {"step": int(result["step"])} if "step" in result else {}
    # A rung is whole epochs: an evaluation in the middle of one has not reached its end.
    known.record(
        result.get("epochs_done", result["epoch"]), float(result[known.metric]), seconds=round(known.seconds, 2), **more
    )
    return True


class Recorder(Stateless, Callback):
    """Writes every event of the sweep to its file, and tells ``on_finish`` about each finished trial.

    Args:
        sweep: The trials.
        epochs: How many a trial is to run.
        failure: Why a trial failed; Tune tells its callbacks only later.
        on_finish: Called with each trial that completed, has to wait or failed for good.
        show: Called after every event.
    """

    def __init__(
        self,
        sweep: Sweep,
        epochs: Callable[[Trial], int],
        failure: Callable[[Trial], str],
        on_finish: Callable[[Trial], None],
        show: Callable[[Sweep, Trial], None],
    ) -> None:
        self._sweep = sweep
        self._epochs = epochs
        self._failure = failure
        self._on_finish = on_finish
        self._show = show
        self._since: dict[str, float] = {}

    def _known(self, trial: Any) -> Trial:
        known = self._sweep.trials[trial.config["trial_id"]]
        now = time.time()
        known.seconds += now - self._since.get(known.trial_id, now)
        self._since[known.trial_id] = now
        return known

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """See `Callback`."""
        self._since.pop(trial.config["trial_id"], None)
        known = self._known(trial)
        known.status, known.stop_reason = "running", None
        known.attempts += 1
        self._save(known)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """See `Callback`."""
        known = self._known(trial)
        if _record(known, result):
            self._save(known)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """See `Callback`."""
        known = self._known(trial)
        if known.stop_reason:
            known.status = "paused"
        else:
            known.status = "completed"
            whole = math.ceil(known.epochs_run) >= self._epochs(known)  # the last evaluation may come a little before
            known.stop_reason = "all epochs" if whole else "no improvement (patience)"
        self._finish(known)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """See `Callback`."""
        known = self._known(trial)
        known.status = "failed"
        known.stop_reason = f"failed: {self._failure(known)}"
        self._finish(known)

    def _finish(self, known: Trial) -> None:
        self._since.pop(known.trial_id, None)
        self._save(known)
        self._on_finish(known)

    def _save(self, known: Trial) -> None:
        self._sweep.save()
        self._show(self._sweep, known)


def optuna_point(
    trial: Trial, others: list[Trial], dimensions: Mapping[str, Dimension], *, index: int, total: int, seed: int
) -> Point:
    """A point from Optuna's TPE sampler (Bergstra et al. 2011), given the mode's other trials.

    The study is rebuilt from the sweep's own records each time, so that a resumed sweep goes on as it would have.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(dimension) for key, dimension in dimensions.items()}
    # TPE models nothing in its start-up trials; its default of 10 would make a sweep of 8 a random search.
    sampler = optuna.samplers.TPESampler(seed=seed * 1009 + index, n_startup_trials=max(2, total // 3))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for other in others:
        if other.trial_id == trial.trial_id or not other.epochs:
            continue
        with suppress(ValueError):  # defaults outside the space teach the sampler nothing
            study.add_trial(
                optuna.trial.create_trial(params=other.config, distributions=distributions, value=other.value)
            )
    point = study.ask(distributions).params
    return {
        key: float(f"{value:.4g}") if isinstance(dimensions[key], Uniform) else value for key, value in point.items()
    }


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Uniform):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    if isinstance(dimension, RandInt):
        return IntDistribution(dimension.low, dimension.high)
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    raise TypeError(f"no Optuna distribution for {dimension!r}")

"""The sweep's side of Ray Tune: which trial comes next, when ASHA stops one, and what is written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from vlrank.tuning.space import Choice, Dimension, Point, RandInt, Uniform
from vlrank.tuning.trials import Sweep, Trial

Launch = Callable[[Trial], dict[str, Any]]
"""What the driver function of a trial is called with."""


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
    """

    def __init__(self, sweep: Sweep, launch: Launch, suggest: Callable[[Trial], Point] | None = None) -> None:
        super().__init__()
        self._sweep = sweep
        self._launch = launch
        self._suggest = suggest
        self._queue = [trial.trial_id for trial in sweep.unfinished()]

    def suggest(self, trial_id: str) -> Any:
        """The next trial's config; Tune's own id is not used, as it changes from run to run."""
        if not self._queue:
            return Searcher.FINISHED
        trial = self._sweep.trials[self._queue.pop(0)]
        if not trial.config and self._suggest is not None:
            trial.config = self._suggest(trial)
            self._sweep.save()
        return self._launch(trial)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Nothing: `Recorder` has it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's own file is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class AshaPerMode(Stateless, FIFOScheduler):
    """Ray's ASHA, one for each mode, so that modes are never compared with each other.

    Rungs are refilled from the curves of earlier runs of the sweep: Ray Tune does not save them, and without them a
    resumed sweep would let every trial pass again.

    Args:
        sweep: The trials; their curves up to now are replayed.
        epochs: Per mode, the longest trial.
        grace_period, reduction_factor: As in `ray.tune.schedulers.ASHAScheduler`.
    """

    def __init__(self, sweep: Sweep, epochs: Mapping[str, int], grace_period: int, reduction_factor: int) -> None:
        super().__init__()
        self._sweep = sweep
        self._asha: dict[str, ASHAScheduler] = {}
        for mode, longest in epochs.items():
            # No rung at the last epoch: a trial that has come so far shall end by itself and load its best checkpoint.
            last = max(longest - 1, grace_period)
            self._asha[mode] = ASHAScheduler(
                time_attr="epoch",
                metric="metric",
                mode="max",
                max_t=last,
                grace_period=grace_period,
                reduction_factor=reduction_factor,
                stop_last_trials=False,
            )
        for trial in sweep:
            if trial.mode in self._asha and trial.epochs:
                self._asha[trial.mode].on_trial_add(None, _key(trial))
                for entry in trial.epochs:
                    self._asha[trial.mode].on_trial_result(None, _key(trial), entry)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Set in the constructor."""
        return True

    def _known(self, trial: Any) -> tuple[ASHAScheduler, Trial]:
        known = self._sweep.trials[trial.config["trial_id"]]
        return self._asha[known.mode], known

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """See `TrialScheduler`."""
        asha, known = self._known(trial)
        asha.on_trial_add(tune_controller, _key(known))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """See `TrialScheduler`."""
        asha, known = self._known(trial)
        if "epoch" not in result or known.metric not in result:
            return TrialScheduler.CONTINUE
        values = {"epoch": result["epoch"], "metric": result[known.metric]}
        decision = asha.on_trial_result(tune_controller, _key(known), values)
        if decision == TrialScheduler.STOP:
            known.stop_reason = f"ASHA at epoch {result['epoch']:g}"
        return decision


def _key(trial: Trial) -> SimpleNamespace:
    """What ASHA reads of a trial: a stable id."""
    return SimpleNamespace(trial_id=trial.trial_id)


class Recorder(Stateless, Callback):
    """Writes every event of the sweep to its file, and tells ``on_finish`` about each finished trial.

    Args:
        sweep: The trials.
        epochs: How many a trial is to run.
        failure: Why a trial failed; Tune tells its callbacks only later.
        on_finish: Called with each trial that completed, was stopped or failed for good.
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
        if "epoch" not in result or known.metric not in result:
            return
        more = {"step": int(result["step"])} if "step" in result else {}
        known.record(result["epoch"], float(result[known.metric]), seconds=round(known.seconds, 2), **more)
        self._save(known)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """See `Callback`."""
        known = self._known(trial)
        if known.stop_reason:
            known.status = "stopped"
        else:
            known.status = "completed"
            whole = known.epochs_run >= self._epochs(known)
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

"""The sweep's side of Ray Tune: which trial starts next, when a trial pauses, and what is written down.

A trial of Ray Tune is one stretch of a trial of the sweep: where ASHA pauses the sweep's trial, Ray Tune's ends, and a
new one resumes from the run folder.
"""

from __future__ import annotations

import math
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from vlrank.config import TrainConfig, TuneConfig, validate
from vlrank.console import console
from vlrank.data.tables import read_json_lines
from vlrank.errors import UserError
from vlrank.runtime import cluster_address, cluster_resources, environment
from vlrank.tuning.asha import Asha
from vlrank.tuning.gauges import SweepGauges
from vlrank.tuning.mode_search import ModeSearch
from vlrank.tuning.resources import TrialResources, concurrency, trial_resources
from vlrank.tuning.results import one_line
from vlrank.tuning.space import Point, optuna_point
from vlrank.tuning.trials import Sweep, Trial, drop_checkpoints

ERROR_FILE = "error.txt"
"""In a failed trial's run folder: the traceback of its last attempt; its last line is the reason."""

_WIND_DOWN_S = 5.0
"""The workers of a paused trial may take this long to end; until then no other trial works in its folder."""

_TUNE_ENVIRONMENT = {
    # The sweep has its own result files, state and progress; Ray Tune's are switched off.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
    # A relative path means the same in a trial as in `vlrank train`.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class Trainer(Protocol):
    """A Ray Train trainer, or something that reports like one."""

    def fit(self) -> Any:
        """Train to the end, reporting every evaluation."""


class BuildTrainer(Protocol):
    """`vlrank.training.run.build_trainer`."""

    def __call__(self, config: TrainConfig, *, name: str, storage_path: str, callbacks: Sequence[Any] = ()) -> Trainer:
        """A trainer of ``config`` that writes to ``storage_path/name`` and resumes from there."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What Ray Tune's hooks have to know of the sweep.

    Attributes:
        config: The sweep's options.
        modes: The search in each mode.
        resources: What a trial of each mode holds.
        sweep: The trials.
        asha: Decides which trials train on; None lets every trial train to its end.
        confirming: The trials repeat chosen configurations on fresh seeds instead of searching.
    """

    config: TuneConfig
    modes: Mapping[str, ModeSearch]
    resources: Mapping[str, TrialResources]
    sweep: Sweep
    asha: Asha | None
    confirming: bool

    @property
    def runs(self) -> Path:
        """Folder of the trials' run folders."""
        return self.config.out.resolve() / "runs"

    def start(self, trial: Trial) -> dict[str, Any]:
        """The arguments of the function that trains the trial; an adaptive search chooses the trial's point now."""
        if not trial.config and not self.confirming:
            trial.config = self._next_point(trial)
            self.sweep.save()
        trial.gpus = self.resources[trial.mode].gpus
        seed = int(trial.trial_id.rpartition("seed")[2]) if self.confirming else None
        train = self.modes[trial.mode].trial_config(trial, self.runs, seed)
        return {"trial_id": trial.trial_id, "train": train.model_dump(mode="json"), "runs": str(self.runs)}

    def _next_point(self, trial: Trial) -> Point:
        others = self.sweep.of(trial.mode)
        results = [(one.config, one.value) for one in others if one is not trial and one.epochs]
        dimensions, index = self.modes[trial.mode].dimensions, others.index(trial)
        return optuna_point(results, dimensions, index=index, total=self.config.trials, seed=self.config.seed)

    def failure(self, trial: Trial) -> str:
        """Why a trial failed: the last line of its error file."""
        error_file = self.runs / trial.trial_id / ERROR_FILE
        if not error_file.exists():
            return "its process died (killed, out of memory, or its node was lost)"
        lines = [line.strip() for line in error_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "unknown"

    def ended(self, trial: Trial) -> None:
        """Show a trial that completed, paused or failed for good, and free the disk space that nothing needs."""
        console.print(one_line(trial, self.sweep.of(trial.mode)), soft_wrap=True)
        if self.config.keep_checkpoints == "best":
            drop_checkpoints(self.sweep, trial.mode, self.runs, keep_best=not self.confirming)


def run_trials(
    config: TuneConfig, modes: Sequence[ModeSearch], sweep: Sweep, build: BuildTrainer, *, confirming: bool = False
) -> None:
    """Run every unfinished trial of the sweep through Ray Tune; Ray must be connected.

    Raises:
        UserError: resources that the cluster does not have.
        RuntimeError: Ray Tune gave up.
        KeyboardInterrupt: Ctrl-C, which Ray Tune itself turns into a normal return.
    """
    pending = sweep.unfinished()
    if not pending:
        return
    search = _prepare(config, modes, sweep, confirming=confirming)
    side_by_side = config.max_concurrent_trials or concurrency(
        list(search.resources.values()), cluster_resources(), local=runs_here(config)
    )
    console.print(
        f"{len(pending)} trials to run, {len(sweep.trials) - len(pending)} finished before; {side_by_side} at a time"
    )
    results = _run_tuner(search, build, len(pending), side_by_side)
    _close(search, results)


def _prepare(config: TuneConfig, modes: Sequence[ModeSearch], sweep: Sweep, *, confirming: bool) -> Search:
    from vlrank.training.run import check_resources

    cluster = cluster_resources()
    for mode in modes:
        check_resources(mode.base, cluster)
    by_mode: dict[str, ModeSearch] = {mode.mode: mode for mode in modes}
    asha = None
    if config.scheduler == "asha" and not confirming:
        longest = {name: mode.epochs for name, mode in by_mode.items()}
        asha = Asha(
            sweep,
            longest,
            lambda trial: by_mode[trial.mode].epochs_of(trial),
            config.grace_period,
            config.reduction_factor,
        )
    resources = {name: trial_resources(mode.base, cluster) for name, mode in by_mode.items()}
    return Search(config=config, modes=by_mode, resources=resources, sweep=sweep, asha=asha, confirming=confirming)


def _run_tuner(search: Search, build: BuildTrainer, pending: int, side_by_side: int) -> tune.ResultGrid:
    """Ray Tune over the sweep's hooks."""
    out = search.config.out.resolve()
    state = out / ".tune"  # Ray Tune insists on a folder for its own state; the sweep never reads it
    shutil.rmtree(state, ignore_errors=True)
    stretches = 1 + (search.asha.most_rungs if search.asha else 0)
    with environment(_TUNE_ENVIRONMENT):
        tuner = tune.Tuner(
            tune.with_resources(_trial_function(build), {"CPU": 0.1}),
            tune_config=tune.TuneConfig(
                search_alg=PendingTrials(search),
                scheduler=PauseAtRungs(search) if search.asha else None,
                num_samples=pending * stretches,
                max_concurrent_trials=side_by_side,
                # The process of a stopped trial still winds its training down. Ray Tune counts it as the next trial's
                # failure when that process is reused too early.
                reuse_actors=False,
                trial_dirname_creator=lambda trial: f"{trial.config['trial_id']}-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name=state.name,
                storage_path=str(out),
                failure_config=tune.FailureConfig(max_failures=search.config.trial_retries),
                callbacks=[Recorder(search)],
                verbose=0,
            ),
        )
        results = tuner.fit()
    shutil.rmtree(state, ignore_errors=True)
    return results


def _close(search: Search, results: tune.ResultGrid) -> None:
    """Stop the trials that paused in vain; raise if others are left."""
    unfinished = search.sweep.unfinished()
    may_resume = search.asha is not None and search.asha.promote() is not None
    if all(trial.status == "paused" for trial in unfinished) and not may_resume:
        for trial in unfinished:
            trial.status = "stopped"
        search.sweep.save()
        return
    if results.errors:
        names = ", ".join(trial.trial_id for trial in unfinished)
        raise RuntimeError(f"Ray Tune gave up on {names}") from results.errors[0]
    raise KeyboardInterrupt


def _trial_function(build: BuildTrainer) -> Callable[[dict[str, Any]], None]:
    """The function that Ray Tune runs per trial: it holds no GPU, starts a Ray Train run and waits for its end."""

    def train_trial(started: dict[str, Any]) -> None:
        from ray.tune.integration.ray_train import TuneReportCallback

        from vlrank.ray_train import fit_trainer

        config = validate(TrainConfig, started["train"])
        run_folder = Path(started["runs"]) / started["trial_id"]
        # A killed sweep may have trained more than it wrote down.
        for evaluation in read_json_lines(run_folder / "history.jsonl"):
            tune.report(evaluation)
        (run_folder / ERROR_FILE).unlink(missing_ok=True)
        try:
            trainer = build(
                config, name=started["trial_id"], storage_path=started["runs"], callbacks=[TuneReportCallback()]
            )
            fit_trainer(trainer)
        except Exception as error:
            run_folder.mkdir(parents=True, exist_ok=True)
            reason = f"\n{' '.join(error.problem.split())}\n" if isinstance(error, UserError) else ""
            (run_folder / ERROR_FILE).write_text(traceback.format_exc() + reason, encoding="utf-8")
            raise

    return train_trial


class _Stateless:
    """Saves nothing: Ray Tune pickles its searcher, scheduler and callbacks into a state that a sweep never reads."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class PendingTrials(_Stateless, Searcher):
    """Hands Ray Tune the sweep's unfinished trials, and paused ones when ASHA promotes them."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self._search = search
        self._queue = [trial.trial_id for trial in search.sweep.unfinished() if trial.status != "paused"]
        self._running: dict[str, str] = {}  # Ray Tune's trial ids -> the sweep's
        self._ended: dict[str, float] = {}  # the sweep's trial ids -> when a stretch ended

    def suggest(self, trial_id: str) -> Any:
        """The next trial's arguments; Ray Tune's own id names nothing on disk, as it changes from run to run."""
        winding_down = [name for name, ended in self._ended.items() if time.monotonic() < ended + _WIND_DOWN_S]
        asha, trial = self._search.asha, None
        if asha is not None:
            trial = asha.promote([*self._running.values(), *winding_down])
        if trial is None and self._queue:
            trial = self._search.sweep.trials[self._queue.pop(0)]
        if trial is None:
            more_may_come = self._running or (winding_down and asha is not None)
            return None if more_may_come else Searcher.FINISHED
        self._running[trial_id] = trial.trial_id
        return self._search.start(trial)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Remember the end of a stretch; `Recorder` writes down what came of it."""
        if (name := self._running.pop(trial_id, None)) is not None:
            self._ended[name] = time.monotonic()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's own file is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class PauseAtRungs(_Stateless, FIFOScheduler):
    """Ends Ray Tune's trial where ASHA pauses the sweep's trial."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self._search = search

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Nothing to set."""
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """See `TrialScheduler`."""
        known = self._search.sweep.trials[trial.config["trial_id"]]
        assert self._search.asha is not None
        # Recorded here too: Ray Tune asks its scheduler before it calls its callbacks.
        if not add_evaluation(known, result) or self._search.asha.trains_on(known):
            return TrialScheduler.CONTINUE
        known.stop_reason = f"ASHA at epoch {known.epochs_run:g}"
        return TrialScheduler.STOP


class Recorder(_Stateless, Callback):
    """Writes every event to the sweep's file and to the dashboard."""

    def __init__(self, search: Search) -> None:
        self._search, self._gauges = search, SweepGauges()
        self._since: dict[str, float] = {}  # trial ids -> when its time was last counted

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """See `Callback`."""
        self._since.pop(trial.config["trial_id"], None)
        known = self._timed(trial)
        known.status, known.stop_reason = "running", None
        known.attempts += 1
        self._save(known)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """See `Callback`."""
        known = self._timed(trial)
        if add_evaluation(known, result):
            self._save(known)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """See `Callback`."""
        known = self._timed(trial)
        if known.stop_reason:
            known.status = "paused"
        else:
            known.status = "completed"
            # The last evaluation may come a little before the end of the last epoch.
            whole = math.ceil(known.epochs_run) >= self._search.modes[known.mode].epochs_of(known)
            known.stop_reason = "all epochs" if whole else "no improvement (patience)"
        self._end(known)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """See `Callback`."""
        known = self._timed(trial)
        known.status = "failed"
        known.stop_reason = f"failed: {self._search.failure(known)}"
        self._end(known)

    def _timed(self, trial: Any) -> Trial:
        """The sweep's trial, with the time until now added."""
        known = self._search.sweep.trials[trial.config["trial_id"]]
        now = time.time()
        known.seconds += now - self._since.get(known.trial_id, now)
        self._since[known.trial_id] = now
        return known

    def _end(self, known: Trial) -> None:
        self._since.pop(known.trial_id, None)
        self._save(known)
        self._search.ended(known)

    def _save(self, known: Trial) -> None:
        self._search.sweep.save()
        self._gauges.show(self._search.sweep, known)


def add_evaluation(known: Trial, result: Mapping[str, Any]) -> bool:
    """Add an evaluation to a trial's curve; False for a report that is no evaluation."""
    if "epoch" not in result or known.metric not in result:
        return False
    more = {"step": int(result["step"])} if "step" in result else {}
    # A rung is reached at the end of an epoch, so an evaluation within an epoch counts the part that is done.
    epoch = result.get("epochs_done", result["epoch"])
    known.record(epoch, float(result[known.metric]), seconds=round(known.seconds, 2), **more)
    return True


def runs_here(config: TuneConfig) -> bool:
    """Whether the sweep starts Ray on this machine instead of joining a cluster."""
    return cluster_address(config.ray) is None

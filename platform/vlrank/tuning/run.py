"""``vlrank tune``: one sweep over any number of modes, Ray Tune over Ray Train.

A sweep folder holds ``config.yaml``, ``trials.jsonl`` (see `vlrank.tuning.trials`), ``runs/TRIAL`` (run folders of
``vlrank train``; only the winner of each mode keeps its checkpoints), ``best/MODE.yaml``, ``best.json`` and
``report.html``. The same command continues a sweep that was killed, at any time: finished trials stay, interrupted ones
go on from their last checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from vlrank.config import Mode, TrainConfig, TuneConfig, config_dir, merge, mode_defaults, read_yaml, validate
from vlrank.console import Summary, console
from vlrank.data.tables import atomic_write_json, atomic_write_text
from vlrank.errors import UserError
from vlrank.runtime import cluster_resources, ray_session
from vlrank.training.data import selection_metric
from vlrank.tuning import space as spaces
from vlrank.tuning.results import one_line, selection, show_table, verdict
from vlrank.tuning.space import Dimension, Point
from vlrank.tuning.trials import Sweep, Trial, expected, rungs

ERROR_FILE = "error.txt"
"""In a failed trial's run folder: the traceback of its last attempt."""
_MAY_CHANGE = ("ray", "max_concurrent_trials", "trial_retries", "confirm_seeds", "test", "engine", "keep_checkpoints")
_TUNE = {
    # Ray Tune's own result files, state and boxes on stdout: the sweep has its own, and stdout belongs to the result.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Relative paths mean in a trial what they mean to `vlrank train`.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class Fitting(Protocol):
    """A Ray Train trainer, or something that reports like one."""

    def fit(self) -> Any:
        """Train to the end, reporting every evaluation."""


class Build(Protocol):
    """`vlrank.training.run.build_trainer`."""

    def __call__(self, config: TrainConfig, *, name: str, storage_path: str, callbacks: Sequence[Any] = ()) -> Fitting:
        """A trainer of ``config`` that writes to ``storage_path/name`` and resumes from there."""


@dataclass(frozen=True, slots=True)
class ModePlan:
    """What a sweep does in one mode.

    Attributes:
        mode: Mode.
        base: The default configuration of its trials; ``out`` is the sweep's folder of runs.
        dimensions: The search space.
        points: Training keys per trial, the defaults first; empty ones are left to an adaptive search.
    """

    mode: Mode
    base: TrainConfig
    dimensions: dict[str, Dimension]
    points: list[Point]

    @property
    def epochs(self) -> int:
        """The longest trial's epochs."""
        dimension = self.dimensions.get("epochs")
        return int(max(dimension.bounds())) if dimension else self.base.epochs

    @property
    def metric(self) -> str:
        """What trials are compared by."""
        return selection_metric(self.base)[0]

    def trial_config(self, trial: Trial, runs: Path, seed: int | None = None) -> TrainConfig:
        """The whole training config of a trial."""
        values = merge(self.base.model_dump(), spaces.nested(trial.config))
        return validate(
            TrainConfig, {**values, "out": runs / trial.trial_id} | ({} if seed is None else {"seed": seed})
        )


def mode_plan(config: TuneConfig, mode: Mode) -> ModePlan:
    """Everything about a mode's trials that is known before any of them runs.

    Raises:
        UserError: a wrong key or value in ``train``, ``per_mode``, ``space`` or ``spaces``.
    """
    own = merge(config.train, config.per_mode.get(mode, {}))
    taken = sorted({"dataset", "out", "mode", "ray"} & set(own))
    if taken:
        raise UserError(f"`train` of a sweep cannot set {', '.join(taken)}", "They are options of the sweep itself.")
    values = merge(mode_defaults(mode), own)
    fixed = {"dataset": config.dataset, "out": config.out / "runs", "mode": mode}
    base = validate(TrainConfig, {**values, **fixed})
    base = base.model_copy(update={"metric": selection_metric(base)[0]})
    shipped = read_yaml(config_dir() / "tune" / f"{mode}.yaml").get("space", {})
    # A key that the user fixed in `train` is not searched just because the shipped space has it.
    shipped = {key: value for key, value in shipped.items() if key.split(".")[0] not in own}
    dimensions = spaces.parse_space(spaces.combined(shipped, config.space, config.spaces.get(mode, {})))
    spaces.check_points(dimensions, base.model_dump())
    default = spaces.default_point(dimensions, base.model_dump())
    seed = f"{config.seed}-{mode}"
    if config.search == "optuna":
        points: list[Point] = [default, *({} for _ in range(config.trials - 1))]
    else:
        count = (
            config.trials if config.search == "random" else math.prod(len(d.grid()) for d in dimensions.values()) + 1
        )
        points = spaces.plan_points(dimensions, default, config.search, count, seed)
    return ModePlan(mode, base, dimensions, points)


def run(config: TuneConfig, *, build: Build | None = None) -> Summary:
    """Run a sweep, or what is left of it.

    Args:
        config: The sweep.
        build: Makes the trainer of a trial; by default `vlrank.training.run.build_trainer`.

    Raises:
        UserError: a wrong config, a folder that holds another sweep, or not one trial of a mode that succeeded.
    """
    plans = [mode_plan(config, mode) for mode in config.modes]
    users: dict[str, int] = {}
    if build is None:
        from vlrank.training.run import build_trainer

        build = build_trainer
        users = {plan.mode: validation_users(plan.base) for plan in plans}
    sweep = open_sweep(config, plans, users)
    confirmation = Sweep(config.out / "confirm.jsonl")
    test: dict[str, dict[str, float]] = {}
    if sweep.unfinished() or config.confirm_seeds or config.test:
        with ray_session(config.ray):
            _search(config, plans, sweep, build)
            if config.confirm_seeds:
                _add_confirmation(config, plans, sweep, confirmation)
                _search(config, plans, confirmation, build, searching=False)
            if config.test:
                from vlrank.tuning.final import test_metrics

                winners = {plan.mode: sweep.best_of(plan.mode) for plan in plans}
                for plan in plans:
                    if (best := winners[plan.mode]) is not None:
                        folder = config.out.resolve() / "runs" / best.trial_id
                        test[plan.mode] = test_metrics(config, plan.base, folder)
    return _conclude(config, plans, sweep, confirmation, test)


def validation_users(base: TrainConfig) -> int:
    """Users behind a mode's validation metric; looks at the data and the model's folder as every trial will.

    Raises:
        UserError: what would make every trial of the mode fail.
    """
    from vlrank.data.dataset import Dataset
    from vlrank.training import data
    from vlrank.training.model import resolve_base

    resolve_base(base)
    return len(data.plan(base, data.TrainingData.of_dataset(Dataset.open(base.dataset), base.candidates)).validation)


def open_sweep(config: TuneConfig, plans: Sequence[ModePlan], users: Mapping[str, int]) -> Sweep:
    """The sweep's trials, new or as an earlier run left them; failed ones are to run again.

    Raises:
        UserError: the folder holds a sweep with other options.
    """
    kept = config.model_dump(mode="json", exclude=set(_MAY_CHANGE))
    path = config.out / "config.yaml"
    if path.exists():
        before = read_yaml(path)
        changed = sorted(key for key in kept if before.get(key) != kept[key])
        if changed:
            raise UserError(
                f"{config.out} holds a sweep with other options: {', '.join(changed)}",
                "Give the same options to continue it, or another --out for a new sweep.",
            )
    else:
        if config.out.exists() and any(config.out.iterdir()):
            raise UserError(f"{config.out} exists, is not empty and holds no sweep", "Choose another --out.")
        atomic_write_text(path, yaml.safe_dump(kept, sort_keys=False))
    sweep = Sweep(config.out / "trials.jsonl")
    for plan in plans:
        for index, point in enumerate(plan.points):
            sweep.add(Trial(plan.mode, f"{plan.mode}-{index:03d}", point, plan.metric, users.get(plan.mode, 0)))
    _reopen(sweep)
    return sweep


def _reopen(sweep: Sweep) -> None:
    for trial in sweep:
        if trial.status == "failed":
            trial.status = "pending"
        elif trial.status == "running" and trial.stop_reason:
            trial.status = "paused"  # the driver died between ASHA's decision and the trial's end
    sweep.save()


def _search(
    config: TuneConfig, plans: Sequence[ModePlan], sweep: Sweep, build: Build, *, searching: bool = True
) -> None:
    """Run every unfinished trial through Ray Tune."""
    waiting = sweep.unfinished()
    if not waiting:
        return
    from ray import tune

    from vlrank.training.run import check_resources
    from vlrank.tuning.gauges import SweepGauges
    from vlrank.tuning.halving import Halving
    from vlrank.tuning.search import PendingTrials, Recorder, Rungs, optuna_point

    by_mode = {plan.mode: plan for plan in plans}
    runs = config.out.resolve() / "runs"
    resources = cluster_resources()
    slots = [trial_resources(plan.base, resources) for plan in plans]
    for plan in plans:
        check_resources(plan.base, resources)
    concurrent = config.max_concurrent_trials or concurrency(slots, resources, local=_local(config))
    console.print(
        f"{len(waiting)} trials to run, {len(sweep.trials) - len(waiting)} finished before; {concurrent} at a time"
    )

    def launch(trial: Trial) -> dict[str, Any]:
        plan = by_mode[_mode(trial)]
        trial.gpus = slots[plans.index(plan)].gpus
        seed = int(trial.trial_id.rpartition("seed")[2]) if not searching else None
        train = plan.trial_config(trial, runs, seed)
        return {"trial_id": trial.trial_id, "train": train.model_dump(mode="json"), "runs": str(runs)}

    def suggest(trial: Trial) -> Point:
        others, plan = sweep.of(trial.mode), by_mode[_mode(trial)]
        index = others.index(trial)
        return optuna_point(trial, others, plan.dimensions, index=index, total=config.trials, seed=config.seed)

    def finished(trial: Trial) -> None:
        console.print(one_line(trial, sweep.of(trial.mode)), soft_wrap=True)
        if config.keep_checkpoints == "best":
            _prune(sweep, trial.mode, runs, keep_best=searching)

    def epochs(trial: Trial) -> int:
        return int(trial.config.get("epochs", by_mode[_mode(trial)].base.epochs))

    def failure(trial: Trial) -> str:
        return reason_in(runs / trial.trial_id / ERROR_FILE)

    halving, stretches = None, 1
    if searching and config.scheduler == "asha":
        longest: dict[str, int] = {plan.mode: plan.epochs for plan in plans}
        halving = Halving(sweep, longest, epochs, config.grace_period, config.reduction_factor)
        stretches += max(len(rungs(config.grace_period, config.reduction_factor, last)) for last in longest.values())
    state = config.out.resolve() / ".tune"  # Tune insists on a place for its own state; nothing reads it again
    shutil.rmtree(state, ignore_errors=True)
    with _environment(**_TUNE):
        tuner = tune.Tuner(
            tune.with_resources(_driver(build), {"CPU": 0.1}),
            tune_config=tune.TuneConfig(
                search_alg=PendingTrials(sweep, launch, suggest if searching else None, halving),
                scheduler=Rungs(sweep, halving) if halving is not None else None,
                num_samples=len(waiting) * stretches,
                max_concurrent_trials=concurrent,
                # A driver whose trial was stopped still winds its training down: Tune counts a reuse that comes too
                # early as that next trial's failure.
                reuse_actors=False,
                trial_dirname_creator=lambda trial: f"{trial.config['trial_id']}-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name=".tune",
                storage_path=str(config.out.resolve()),
                failure_config=tune.FailureConfig(max_failures=config.trial_retries),
                callbacks=[Recorder(sweep, epochs, failure, finished, SweepGauges().show)],
                verbose=0,
            ),
        )
        results = tuner.fit()
    shutil.rmtree(state, ignore_errors=True)
    unfinished = sweep.unfinished()
    if all(trial.status == "paused" for trial in unfinished) and (halving is None or halving.promoted() is None):
        for trial in unfinished:
            trial.status = "stopped"  # nobody can come any more who would make them go on
        sweep.save()
    elif unfinished:
        if results.errors:
            names = ", ".join(trial.trial_id for trial in unfinished)
            raise RuntimeError(f"Ray Tune gave up on {names}") from results.errors[0]
        raise KeyboardInterrupt  # Tune turns Ctrl-C into a normal return


def reason_in(error_file: Path) -> str:
    """The last line of a kept traceback: the exception and its message."""
    if not error_file.exists():
        return "its process died (killed, out of memory, or its node was lost)"
    lines = [line.strip() for line in error_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "unknown"


def _mode(trial: Trial) -> Mode:
    return trial.mode  # type: ignore[return-value]


def _driver(build: Build) -> Callable[[dict[str, Any]], None]:
    """The function that Tune runs per trial: it holds no GPU itself, but starts a Ray Train run and waits for it."""

    def drive(launched: dict[str, Any]) -> None:
        from ray import tune
        from ray.tune.integration.ray_train import TuneReportCallback

        from vlrank.training.run import fit_trainer

        config = validate(TrainConfig, launched["train"])
        for evaluation in _evaluations_of(Path(launched["runs"]) / launched["trial_id"]):
            tune.report(evaluation)  # what an earlier, killed sweep had trained but not yet written down
        error_file = Path(launched["runs"]) / launched["trial_id"] / ERROR_FILE
        error_file.unlink(missing_ok=True)
        try:
            trainer = build(
                config, name=launched["trial_id"], storage_path=launched["runs"], callbacks=[TuneReportCallback()]
            )
            fit_trainer(trainer)
        except Exception:
            error_file.parent.mkdir(parents=True, exist_ok=True)
            error_file.write_text(traceback.format_exc(), encoding="utf-8")
            raise

    return drive


def _evaluations_of(run_folder: Path) -> list[dict[str, Any]]:
    import json

    path = run_folder / "history.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


@dataclass(frozen=True, slots=True)
class Slot:
    """What one trial holds while it runs."""

    gpus: float
    cpus: float


def trial_resources(base: TrainConfig, cluster: Mapping[str, float]) -> Slot:
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
    return Slot(base.workers * per_worker, base.workers * base.cpus_per_worker)


def concurrency(slots: Sequence[Slot], cluster: Mapping[str, float], *, local: bool) -> int:
    """Trials at a time: as many as fit, counting the largest kind of trial; at least one.

    A Ray started on this machine claims more CPUs than there are (see `vlrank.runtime`); real cores count then.
    """
    cpus = float(os.cpu_count() or 1) if local else cluster.get("CPU", 1.0)
    fits = [cpus / slot.cpus for slot in slots]
    fits += [cluster.get("GPU", 0) / slot.gpus for slot in slots if slot.gpus]
    if any(slot.gpus for slot in slots):  # GPUs are the scarce part; a GPU trial's CPUs are few on any GPU host
        fits = [cluster.get("GPU", 0) / slot.gpus for slot in slots if slot.gpus]
    return max(1, math.floor(min(fits) + 1e-9))


def _local(config: TuneConfig) -> bool:
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    return not address or address == "local"


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update({key: value for key, value in values.items() if before[key] is None})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)


def _prune(sweep: Sweep, mode: str, runs: Path, *, keep_best: bool) -> None:
    """Drop the checkpoints of finished trials that are not the mode's best; curves and configs stay.

    Failed trials keep theirs: the next run of the sweep continues from them.
    """
    best = sweep.best_of(mode) if keep_best else None
    for trial in sweep.of(mode):
        if trial is not best and trial.status in ("completed", "stopped"):
            folder = runs / trial.trial_id
            for child in folder.iterdir() if folder.is_dir() else ():
                if child.is_dir():
                    # A worker that is just being killed may still write there; the end of the sweep prunes once more.
                    shutil.rmtree(child, ignore_errors=True)
            (folder / "best.json").unlink(missing_ok=True)


def _add_confirmation(config: TuneConfig, plans: Sequence[ModePlan], sweep: Sweep, confirmation: Sweep) -> None:
    """The winner and the default of each mode, to be trained again with seeds that had no part in the choice."""
    for plan in plans:
        best, default = sweep.best_of(plan.mode), sweep.of(plan.mode)[0]
        if best is None:
            continue
        for number in range(1, config.confirm_seeds + 1):
            seed = plan.base.seed + 1000 + number
            for role, chosen in {"best": best, "default": default}.items():
                if role == "best" or best is not default:
                    # Named after the trial too: one that had failed may win when the sweep is run again.
                    trial_id = f"{plan.mode}-{role}-{chosen.trial_id.rpartition('-')[2]}-seed{seed}"
                    confirmation.add(Trial(plan.mode, trial_id, chosen.config, plan.metric, best.users))
    _reopen(confirmation)


def _conclude(
    config: TuneConfig,
    plans: Sequence[ModePlan],
    sweep: Sweep,
    confirmation: Sweep,
    test: Mapping[str, Mapping[str, float]],
) -> Summary:
    """Tables, best YAMLs and the summary."""
    from vlrank.evaluation.report import render_sweep

    runs = config.out.resolve() / "runs"
    lines: dict[str, object] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for plan in plans:
        trials, best = sweep.of(plan.mode), sweep.best_of(plan.mode)
        show_table(plan.mode, trials, best)
        if best is None:
            lines[plan.mode] = f"no trial succeeded: {trials[0].stop_reason}"
            continue
        if config.keep_checkpoints == "best":
            _prune(sweep, plan.mode, runs, keep_best=True)
        ready = plan.trial_config(best, runs).model_copy(update={"out": config.out / "best" / plan.mode})
        path = config.out / "best" / f"{plan.mode}.yaml"
        note = f"# {best.metric} {best.value:.4f} on validation, trial {best.trial_id} of {config.out}\n"
        atomic_write_text(path, note + yaml.safe_dump(ready.model_dump(mode="json"), sort_keys=False))
        chosen[plan.mode] = {
            "trial_id": best.trial_id,
            "metric": best.metric,
            "value": best.value,
            "config": str(path),
            "run": str(config.out / "runs" / best.trial_id),
        } | selection(trials[0], best, confirmation.of(plan.mode))
        lines[plan.mode] = verdict(trials[0], best, chosen[plan.mode])
        if plan.mode in test:
            chosen[plan.mode]["test"] = dict(test[plan.mode])
            lines[plan.mode] = f"{lines[plan.mode]}; on test {best.metric} {test[plan.mode][best.metric]:.4f}"
    atomic_write_json(config.out / "best.json", chosen)
    atomic_write_text(config.out / "report.html", render_sweep(config.dataset.resolve().name, config.out))
    if not chosen:
        reasons = "\n".join(f"{mode}: {line}" for mode, line in lines.items())
        raise UserError(f"not one trial of the sweep succeeded\n{reasons}", "The same command tries them again.")
    trials = list(sweep)
    epochs = sum(trial.epochs_run for trial in trials)
    full = sum(plan.epochs * len(plan.points) for plan in plans)
    spent = sum(trial.seconds * trial.gpus for trial in trials) / 3600
    lines["epochs"] = f"{epochs:g} of {full} that full-length trials would take ({epochs / full:.0%})"
    lines["GPU-hours" if spent else "hours"] = spent or sum(trial.seconds for trial in trials) / 3600
    lines["report"] = config.out / "report.html"
    lines["next"] = f"vlrank rerank {config.dataset} --model {next(iter(chosen.values()))['run']} ..."
    counts = {"trials": len(trials), "epochs": int(epochs)}
    counts |= {status: sum(t.status == status for t in trials) for status in ("completed", "stopped", "failed")}
    return Summary(f"tune: {config.dataset}", lines, config.out, counts)


def dry_run(config: TuneConfig) -> Summary:
    """``--dry_run``: the trials, what they would hold and how many ASHA is expected to stop. Starts nothing.

    Raises:
        UserError: as `run`, before any trial.
    """
    plans = [mode_plan(config, mode) for mode in config.modes]
    resources = {"CPU": float(os.cpu_count() or 1), "GPU": float(_gpus_here())}
    if not _local(config):
        with ray_session(config.ray):
            resources = cluster_resources()
    slots = [trial_resources(plan.base, resources) for plan in plans]
    concurrent = config.max_concurrent_trials or concurrency(slots, resources, local=_local(config))
    before = Sweep(config.out / "trials.jsonl")
    measured = [trial.seconds / trial.epochs_run for trial in before if trial.epochs_run and trial.seconds]
    lines: dict[str, object] = {}
    total_epochs, total_hours, stopped_in_all = 0.0, 0.0, 0
    for mode, slot in zip(plans, slots, strict=True):
        epochs, stopped = float(mode.epochs * len(mode.points)), 0
        if config.scheduler == "asha":
            epochs, stopped = expected(len(mode.points), config.grace_period, config.reduction_factor, mode.epochs)
        total_epochs, stopped_in_all = total_epochs + epochs, stopped_in_all + stopped
        hours = epochs * statistics.fmean(measured) / 3600 * (slot.gpus or 1) if measured else 0.0
        total_hours += hours
        milestones = ", ".join(map(str, rungs(config.grace_period, config.reduction_factor, mode.epochs))) or "none"
        held = f"{slot.gpus:g} GPU, {slot.cpus:g} CPU each" if slot.gpus else f"{slot.cpus:g} CPU each"
        lines[mode.mode] = f"{len(mode.points)} trials ({held}), compared by {mode.metric} at epochs {milestones}"
        for index, point in enumerate(mode.points):
            keys = ", ".join(f"{key} {value}" for key, value in point.items()) or "chosen by Optuna while it runs"
            lines[f"{mode.mode}-{index:03d}"] = keys + (" (defaults)" if index == 0 else "")
    full = sum(mode.epochs * len(mode.points) for mode in plans)
    lines["at a time"] = concurrent
    lines["expected epochs"] = f"{total_epochs:g} of {full}, {stopped_in_all} trials stopped by ASHA"
    unit = "expected GPU-hours" if any(slot.gpus for slot in slots) else "expected hours of trials"
    unknown = "unknown until a first trial has run"
    lines[unit] = round(total_hours, 3) if measured else unknown
    counts = {"trials": sum(len(mode.points) for mode in plans), "expected_epochs": round(total_epochs)}
    return Summary(f"tune (dry run): {config.dataset}", lines, None, counts)


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()

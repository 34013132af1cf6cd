"""``vlrank tune``: one sweep over any number of modes, Ray Tune over Ray Train.

A sweep folder holds ``config.yaml``, ``trials.jsonl`` (see `vlrank.tuning.trials`), ``runs/TRIAL`` (run folders of
``vlrank train``; only the winner of each mode keeps its checkpoints), ``best/MODE.yaml``, ``best.json`` and
``report.html``. The same command continues a sweep that was killed, at any time: finished trials stay, interrupted ones
resume from their last checkpoint.
"""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from vlrank.config import TrainConfig, TuneConfig, read_yaml
from vlrank.console import Summary
from vlrank.data.tables import atomic_write_json, atomic_write_text
from vlrank.errors import UserError
from vlrank.ray_train import preload_for
from vlrank.runtime import cluster_resources, ray_session
from vlrank.tuning.asha import expected_epochs, rungs
from vlrank.tuning.mode_search import ModeSearch, mode_search
from vlrank.tuning.resources import concurrency, trial_resources
from vlrank.tuning.results import selection, show_table, verdict
from vlrank.tuning.search import BuildTrainer, run_trials, runs_here
from vlrank.tuning.trials import Sweep, Trial, drop_checkpoints

_MAY_CHANGE = ("ray", "max_concurrent_trials", "trial_retries", "confirm_seeds", "test", "engine", "keep_checkpoints")
"""Options that the command which continues a sweep may change."""


def run(config: TuneConfig, *, build: BuildTrainer | None = None) -> Summary:
    """Run a sweep, or what is left of it.

    Args:
        config: The sweep.
        build: Makes the trainer of a trial; by default `vlrank.training.run.build_trainer`.

    Raises:
        UserError: a wrong config, a folder that holds another sweep, or no trial that succeeded.
    """
    # Check everything that would make every trial of a mode fail.
    modes = [mode_search(config, mode) for mode in config.modes]
    users: dict[str, int] = {}
    if build is None:
        from vlrank.training.run import build_trainer

        build = build_trainer
        users = {mode.mode: validation_users(mode.base) for mode in modes}
        earlier = list(Sweep(config.out / "trials.jsonl"))
        done = earlier and all(trial.status in ("completed", "stopped") for trial in earlier)
        if runs_here(config) and not done:  # nodes of a cluster may reach, or have, what this machine does not
            check_hub_models(mode.base for mode in modes)

    # Search, then train the chosen configurations again on fresh seeds, then look at the test users once.
    sweep, confirmation = open_sweep(config, modes, users), Sweep(config.out / "confirm.jsonl")
    test: dict[str, dict[str, float]] = {}
    if sweep.unfinished() or config.confirm_seeds or config.test:
        with ray_session(config.ray, preload=preload_for(6)):
            run_trials(config, modes, sweep, build)
            if config.confirm_seeds:
                _add_confirmation(config, modes, sweep, confirmation)
                run_trials(config, modes, confirmation, build, confirming=True)
            if config.test:
                test = _test_winners(config, modes, sweep)

    return _conclude(config, modes, sweep, confirmation, test)


def validation_users(base: TrainConfig) -> int:
    """The number of users behind a mode's validation metric; reads the data and the model's folder as every trial will.

    Raises:
        UserError: anything that would make every trial of the mode fail.
    """
    from vlrank.data.dataset import Dataset
    from vlrank.training import data
    from vlrank.training.model import resolve_base

    resolve_base(base)
    return len(
        data.choose_samples(base, data.TrainingData.of_dataset(Dataset.open(base.dataset), base.candidates)).validation
    )


def check_hub_models(bases: Iterable[TrainConfig]) -> None:
    """Refuse a model on the hub that this machine can neither reach nor find in its cache.

    Raises:
        UserError: the hub's answer in one line.
    """
    from vlrank.config import mode_defaults
    from vlrank.engines.models import model_config, model_place

    for name in dict.fromkeys(base.model or mode_defaults(base.mode)["model"] for base in bases):
        if model_place(name) is None:
            model_config(name)


def open_sweep(config: TuneConfig, modes: Sequence[ModeSearch], users: Mapping[str, int]) -> Sweep:
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
    for mode in modes:
        for index, point in enumerate(mode.points):
            sweep.add(Trial(mode.mode, f"{mode.mode}-{index:03d}", point, mode.metric, users.get(mode.mode, 0)))
    _reopen(sweep)
    return sweep


def _reopen(sweep: Sweep) -> None:
    """Let failed trials run again, and repair the statuses of a sweep that was killed."""
    for trial in sweep:
        if trial.status == "failed":
            trial.status = "pending"
        elif trial.status == "running" and trial.stop_reason:
            trial.status = "paused"  # the driver was killed between ASHA's decision and the end of the stretch
    sweep.save()


def _add_confirmation(config: TuneConfig, modes: Sequence[ModeSearch], sweep: Sweep, confirmation: Sweep) -> None:
    """Add each mode's winner and default, to be trained again with seeds that had no part in the choice."""
    for mode in modes:
        best, default = sweep.best_of(mode.mode), sweep.of(mode.mode)[0]
        if best is None:
            continue
        for number in range(1, config.confirm_seeds + 1):
            seed = mode.base.seed + 1000 + number
            for role, chosen in {"best": best, "default": default}.items():
                if role == "best" or best is not default:
                    # The trial's number is part of the name: a continued sweep may have another winner.
                    trial_id = f"{mode.mode}-{role}-{chosen.trial_id.rpartition('-')[2]}-seed{seed}"
                    confirmation.add(Trial(mode.mode, trial_id, chosen.config, mode.metric, best.users))
    _reopen(confirmation)


def _test_winners(config: TuneConfig, modes: Sequence[ModeSearch], sweep: Sweep) -> dict[str, dict[str, float]]:
    """Mode -> metrics of its winner on the test users."""
    from vlrank.tuning.final import test_metrics

    winners = {mode.mode: (mode.base, sweep.best_of(mode.mode)) for mode in modes}
    runs = config.out.resolve() / "runs"
    return {
        mode: test_metrics(config, base, runs / best.trial_id)
        for mode, (base, best) in winners.items()
        if best is not None
    }


def _conclude(
    config: TuneConfig,
    modes: Sequence[ModeSearch],
    sweep: Sweep,
    confirmation: Sweep,
    test: Mapping[str, Mapping[str, float]],
) -> Summary:
    """Write ``best/MODE.yaml``, ``best.json`` and the report; show the tables.

    Raises:
        UserError: no trial succeeded.
    """
    from vlrank.evaluation.report import render_sweep

    lines: dict[str, object] = {}
    winners: dict[str, dict[str, Any]] = {}
    for mode in modes:
        trials, best = sweep.of(mode.mode), sweep.best_of(mode.mode)
        show_table(mode.mode, trials, best)
        if best is None:
            lines[mode.mode] = f"no trial succeeded: {trials[0].stop_reason}"
            continue
        if config.keep_checkpoints == "best":
            drop_checkpoints(sweep, mode.mode, config.out.resolve() / "runs", keep_best=True)
        facts = _write_best(config, mode, best) | selection(trials[0], best, confirmation.of(mode.mode))
        lines[mode.mode] = verdict(trials[0], best, facts)
        if mode.mode in test:
            facts["test"] = dict(test[mode.mode])
            lines[mode.mode] = f"{lines[mode.mode]}; on test {best.metric} {test[mode.mode][best.metric]:.4f}"
        winners[mode.mode] = facts
    atomic_write_json(config.out / "best.json", winners)
    atomic_write_text(config.out / "report.html", render_sweep(config.dataset.resolve().name, config.out))
    if not winners:
        reasons = "\n".join(f"{mode}: {line}" for mode, line in lines.items())
        raise UserError(f"not one trial of the sweep succeeded\n{reasons}", "The same command tries them again.")

    trials = list(sweep)
    epochs = sum(trial.epochs_run for trial in trials)
    full = sum(mode.epochs * len(mode.points) for mode in modes)
    gpu_hours = sum(trial.seconds * trial.gpus for trial in trials) / 3600
    lines["epochs"] = f"{epochs:g} of {full} that full-length trials would take ({epochs / full:.0%})"
    lines["GPU-hours" if gpu_hours else "hours"] = gpu_hours or sum(trial.seconds for trial in trials) / 3600
    lines["report"] = config.out / "report.html"
    dataset, winner = (shlex.quote(str(path)) for path in (config.dataset, next(iter(winners.values()))["run"]))
    lines["next"] = f"vlrank rerank {dataset} --model {winner} ..."
    counts = {"trials": len(trials), "epochs": int(epochs)}
    counts |= {status: sum(t.status == status for t in trials) for status in ("completed", "stopped", "failed")}
    return Summary(f"tune: {config.dataset}", lines, config.out, counts)


def _write_best(config: TuneConfig, mode: ModeSearch, best: Trial) -> dict[str, Any]:
    """Write the winner's training config, ready for ``vlrank train --config``; returns its entry in ``best.json``."""
    ready = mode.trial_config(best, config.out / "runs").model_copy(update={"out": config.out / "best" / mode.mode})
    path = config.out / "best" / f"{mode.mode}.yaml"
    note = f"# {best.metric} {best.value:.4f} on validation, trial {best.trial_id} of {config.out}\n"
    atomic_write_text(path, note + yaml.safe_dump(ready.model_dump(mode="json"), sort_keys=False))
    return {
        "trial_id": best.trial_id,
        "metric": best.metric,
        "value": best.value,
        "config": str(path),
        "run": str(config.out / "runs" / best.trial_id),
    }


def dry_run(config: TuneConfig) -> Summary:
    """The trials, what each would hold, and the epochs that ASHA is expected to leave; starts nothing.

    Raises:
        UserError: as `run`, before any trial.
    """
    modes = [mode_search(config, mode) for mode in config.modes]
    users = {mode.mode: validation_users(mode.base) for mode in modes}

    # What a trial holds, and how many run side by side.
    resources = {"CPU": float(os.cpu_count() or 1), "GPU": float(_gpus_here())}
    if not runs_here(config):
        with ray_session(config.ray):
            resources = cluster_resources()
    held = [trial_resources(mode.base, resources) for mode in modes]
    side_by_side = config.max_concurrent_trials or concurrency(held, resources, local=runs_here(config))

    # Trials and expected epochs, mode by mode; hours if an earlier run has shown what an epoch takes.
    earlier = Sweep(config.out / "trials.jsonl")
    epoch_seconds = [trial.seconds / trial.epochs_run for trial in earlier if trial.epochs_run and trial.seconds]
    lines: dict[str, object] = {}
    epochs_in_all, hours, stopped_in_all = 0.0, 0.0, 0
    for mode, holds in zip(modes, held, strict=True):
        epochs, stopped = float(mode.epochs * len(mode.points)), 0
        if config.scheduler == "asha":
            asha = (config.grace_period, config.reduction_factor, mode.epochs)
            epochs, stopped = expected_epochs(len(mode.points), *asha)
            at = f" at epochs {', '.join(map(str, rungs(*asha)))}" if rungs(*asha) else " at their ends"
        else:
            at = " at their ends"
        measure = f"{mode.metric} of {users[mode.mode]:,} validation users"
        lines[mode.mode] = f"{len(mode.points)} trials ({holds}), compared by {measure}{at}"
        for index, point in enumerate(mode.points):
            keys = ", ".join(f"{key} {value}" for key, value in point.items()) or "chosen by Optuna while it runs"
            lines[f"{mode.mode}-{index:03d}"] = keys + (" (defaults)" if index == 0 else "")
        epochs_in_all, stopped_in_all = epochs_in_all + epochs, stopped_in_all + stopped
        if epoch_seconds:
            hours += epochs * statistics.fmean(epoch_seconds) / 3600 * (holds.gpus or 1)

    trials = sum(len(mode.points) for mode in modes)
    full = sum(mode.epochs * len(mode.points) for mode in modes)
    unit = "expected GPU-hours" if any(holds.gpus for holds in held) else "expected hours of trials"
    lines["at a time"] = side_by_side
    lines["expected epochs"] = f"{epochs_in_all:g} of {full}, {stopped_in_all} trials stopped by ASHA"
    lines[unit] = round(hours, 3) if epoch_seconds else "unknown until a first trial has run"
    counts = {"trials": trials, "expected_epochs": round(epochs_in_all)}
    return Summary(f"tune (dry run): {config.dataset}", lines, None, counts)


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()

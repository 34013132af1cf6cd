"""Sweeps through real Ray Tune and ASHA, with a trainer that learns by formula: one cluster for all tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import Program
from vlrank.config import TrainConfig, TuneConfig, load_config
from vlrank.errors import UserError
from vlrank.tuning.run import run
from vlrank.tuning.trials import Sweep, Trial

from .stand_in import StandIn, quality

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    # Ray's workers cannot import this folder: send the stand-in itself.
    ray.cloudpickle.register_pickle_by_value(sys.modules[StandIn.__module__])
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def options(out: Path, **more: Any) -> dict[str, Any]:
    train = {"epochs": 4, **more.pop("train", {})}
    space = {"lr": {"loguniform": [2e-5, 5e-4]}, "batch_size": {"choice": [8, 16]}, **more.pop("space", {})}
    defaults = {"modes": ["caption"], "trials": 5, "max_concurrent_trials": 2, "seed": 3}
    return {"dataset": "data/shop", "out": str(out), "train": train, "space": space, **defaults, **more}


def sweep_of(out: Path) -> list[Trial]:
    return list(Sweep(out / "trials.jsonl"))


def test_a_sweep_over_all_modes_ends_with_a_ready_yaml_for_each(cluster: str, tmp_path: Path) -> None:
    config = load_config(TuneConfig, **options(tmp_path / "sweep", modes=["all"], trials=2))
    summary = run(config, build=StandIn)
    assert summary.counts["trials"] == 8
    assert summary.counts["failed"] == 0
    assert summary.counts["stopped"] > 0
    for mode in config.modes:
        trials = [trial for trial in sweep_of(config.out) if trial.mode == mode]
        best = max((trial for trial in trials if trial.status == "completed"), key=lambda trial: trial.value)
        assert trials[0].config["lr"] == 1e-4, "the documented default is tried first"
        assert best.value >= trials[0].value
        ready = load_config(TrainConfig, file=config.out / "best" / f"{mode}.yaml")
        assert (ready.mode, ready.lr, ready.batch_size) == (mode, best.config["lr"], best.config["batch_size"])
        assert quality(ready.lr, ready.epochs) == best.value
        for trial in trials:
            kept = (config.out / "runs" / trial.trial_id / "qwen3vl_rerank").exists()
            assert kept == (trial.trial_id == best.trial_id), "only the winner's weights stay on the disk"
            if trial.status == "stopped":
                assert trial.stop_reason == f"ASHA at epoch {trial.epochs_run:g}"
                assert trial.epochs_run < 4
    assert not (config.out / ".tune").exists()
    lines = [json.loads(line) for line in (config.out / "trials.jsonl").read_text().splitlines()]
    assert {"mode", "trial_id", "config", "status", "stop_reason", "epochs", "seconds"} <= lines[0].keys()
    assert lines[0]["epochs"][0]["metric"] == quality(1e-4, 1)

    def starts() -> list[str]:
        return [file.read_text() for file in sorted((config.out / "runs").glob("*/starts"))]

    before = starts()
    assert run(config, build=StandIn).counts == summary.counts
    assert starts() == before, "nothing ran again"


def test_a_failing_trial_is_retried_then_reported_and_the_sweep_goes_on(cluster: str, tmp_path: Path) -> None:
    space = {"max_grad_norm": {"choice": [1.0, 13.0]}}
    config = load_config(TuneConfig, **options(tmp_path / "sweep", space=space, seed=1, trials=3, scheduler="none"))
    summary = run(config, build=StandIn)
    failed = [trial for trial in sweep_of(config.out) if trial.status == "failed"]
    assert 0 < len(failed) == summary.counts["failed"] < 3
    for trial in failed:
        assert "the GPU fell off the bus" in (trial.stop_reason or "")
        assert len((config.out / "runs" / trial.trial_id / "starts").read_text().splitlines()) == 2
        assert trial.epochs_run == 1
    assert summary.counts["completed"] + summary.counts["stopped"] == 3 - len(failed)


@pytest.mark.parametrize(
    ("max_grad_norm", "reason"), [(13, "the GPU fell off the bus"), (14, "failed: the model has no tokenizer\n")]
)
def test_a_sweep_in_which_every_trial_fails_says_why(
    cluster: str, tmp_path: Path, max_grad_norm: int, reason: str
) -> None:
    more = {"train": {"max_grad_norm": max_grad_norm}, "trials": 1, "trial_retries": 0}
    with pytest.raises(UserError, match=r"not one trial of the sweep succeeded\ncaption: .*" + reason):
        run(load_config(TuneConfig, **options(tmp_path / "sweep", **more)), build=StandIn)


def test_optuna_starts_from_the_default_and_continues_from_the_files(cluster: str, tmp_path: Path) -> None:
    config = load_config(TuneConfig, **options(tmp_path / "sweep", search="optuna", trials=3))
    run(config, build=StandIn)
    points = [trial.config for trial in sweep_of(config.out)]
    assert points[0] == {"lr": 1e-4, "batch_size": 16}
    assert len({json.dumps(point, sort_keys=True) for point in points}) == 3
    assert all(2e-5 <= point["lr"] <= 5e-4 and point["batch_size"] in (8, 16) for point in points)


def test_fresh_seeds_tell_gain_from_selection_noise(cluster: str, tmp_path: Path) -> None:
    config = load_config(TuneConfig, **options(tmp_path / "sweep", confirm_seeds=2, trials=3))
    run(config, build=StandIn)
    best = json.loads((config.out / "best.json").read_text())["caption"]
    assert best["seeds"] == 2
    assert best["gain"] >= 0
    assert best["selection_noise"] == pytest.approx(best["gain"] - best["confirmed_gain"])
    seeds = {trial.trial_id.rpartition("seed")[2] for trial in Sweep(config.out / "confirm.jsonl")}
    assert seeds == {"1001", "1002"}


def test_killed_three_times_the_same_command_finishes_the_sweep(cluster: str, tmp_path: Path) -> None:
    out, file = tmp_path / "sweep", tmp_path / "sweep.yaml"
    # Slow epochs, so that every kill comes in the middle of a trial.
    file.write_text(yaml.safe_dump(options(out, train={"weight_decay": 0.4, "epochs": 6}, trials=5)))
    command = [sys.executable, str(Path(__file__).with_name("stand_in.py")), str(file), cluster]
    finished_before: dict[str, Trial] = {}
    for kill in range(3):
        seen = epochs_in(out)
        driver = Program(*command)
        try:
            driver.wait_for(lambda seen=seen: epochs_in(out) >= seen + 2, "two more epochs")
        finally:
            driver.kill()
        trials = {trial.trial_id: trial for trial in sweep_of(out)}
        assert any(not trial.finished for trial in trials.values()), f"kill {kill} came too late"
        for trial_id, trial in finished_before.items():
            assert trials[trial_id] == trial, "a finished trial is not touched by a later run"
        finished_before = {trial_id: trial for trial_id, trial in trials.items() if trial.finished}
    Program(*command).finish()
    trials = {trial.trial_id: trial for trial in sweep_of(out)}
    assert all(trial.status in ("completed", "stopped") for trial in trials.values())
    assert any(trial.attempts > 1 for trial in trials.values()), "some trials were interrupted and resumed"
    for trial in trials.values():
        assert [entry["epoch"] for entry in trial.epochs] == list(range(1, int(trial.epochs_run) + 1))
        assert [entry["metric"] for entry in trial.epochs] == [
            quality(trial.config["lr"], epoch) for epoch in range(1, int(trial.epochs_run) + 1)
        ]
        history = (out / "runs" / trial.trial_id / "history.jsonl").read_text().splitlines()
        # A stopped trial's worker may be an epoch ahead of the decision, but no epoch is ever trained twice.
        assert len({json.loads(line)["epoch"] for line in history}) == len(history)


def epochs_in(out: Path) -> int:
    return sum(len(trial.epochs) for trial in sweep_of(out)) if (out / "trials.jsonl").exists() else 0

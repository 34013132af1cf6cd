"""The file of a sweep is what a resume relies on; the winner and its gain are what a user acts on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlrank.errors import UserError
from vlrank.tuning.asha import Asha, expected_epochs, rungs
from vlrank.tuning.results import selection, verdict
from vlrank.tuning.run import open_sweep
from vlrank.tuning.search import add_evaluation
from vlrank.tuning.space import optuna_point, parse_space
from vlrank.tuning.trials import Sweep, Trial, interval


def trial(name: str, *values: float, status: str = "completed", **more: object) -> Trial:
    made = Trial(mode="caption", trial_id=f"caption-{name}", config={"lr": 1e-4}, metric="recall@10", **more)  # type: ignore[arg-type]
    made.status = status  # type: ignore[assignment]
    for epoch, value in enumerate(values, 1):
        made.record(epoch, value)
    return made


def sweep_with(path: Path, *trials: Trial) -> Sweep:
    sweep = Sweep(path / "trials.jsonl")
    for one in trials:
        sweep.add(one)
    return sweep


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    sweep = sweep_with(tmp_path, trial("000", 0.1, 0.2), trial("001", status="pending"))
    sweep.save()
    assert list(Sweep(sweep.path)) == list(sweep)
    line = json.loads(sweep.path.read_text().splitlines()[0])
    assert line["epochs"] == [{"epoch": 1, "metric": 0.1}, {"epoch": 2, "metric": 0.2}]


def test_a_damaged_file_is_named_with_its_line(tmp_path: Path) -> None:
    sweep = sweep_with(tmp_path, trial("000"))
    sweep.save()
    with sweep.path.open("a") as file:
        file.write('{"mode": "cap')
    with pytest.raises(UserError, match=r"trials.jsonl line 2 is not a trial"):
        Sweep(sweep.path)


def test_an_epoch_repeated_after_a_resume_counts_once() -> None:
    one = trial("000", 0.1, 0.2)
    one.record(2, 0.25)
    assert [entry["metric"] for entry in one.epochs] == [0.1, 0.25]
    assert (one.value, one.epochs_run) == (0.25, 2)
    two = trial("001")
    for step, value in ((10, 0.3), (20, 0.1), (20, 0.2)):
        two.record(1, value, step=step)
    assert [entry["metric"] for entry in two.epochs] == [0.3, 0.2], "several evaluations of an epoch all count"


def test_interrupted_trials_go_first_then_round_the_modes(tmp_path: Path) -> None:
    sweep = sweep_with(
        tmp_path, *(Trial(mode, f"{mode}-{i}", {}, "recall@10") for mode in ("raw_image", "caption") for i in range(2))
    )
    sweep.trials["caption-1"].status = "running"
    assert [one.trial_id for one in sweep.unfinished()] == ["caption-1", "raw_image-0", "caption-0", "raw_image-1"]


def test_the_winner_ran_to_its_end(tmp_path: Path) -> None:
    sweep = sweep_with(
        tmp_path,
        trial("000", 0.1, 0.3),
        trial("001", 0.9, status="stopped"),
        trial("002", 0.95, status="failed"),
        trial("003", 0.3, 0.2),
    )
    best = sweep.best_of("caption")
    assert best is not None
    assert best.trial_id == "caption-000", "among equals the earlier trial, so that the defaults win a tie"
    assert sweep_with(tmp_path / "x", trial("000", status="failed")).best_of("caption") is None


def test_the_interval_of_a_recall_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    low, high = interval(trial("000", 81 / 263, users=263)) or (0, 0)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert interval(trial("000", 0.5)) is None


def test_rungs_and_what_asha_is_expected_to_save() -> None:
    assert rungs(1, 3, 10) == [1, 3, 9]
    assert rungs(1, 3, 9) == [1, 3], "nothing is saved by stopping at the last epoch"
    assert rungs(4, 2, 4) == []
    assert expected_epochs(27, 1, 3, 9) == (27 + 9 * 2 + 3 * 6, 24)
    assert expected_epochs(4, 4, 2, 4) == (16, 0)


def asha_over(sweep: Sweep, epochs: int = 9, factor: int = 3) -> Asha:
    modes = {trial.mode: epochs for trial in sweep}
    return Asha(sweep, modes, lambda trial: epochs, grace_period=1, reduction_factor=factor)


def run_to_the_end(curves: list[list[float]], folder: Path, factor: int, at_once: int, kills: Any = None) -> Sweep:
    """A sweep without Ray: ``at_once`` trials report in turn; a kill forgets everything but the sweep's file."""
    epochs, sweep = len(curves[0]), Sweep(folder / "trials.jsonl")
    for number in range(len(curves)):
        sweep.add(trial(f"{number:03d}", status="pending"))
    asha, running = asha_over(sweep, epochs, factor), []
    while True:
        while len(running) < at_once:
            one = asha.promote([other.trial_id for other in running]) or next(
                (other for other in sweep.unfinished() if other.status != "paused" and other not in running), None
            )
            if one is None:
                break
            one.status = "running"
            running.append(one)
        if not running:
            return sweep
        for one in list(running):
            epoch = len(one.epochs) + 1
            one.record(epoch, curves[int(one.trial_id[-3:])][epoch - 1])
            if not asha.trains_on(one):
                one.status = "paused"
            elif epoch == epochs:
                one.status = "completed"
            running = [other for other in running if other.status == "running"]
        sweep.save()
        if kills is not None and kills.draw(st.booleans()):
            sweep = Sweep(folder / "trials.jsonl")
            asha, running = asha_over(sweep, epochs, factor), []


VALUES = st.floats(0, 1, allow_nan=False).map(lambda value: round(value, 3))


@given(
    curves=st.integers(1, 13).flatmap(
        lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=1, max_size=9)
    ),
    factor=st.integers(2, 4),
    at_once=st.integers(1, 4),
    kills=st.data(),
)
def test_halving_ends_with_a_winner_and_leaves_nobody_behind(
    curves: list[list[float]], factor: int, at_once: int, kills: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sweep = run_to_the_end(curves, tmp_path_factory.mktemp("sweep"), factor, at_once, kills)
    trials, epochs = list(sweep), len(curves[0])
    assert {one.status for one in trials} <= {"paused", "completed"}
    assert any(one.status == "completed" for one in trials)
    for rung in rungs(1, factor, epochs):
        arrived = [one for one in trials if one.epochs_run >= rung]
        assert arrived, "every rung is reached by somebody"
        arrived.sort(key=lambda one: -max(curves[int(one.trial_id[-3:])][:rung]))
        for one in arrived[: max(1, len(arrived) // factor)]:
            assert one.epochs_run > rung, "the best of a rung went on"
    for one in trials:
        assert [entry["epoch"] for entry in one.epochs] == list(range(1, len(one.epochs) + 1)), "no epoch twice"


def test_one_in_three_goes_on_and_only_when_three_have_come(tmp_path: Path) -> None:
    sweep = run_to_the_end([[e / 100 - i / 20 for e in range(9)] for i in range(9)], tmp_path, factor=3, at_once=1)
    assert [one.epochs_run for one in sweep] == [9, 3, 3, 1, 1, 1, 1, 1, 1]
    assert expected_epochs(9, 1, 3, 9) == (sum(one.epochs_run for one in sweep), 8)


def test_a_sweep_too_small_to_halve_still_has_a_winner(tmp_path: Path) -> None:
    sweep = run_to_the_end([[0.1] * 9, [0.2] * 9], tmp_path, factor=3, at_once=2)
    assert [one.epochs_run for one in sweep] == [1, 9]


def test_a_failed_trial_makes_room_for_the_next(tmp_path: Path) -> None:
    statuses = {"000": (0.9, "failed"), "001": (0.8, "paused"), "002": (0.7, "paused"), "003": (0.6, "paused")}
    sweep = sweep_with(tmp_path, *(trial(name, value, status=status) for name, (value, status) in statuses.items()))
    asha = asha_over(sweep)
    assert asha.promote() is sweep.trials["caption-001"]
    assert asha.promote(["caption-001"]) is None, "it is on its way"
    assert asha.promote() is sweep.trials["caption-001"], "unless it was killed before it started"


def test_modes_are_never_compared_with_each_other(tmp_path: Path) -> None:
    sweep = sweep_with(tmp_path, *(trial(f"00{i}", 0.9, status="completed") for i in range(3)))
    other = sweep.add(Trial("raw_image", "raw_image-000", {}, "recall@10", status="running"))
    other.record(1, 0.1)
    assert asha_over(sweep).trains_on(other)


def test_optuna_learns_from_the_files_and_repeats_itself() -> None:
    space = parse_space({"lr": {"loguniform": [1e-5, 1e-2]}, "batch_size": {"choice": [8, 16]}})
    others = []
    for number in range(12):
        one = trial(f"{number:03d}", 0.9 if number % 2 else 0.1)
        one.config = {"lr": 1e-3 * (1 + number / 100) if number % 2 else 1e-5 * (1 + number), "batch_size": 8}
        others.append(one)
    others[0].config = {"lr": 0.5, "batch_size": 64}  # defaults outside the space are no obstacle
    results = [(one.config, one.value) for one in others]
    points = [optuna_point(results, space, index=12, total=13, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert points[0] == points[1]
    assert sum(point["lr"] > 2e-4 for point in points[1:]) >= 3, "most suggestions lie near the good trials"


def test_fresh_seeds_say_how_much_of_the_gain_was_luck() -> None:
    default, best = trial("000", 0.50), trial("005", 0.60)
    confirmation = [
        trial("best-005-seed1001", 0.55),
        trial("best-005-seed1002", 0.57),
        trial("default-000-seed1001", 0.52),
        trial("default-000-seed1002", 0.50),
        trial("best-003-seed1001", 0.99),  # of an earlier winner
    ]
    found = selection(default, best, confirmation)
    assert found["confirmed_gain"] == pytest.approx(0.05)
    assert found["selection_noise"] == pytest.approx(0.05)
    assert found["confirmed_gain_se"] == pytest.approx(0.02)
    assert "+0.0500 of the gain was selection noise" in verdict(default, best, found)
    assert selection(default, default, [])["gain"] == 0
    assert "no trial was better" in verdict(default, default, {"gain": 0.0})


def test_defaults_that_asha_stopped_leave_the_gain_unknown() -> None:
    """Half a schedule against a whole one: the epochs that are missing would pass for a gain, and then for noise."""
    default, best = trial("000", 0.30, status="stopped"), trial("005", 0.60)
    confirmation = [trial("best-005-seed1001", 0.55), trial("default-000-seed1001", 0.54)]
    found = selection(default, best, confirmation)
    assert "gain" not in found
    assert found["confirmed_gain"] == pytest.approx(0.01)
    said = verdict(default, best, found)
    assert "so the gain is unknown" in said
    assert "+0.0100" in said
    assert "noise" not in said


def test_a_rung_is_reached_at_the_end_of_an_epoch() -> None:
    """With eval_steps an evaluation after a quarter of an epoch would be measured against whole epochs."""
    known = trial("000", status="running")
    known.epochs = []
    for step, done in ((25, 0.25), (100, 1.0)):
        add_evaluation(known, {"epoch": 1, "epochs_done": done, "step": step, known.metric: 0.1})
    assert [entry["epoch"] for entry in known.epochs] == [0.25, 1.0]


def test_a_replayed_evaluation_keeps_its_time() -> None:
    known = trial("000", status="running")
    known.epochs = []
    known.record(1, 0.1, step=10, seconds=60)
    known.record(1, 0.1, step=10, seconds=90)
    assert known.epochs == [{"epoch": 1, "metric": 0.1, "step": 10, "seconds": 60}]


def test_what_validation_measures_is_not_searched() -> None:
    """With four negatives Recall@10 is 1 for every model: that trial would win."""
    for key in ("negatives", "val_users", "ranking.missing"):
        with pytest.raises(UserError, match="changes what validation measures"):
            parse_space({key: {"choice": [4, 19]}})


def test_a_sweep_is_not_continued_with_other_options(tmp_path: Path) -> None:
    from vlrank.config import TuneConfig, load_config

    def config(**more: object) -> TuneConfig:
        return load_config(TuneConfig, dataset="data/shop", out=tmp_path / "sweep", **more)

    open_sweep(config(), [], {})
    open_sweep(config(max_concurrent_trials=3, trial_retries=5), [], {})
    with pytest.raises(UserError, match="other options: seed, trials"):
        open_sweep(config(seed=1, trials=3), [], {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no sweep"):
        open_sweep(load_config(TuneConfig, dataset="d", out=tmp_path / "full"), [], {})

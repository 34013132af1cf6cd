"""Where the time of a run went: phases that add up to the wall clock, across processes and attempts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlrank.config import TrainConfig, load_config
from vlrank.training import timeline as timeline_file
from vlrank.training import worker
from vlrank.training.run import _timeline
from vlrank.training.timeline import Timeline, as_result


class Clock:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timeline_file, "time", made)
    return made


def test_driver_and_worker_make_one_timeline_that_adds_up(clock: Clock) -> None:
    driver = Timeline(began=998.0)
    clock.now += 1  # 3 s since Enter
    driver.enter("Ray")
    clock.now += 2
    given = json.loads(json.dumps(driver.handed_on()))
    clock.now += 4  # the worker starts
    worker = Timeline.taken_over(given)
    worker.enter("imports")
    clock.now += 5
    worker.enter("learning")
    with worker.during("validation"):
        clock.now += 7
    clock.now += 10
    worker.count(100, 2000)
    worker.move(2.0, "compilation")
    back = json.loads(json.dumps(worker.handed_on()))
    clock.now += 1.5
    driver = Timeline.taken_over(back)
    driver.enter("end")
    clock.now += 1
    result = as_result(driver.attempts)
    assert result["phases"] == {
        "start": 3.0,
        "Ray": 6.0,
        "imports": 5.0,
        "compilation": 2.0,
        "learning": 9.5,
        "validation": 7.0,
        "end": 1.0,
    }
    assert result["seconds"] == sum(result["phases"].values()) == clock.now - 998.0
    assert result["samples_per_s"] == pytest.approx(100 / 9.5)


def test_a_clock_that_is_behind_takes_no_time_away(clock: Clock) -> None:
    given = Timeline(phase="Ray").handed_on()
    clock.now -= 3  # of the worker's node
    worker = Timeline.taken_over(given)
    worker.enter("imports")
    assert min(worker.seconds.values()) >= 0


def config_of(out: Path, **changes: object) -> TrainConfig:
    return load_config(TrainConfig, dataset=out / "data", out=out, mode="caption", **changes)


def test_a_resumed_run_adds_up_its_attempts(clock: Clock, tmp_path: Path) -> None:
    first = Timeline(phase="learning")
    clock.now += 30
    first.count(300, 3000)
    (tmp_path / "progress.json").write_text(json.dumps({"step": 3, "timeline": first.handed_on()}))
    clock.now += 1000  # killed; nobody works
    assert _timeline(config_of(tmp_path, resume="never")).earlier == []
    second = _timeline(config_of(tmp_path))
    second.enter("learning")
    clock.now += 10
    second.count(50, 500)
    result = as_result(second.attempts)
    assert [attempt["seconds"] for attempt in result["attempts"]] == [30.0, 10.0]
    assert (result["seconds"], result["phases"]["learning"]) == (40.0, 40.0)
    assert result["samples_per_s"] == 350 / 40


@pytest.mark.parametrize("left", ["", "{", "{}", '{"timeline": null}'])
def test_what_a_kill_left_half_written_is_no_attempt(tmp_path: Path, left: str) -> None:
    (tmp_path / "progress.json").write_text(left)
    assert _timeline(config_of(tmp_path)).earlier == []


def test_the_worker_after_a_failed_one_goes_on_with_its_time(clock: Clock, tmp_path: Path) -> None:
    driver = Timeline(phase="Ray")
    given = driver.handed_on()
    progress = tmp_path / "progress.json"
    progress.write_text(json.dumps({"timeline": given}))
    clock.now += 5
    first = worker._timeline(config_of(tmp_path), given, rank=0)
    assert first.seconds == {"Ray": 5.0}
    clock.now += 20
    progress.write_text(json.dumps({"timeline": first.handed_on()}))
    clock.now += 8  # it fails, and another one starts
    second = worker._timeline(config_of(tmp_path), given, rank=0)
    assert second.seconds == {"Ray": 5.0, "imports": 20.0, "restart": 8.0}

"""The contract of every script in jobs/: flags in, one JSON last line and an exit code out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from vlrank.config import EvaluateConfig
from vlrank.console import Summary
from vlrank.errors import UserError
from vlrank.jobs import main

Capture = pytest.CaptureFixture[str]


def outcome(capsys: Capture, stage: object, argv: Sequence[str], **options: object) -> tuple[int, dict]:
    with pytest.raises(SystemExit) as exit_:
        main(stage, EvaluateConfig, argv, **options)  # type: ignore[arg-type]
    return int(exit_.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])


ARGV = ["data/shop", "--rankings", "a.parquet", "b.parquet", "--out", "report"]


def test_a_finished_job_prints_where_its_output_lies(capsys: Capture) -> None:
    seen: list[EvaluateConfig] = []

    def stage(config: EvaluateConfig) -> Summary:
        seen.append(config)
        print("noise on stdout before the last line")
        return Summary("Evaluated", {"users": 3}, Path("report/index.html"), {"users": 3})

    code, line = outcome(capsys, stage, ARGV)
    assert code == 0
    assert line == {
        "status": "ok",
        "output": "report/index.html",
        "counts": {"users": 3},
        "message": "Evaluated; users: 3",
    }
    assert seen == [EvaluateConfig(dataset="data/shop", rankings=("a.parquet", "b.parquet"), out="report")]


def test_a_wrong_config_exits_with_2_before_the_stage_starts(capsys: Capture) -> None:
    def stage(config: EvaluateConfig) -> Summary:
        raise AssertionError("must not run")

    code, line = outcome(capsys, stage, [*ARGV, "--bootstraps", "500"])
    assert code == 2
    assert line["status"] == "error"
    assert "--bootstraps" in line["message"]


def test_a_users_error_exits_with_2_and_a_crash_with_1(capsys: Capture) -> None:
    def user_error(config: EvaluateConfig) -> Summary:
        raise UserError("a.parquet is missing", "Run vlrank rerank first.")

    def crash(config: EvaluateConfig) -> Summary:
        raise ZeroDivisionError("division by zero")

    def user_error_from_a_worker(config: EvaluateConfig) -> Summary:
        raise RuntimeError("task failed") from UserError("item 7 has no text")

    assert outcome(capsys, user_error, ARGV) == (
        2,
        {"status": "error", "output": None, "counts": {}, "message": "a.parquet is missing\nRun vlrank rerank first."},
    )
    code, line = outcome(capsys, crash, ARGV)
    assert (code, line["message"]) == (1, "ZeroDivisionError: division by zero")
    code, line = outcome(capsys, user_error_from_a_worker, ARGV)
    assert (code, line["message"]) == (2, "item 7 has no text")


def test_dry_run_calls_the_plan_and_not_the_stage(capsys: Capture) -> None:
    def stage(config: EvaluateConfig) -> Summary:
        raise AssertionError("must not run")

    code, line = outcome(
        capsys, stage, [*ARGV, "--dry_run"], dry_run=lambda config: Summary("Would evaluate", {}, None, {})
    )
    assert (code, line["message"]) == (0, "Would evaluate")
    code, line = outcome(capsys, stage, [*ARGV, "--dry_run"])
    assert code == 0
    assert "the config is valid" in line["message"]


@pytest.mark.parametrize("argv", [["--bootstrap"], ["data/shop", "second"], ["--out", "report"], ["--unknown", "1"]])
def test_unfinished_arguments_exit_with_2_and_say_why(capsys: Capture, argv: list[str]) -> None:
    code, line = outcome(capsys, lambda config: Summary("must not run"), argv)
    assert code == 2
    assert line["message"]


def test_historic_flags_reach_the_config(capsys: Capture) -> None:
    seen: list[EvaluateConfig] = []

    def stage(config: EvaluateConfig) -> Summary:
        seen.append(config)
        return Summary("done")

    outcome(capsys, stage, [*ARGV, "--rounds", "200"], aliases={"bootstrap": ["--rounds"]})
    assert seen[0].bootstrap == 200


def test_relative_paths_of_a_job_are_taken_from_the_shared_folder(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts a job in a copy of its working directory that goes away with it: results there would be lost."""
    seen: list[tuple[EvaluateConfig, Path]] = []

    def stage(config: EvaluateConfig) -> Summary:
        seen.append((config, Path.cwd()))
        return Summary("done")

    job = tmp_path / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    code, line = outcome(capsys, stage, ARGV)
    assert (code, seen) == (2, [])
    assert "`dataset` is data/shop, a relative path" in line["message"]
    assert "VLRANK_WORKDIR" in line["message"]

    monkeypatch.setenv("VLRANK_WORKDIR", str(tmp_path))
    assert outcome(capsys, stage, ARGV)[0] == 0
    ((config, folder),) = seen
    assert (config.dataset, config.out, folder) == (tmp_path / "data/shop", tmp_path / "report", tmp_path)
    monkeypatch.setenv("VLRANK_WORKDIR", str(tmp_path / "not_mounted"))
    code, line = outcome(capsys, stage, ARGV)
    assert code == 2
    assert "not_mounted cannot be entered" in line["message"]

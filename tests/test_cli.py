"""The command line as a newcomer meets it: help, refusals with exit code 2, and no tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vlrank.cli import cli
from vlrank.config import EvaluateConfig, TrainConfig
from vlrank.console import Summary
from vlrank.data.dataset import Dataset
from vlrank.errors import UserError
from vlrank.options import main, stage_command
from vlrank.stages import STAGES


def vlrank(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlrank.cli", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_help_names_every_stage_without_loading_torch_or_ray() -> None:
    code = (
        "import sys, vlrank.cli as c; c.cli(['--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'ray', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for stage in (
        "demo",
        "doctor",
        "prepare",
        "generate",
        "retrieve",
        "train",
        "tune",
        "rerank",
        "evaluate",
        "serve",
        "inspect",
    ):
        assert stage in done.stdout
    assert done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_stage_explains_its_options(stage: str) -> None:
    done = CliRunner().invoke(cli, [stage, "--help"])
    assert done.exit_code == 0
    assert "--config" in done.output
    assert "--dry_run" in done.output
    if stage in ("train", "rerank"):  # what a message sends its reader here for
        assert "ray.address" in done.output
        assert {"train": "ranking.top_k", "rerank": "engine.replicas"}[stage] in done.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "data", "--mode", "captions", "--out", "run"], "captions"),
        (["train", "data", "--mode", "caption", "--out", "run", "lrr=1"], "did you mean `lr`"),
        (["train", "data", "--mode", "caption"], "`out` is required"),
        (["train", "data", "--nonsense"], "--nonsense"),
        (["generate", "data", "--what", "poem"], "poem"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_usage_is_one_message_and_exit_code_2(arguments: list[str], named: str, tmp_path: Path) -> None:
    done = vlrank(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_dataset_is_named_with_the_command_that_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in (
        ["generate", "nowhere", "--what", "caption"],
        ["retrieve", "nowhere"],
        ["train", "nowhere", "--mode", "caption", "--out", "run"],
        ["tune", "nowhere", "--out", "sweep"],
        ["rerank", "nowhere", "--model", "run", "--out", "r.parquet"],
        ["evaluate", "nowhere", "--rankings", "r.parquet", "--out", "report"],
        ["inspect", "nowhere"],
    ):
        assert _run(cli, *stage) == 2, stage
        said = capsys.readouterr().err
        assert "nowhere" in said, stage
        assert "vlrank prepare" in said, stage
        assert list(tmp_path.iterdir()) == [], stage


def _run(command: click.Command, *arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(command, arguments)
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    "words",
    [
        "train {shop} --mode semantic_summary_small --model {model} --out run",
        "tune {shop} --modes semantic_summary_small --out sweep train.model={model}",
        "rerank {shop} --model {model} --out ranked.parquet",
        "generate {shop} --what semantic_summary --model {model}",
        "serve {model} --dataset {shop}",
        "export {model} --out exported",
    ],
    ids=lambda words: words.split()[0],
)
@pytest.mark.parametrize("model", ["capton", "runs/capton", "models/of/capton"])
def test_a_misspelt_model_is_the_same_message_in_every_command(
    words: str, model: str, shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: as a name of the hub it was looked up in a network for minutes, by each trial of a sweep."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^model folder {model} does not exist\nGive a model folder, a run folder"):
        cli(words.format(shop=shop.path, model=model).split(), standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["rerank {shop} --model {model} --out a.parquet", "serve {model} --dataset {shop}"])
def test_what_may_be_a_path_or_a_model_on_the_hub_is_said_to_be_no_folder(words: str, shop: Dataset) -> None:
    with pytest.raises(
        UserError, match=r"model folder sweep/capton does not exist\nCheck the path.* as_mode="
    ) as error:
        cli(words.format(shop=shop.path, model="sweep/capton").split(), standalone_mode=False)
    assert "hub" in str(error.value.remedy)


def test_options_become_the_config() -> None:
    seen: list[TrainConfig] = []

    def run(config: TrainConfig) -> Summary:
        seen.append(config)
        return Summary("train")

    command = stage_command("train", TrainConfig, run, aliases={"lr": ["--rerank_lr"]})
    code = _run(command, "data", "--mode", "caption", "--out", "run", "--rerank_lr", "2e-4", "ranking.window=30")
    assert code == 0
    assert (seen[0].dataset, seen[0].lr, seen[0].ranking.window) == (Path("data"), 2e-4, 30)


def test_a_repeatable_option_takes_several_values_up_to_the_next_option_or_override() -> None:
    seen: list[EvaluateConfig] = []

    def run(config: EvaluateConfig) -> Summary:
        seen.append(config)
        return Summary("evaluate")

    command = stage_command("evaluate", EvaluateConfig, run)
    assert _run(command, "data", "--rankings", "a", "b", "--out", "x", "--rankings", "c", "seed=3") == 0
    assert seen[0].rankings == (Path("a"), Path("b"), Path("c"))
    assert (seen[0].out, seen[0].seed) == (Path("x"), 3)
    # What reports call a method may hold an equals sign.
    command = stage_command("evaluate", EvaluateConfig, run)
    given = ["data", "--rankings", "a", "--out", "x", "--compare", "caption permutations=3", "caption fusion=0.4"]
    assert _run(command, *given, "seed=3") == 0
    assert (seen[1].compare, seen[1].seed) == (("caption permutations=3", "caption fusion=0.4"), 3)


def test_failures_end_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(config: EvaluateConfig) -> Summary:
        raise UserError("rankings file a is empty [0 rows]", "Run `vlrank rerank` again.")

    command = stage_command("evaluate", EvaluateConfig, refuse)
    assert _run(command, "data", "--rankings", "a", "--out", "x") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["error: rankings file a is empty [0 rows]", "Run `vlrank rerank` again."]


def test_dry_run_does_not_run() -> None:
    def run(config: EvaluateConfig) -> Summary:
        raise AssertionError("a dry run must not run the stage")

    command = stage_command("evaluate", EvaluateConfig, run)
    assert _run(command, "data", "--rankings", "a", "--out", "x", "--dry_run") == 0


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii:strict", "COLUMNS": "60"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "40"}],
)
def test_commands_end_well_on_consoles_without_utf_8(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "shop [v2]=50%20 [b] #1"
    folder.mkdir()
    reviews = [{"user": f"ü{n % 4}", "item": f"茶{n // 4}", "timestamp": 1_600_000_000 + n} for n in range(24)]
    meta = [{"item": f"茶{n}", "title": f"Tee [/b] {n}", "description": "grün " * 40} for n in range(6)]
    for name, rows in (("r [1]=.jsonl", reviews), ("m [1]=.jsonl", meta)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "vlrank", *arguments]
        done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return "".join(line.strip(b"| ").decode() for line in done.stdout.splitlines())

    run("prepare", "--reviews", "r [1]=.jsonl", "--meta", "m [1]=.jsonl", "--out", "d [v2]", "min_sc=2")
    assert "Tee [/b] 3" in run("inspect", "d [v2]", "--item", "4")
    run("inspect", "d [v2]", "--user", "1")
    run("retrieve", "d [v2]", "--method", "popularity")
    run("lists", "d [v2]", "--lists", "popularity", "--out", "o [1]=%41.parquet")
    assert "+-" in run("evaluate", "d [v2]", "--rankings", "o [1]=%41.parquet", "--out", "report [v2]")
    assert (folder / "report [v2]" / "report.html").is_file()

"""Jobs on a real cluster of three nodes with token authentication, submitted over HTTP as a user would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import yaml

from vlrank.config import RetrieveConfig, TrainConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.data.schemas import RANKINGS
from vlrank.data.shop import write_raw_shop
from vlrank.data.tables import write_parquet_atomic
from vlrank.errors import UserError
from vlrank.submit import Environment, absolute_paths, config_of, job_name, package

from .nodes import Nodes

VLRANK = """
import sys
from vlrank.options import main
from vlrank.submit import jobs_command, submit_command
main({"submit": submit_command, "jobs": jobs_command}[sys.argv[1]], sys.argv[2:])
"""


class User:
    """Somebody at a terminal who knows the cluster's address and token."""

    def __init__(self, nodes: Nodes, workdir: Path) -> None:
        self.nodes = nodes
        self.workdir = workdir

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        address = {"RAY_API_SERVER_ADDRESS": self.nodes.url, "COLUMNS": "200"}
        return subprocess.Popen(
            [sys.executable, "-c", VLRANK, *words],
            env=self.nodes.environment | address | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, code: int = 0, **environment: str) -> str:
        process = self.start(*words, **environment)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == code, output
        return output

    def submit(self, stage: str, *words: str, code: int = 0) -> str:
        return self.run("submit", "--workdir", str(self.workdir), stage, *words, code=code)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    workdir = tmp_path_factory.mktemp("shared")
    write_raw_shop(workdir / "raw", n_items=40, n_users=60)
    nodes = Nodes()
    try:
        nodes.start_head()
        nodes.add_worker(cpus=4)
        nodes.add_worker(cpus=4, gpus=2)
        yield User(nodes, workdir)
    finally:
        nodes.stop()


def last_line(output: str) -> dict[str, object]:
    return json.loads([line for line in output.splitlines() if line.startswith('{"status"')][-1])


def job_id(output: str) -> str:
    return re.search(r"vlrank-[a-z]+-[0-9a-f]{12}", output)[0]  # type: ignore[index]


@pytest.mark.stack
def test_prepare_retrieve_and_evaluate_run_as_jobs(user: User) -> None:
    prepare = ["--reviews", "raw/reviews.json.gz", "--meta", "raw/meta.json.gz", "--out", "shop", "--min_uc", "3"]
    output = user.submit("prepare", *prepare, "--min_sc", "1")
    assert last_line(output)["status"] == "ok"
    dataset = Dataset.open(user.workdir / "shop")
    assert dataset.items().height > 20

    first = user.start("submit", "--workdir", str(user.workdir), "retrieve", "shop", "--name", "popular")
    second = user.start("submit", "--workdir", str(user.workdir), "retrieve", "shop", "--name", "more", "--top_k", "5")
    for process in (first, second):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert dataset.candidates("popular").height >= dataset.candidates("more").height > 0

    rankings = dataset.candidates("popular").filter(pl.col("split") == "test").with_columns(source=pl.lit("popular"))
    write_parquet_atomic(rankings, user.workdir / "popular.parquet", RANKINGS)
    output = user.submit("evaluate", "shop", "--rankings", "popular.parquet", "--out", "report")
    assert (user.workdir / "report" / "report.html").exists()

    again = user.submit("evaluate", "shop", "--rankings", "popular.parquet", "--out", "report")
    assert "known already" in again, "the same job is not run a second time"
    assert job_id(again) in user.run("jobs", "list")
    assert "succeeded" in user.run("jobs", "show", job_id(again)).lower()


@pytest.mark.stack
def test_a_wrong_config_never_leaves_the_users_machine(user: User) -> None:
    output = user.submit("train", "shop", "--mode", "caption", "--out", "run", "learning_rate=1", code=2)
    assert "unknown config key `learning_rate`" in output
    assert "relative path" in user.run("submit", "train", "shop", "--mode", "caption", "--out", "run", code=2)
    assert "vlrank-train" not in user.run("jobs", "list")


@pytest.mark.stack
def test_a_job_that_fails_says_why_in_its_status(user: User) -> None:
    output = user.submit("retrieve", "no_such_dataset", "--name", "x", code=2)
    assert "no_such_dataset" in output
    shown = user.run("jobs", "show", job_id(output))
    assert "failed" in shown.lower()
    assert "no_such_dataset" in shown
    # A wrong config sent past the check, through `ray job submit`, fails the same way and as fast.
    folder = user.workdir / "package"
    folder.mkdir()
    package(folder, {"dataset": "x", "out": "y", "mode": "captions"})
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--address", user.nodes.url, "--working-dir", str(folder), "--"]
    done = subprocess.run(
        [*command, "python", "-m", "vlrank.jobs", "train", "--config", "job.yaml"],
        env=user.nodes.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "unknown mode 'captions'" in done.stdout + done.stderr


@pytest.mark.stack
def test_a_wrong_token_is_refused(user: User) -> None:
    assert "refused the token" in user.run("jobs", "list", code=2, RAY_AUTH_TOKEN="wrong" * 8)
    assert "no Ray cluster answers" in user.run("jobs", "list", "--address", "http://127.0.0.1:9", code=2)


def config(**more: object) -> TrainConfig:
    return load_config(TrainConfig, **{"dataset": "shop", "out": "run", "mode": "caption", **more})


def test_relative_paths_are_taken_from_the_shared_folder() -> None:
    values = absolute_paths(config(out="/runs/a"), "/data")
    assert (values["dataset"], values["out"]) == ("/data/shop", "/runs/a")
    assert load_config(TrainConfig, **values) == config(dataset="/data/shop", out="/runs/a")
    with pytest.raises(UserError, match="`dataset` is shop, a relative path"):
        absolute_paths(config(), None)
    with pytest.raises(UserError, match="not an absolute path"):
        absolute_paths(config(), "data")


def test_the_same_stage_and_config_are_the_same_job() -> None:
    values = absolute_paths(config(), "/data")
    assert job_name("train", values) == job_name("train", dict(reversed(values.items())))
    assert job_name("train", values) != job_name("train", absolute_paths(config(lr=0.5), "/data"))
    assert job_name("train", values) != job_name("tune", values)


def test_a_package_runs_without_the_checkout(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    package(folder, {"dataset": "/nowhere", "method": "popularity"})
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "vlrank.jobs", "retrieve", "--config", "job.yaml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "/nowhere" in json.loads(done.stdout.splitlines()[-1])["message"]
    assert (folder / "vlrank" / "_configs" / "modes" / "caption.yaml").is_file()


def test_words_of_a_stage_become_its_config() -> None:
    assert config_of("retrieve", ["shop", "--top_k", "7"]) == RetrieveConfig(dataset="shop", top_k=7)
    with pytest.raises(UserError, match="unknown stage 'trian'"):
        config_of("trian", [])


def test_environments_choose_an_interpreter_per_stage(tmp_path: Path) -> None:
    file = tmp_path / "environment.yaml"
    file.write_text(yaml.safe_dump({"python": {"default": "python", "train": "/t"}, "env_vars": {"A": 1}}))
    environment = Environment.read(file)
    assert (environment.interpreter("train"), environment.interpreter("rerank")) == ("/t", "python")
    assert environment.env_vars == {"A": "1"}
    assert Environment.read(None).interpreter("train") is None
    file.write_text(yaml.safe_dump({"python": {"trian": "/t"}}))
    with pytest.raises(UserError, match="unknown stages: trian"):
        Environment.read(file)
    file.write_text("pip: [vllm]")
    with pytest.raises(UserError, match="only the mappings"):
        Environment.read(file)

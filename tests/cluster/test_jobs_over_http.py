"""Jobs on a real cluster of several nodes with token authentication, submitted over HTTP as a user would.

The tests follow one dataset from raw files to a report. The fixtures `dataset`, `captioned` and `trained` are jobs
themselves, run by whichever test asks first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
import yaml

from vlrank.config import PrepareConfig, RetrieveConfig, TrainConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.demo.shop import write_raw_shop
from vlrank.errors import UserError
from vlrank.paths import absolute_paths
from vlrank.submit import Environment, config_of, job_name, package
from vlrank.training.run import read_history

from .nodes import Nodes

ROOT = Path(__file__).resolve().parents[2]
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
        """`vlrank submit` or `vlrank jobs`."""
        return self._start([sys.executable, "-c", VLRANK, *words], environment)

    def start_ray_job(self, folder: Path, *command: str, env_vars: dict[str, str]) -> subprocess.Popen[str]:
        """`ray job submit`, for those who have Ray on their machine and not vlrank."""
        ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", str(folder)]
        return self._start([*ray, "--runtime-env-json", json.dumps({"env_vars": env_vars}), "--", *command], {})

    def _start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        known = {"RAY_API_SERVER_ADDRESS": self.nodes.url, "COLUMNS": "200"}
        return subprocess.Popen(
            command,
            env=self.nodes.environment | known | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, code: int = 0, **environment: str) -> str:
        return finish(self.start(*words, **environment), code)

    def submitting(self, stage: str, *words: object, env: Path | None = None) -> subprocess.Popen[str]:
        options = ["--workdir", str(self.workdir), *(["--env", str(env)] if env else [])]
        return self.start("submit", *options, stage, *map(str, words))

    def submit(self, stage: str, *words: object, code: int = 0) -> str:
        return finish(self.submitting(stage, *words), code)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> None:
    """Until the condition holds, while the process goes on."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early:\n{process.communicate()[0]}"
        assert time.monotonic() < end, "did not come so far"
        time.sleep(0.1)


def last_line(output: str) -> dict[str, object]:
    return json.loads([line for line in output.splitlines() if line.startswith('{"status"')][-1])


def job_id(output: str) -> str:
    return re.search(r"vlrank-[a-z]+-[0-9a-f]{12}", output)[0]  # type: ignore[index]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("[!.]*.parquet")}


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    workdir = tmp_path_factory.mktemp("shared")
    nodes = Nodes()
    try:
        nodes.start_head()
        nodes.add_worker(cpus=4)
        yield User(nodes, workdir)
    finally:
        nodes.stop()


@pytest.fixture(scope="module")
def dataset(user: User) -> Dataset:
    write_raw_shop(user.workdir / "raw", n_items=40, n_users=60)
    raw = ["--reviews", "raw/reviews.json.gz", "--meta", "raw/meta.json.gz", "--use_image"]
    output = user.submit("prepare", *raw, "--out", "shop", "--min_uc", 3, "--min_sc", 1)
    assert last_line(output)["status"] == "ok"
    return Dataset.open(user.workdir / "shop")


@pytest.fixture(scope="module")
def captioned(user: User, dataset: Dataset, tiny_vision_model: Path) -> dict[str, object]:
    """Captions, made while the cluster lives through what spot machines do; returns what was seen on the way."""
    # The groups with GPUs are scaled down to nothing, and known to exist. The drivers are on the head.
    environment = user.workdir / "environment.yaml"
    environment.write_text(yaml.safe_dump({"capacity": {"GPU": 1}, "entrypoint_cpus": {"default": 0}}))
    (dataset.path / dataset.items()["image_path"][0]).unlink()
    options = ["--what", "caption", "--model", tiny_vision_model, "--max_tokens", 24, "--image_side", 64]
    options += ["--shard_rows", 2, "--no_quality", "engine.name=transformers", "engine.batch_size=2"]
    captions = dataset.path / "captions"
    seen: dict[str, object] = {}

    generate = user.submitting("generate", "shop", *options, env=environment)
    retrieve = user.submitting("retrieve", "shop", "--method", "popularity", "--name", "popular")
    finish(retrieve)
    wait_for(lambda: "RUNNING" in user.run("jobs", "list"), generate)
    seen["before a GPU came"] = digests(captions)
    spot = user.nodes.add_worker(cpus=2, gpus=1)
    wait_for(lambda: len(digests(captions)) >= 2, generate)
    seen["when the node was lost"] = digests(captions)
    user.nodes.kill(spot)
    user.nodes.add_worker(cpus=4, gpus=1)
    wait_for(lambda: user.nodes.metric("ray_vlrank_rows_total", stage="caption", outcome="quarantined") == 1, generate)
    wait_for(lambda: user.nodes.metric("ray_vlrank_rows_total", stage="caption", outcome="done") > 0, generate)
    return seen | last_line(finish(generate))


@pytest.fixture(scope="module")
def trained(user: User, dataset: Dataset, captioned: object, tiny_vision_model: Path) -> Path:
    """A run with two workers, stopped in the middle and submitted again."""
    run = user.workdir / "run"
    epochs = 16  # of two seconds; on a busy machine more than ten pass between a line of the log and the end of a job
    tiny = ["--epochs", epochs, "--patience", epochs, "--batch_size", 32, "--val_users", 8, "--negatives", 4]
    tiny += ["--metric", "recall@1", "--lr", "1e-3", "ranking.max_history=3", "ranking.max_image_pixels=1024"]
    spread = ["--workers", 2, "--gpus_per_worker", 0, "--model", tiny_vision_model]
    follower = user.submitting("train", "shop", "--mode", "raw_image", "--out", "run", *spread, *tiny)
    assert follower.stdout is not None
    told = []
    for line in follower.stdout:  # the driver's log, as it grows
        told.append(line)
        if f"Epoch 1/{epochs}" in line:
            break
    assert not (run / "result.json").exists(), "the log came after the end"
    assert f"Epoch 1/{epochs}" in "".join(told[-1:]), "".join(told)
    name = job_id("".join(told))
    assert "True" in user.run("jobs", "stop", name)
    assert "stopped" in finish(follower, code=2)
    before = read_history(run)
    assert 1 <= len(before) < epochs
    assert "STOPPED" in user.run("jobs", "show", name)

    again = user.run("jobs", "resubmit", name)
    assert last_line(again)["status"] == "ok"
    assert f"Epoch 1/{epochs}" not in again, "what was trained is not trained again"
    assert read_history(run)[: len(before)] == before
    assert [line["epoch"] for line in read_history(run)] == list(range(1, epochs + 1))
    return run


@pytest.mark.stack
def test_a_job_waits_for_gpus_and_survives_the_loss_of_its_node(
    user: User, dataset: Dataset, captioned: dict[str, object]
) -> None:
    assert captioned["before a GPU came"] == {}, "the engine asked for the GPU that the cluster could grow to"
    assert captioned["status"] == "ok"
    assert captioned["counts"]["done"] == dataset.n_items - 1  # type: ignore[index]
    captions = dataset.generated("caption")
    assert captions is not None
    assert sorted(captions["item_id"]) == list(range(2, dataset.n_items + 1)), "every item once"
    assert dataset.quarantine("caption")["key"].to_list() == ["1"], "its picture is gone"
    kept = captioned["when the node was lost"]
    assert kept.items() <= digests(dataset.path / "captions").items(), "done work is not touched"  # type: ignore[attr-defined]


@pytest.mark.stack
def test_training_with_two_workers_goes_on_after_a_stop(trained: Path) -> None:
    assert (trained / "result.json").exists(), "and the picture that is gone did not stop it"


@pytest.mark.stack
def test_tune_and_rerank_at_once_and_a_report_of_both(
    user: User, dataset: Dataset, trained: Path, tiny_vision_model: Path
) -> None:
    train = {"model": str(tiny_vision_model), "epochs": 1, "val_users": 16, "negatives": 4, "metric": "recall@1"}
    train |= {"gpus_per_worker": 0, "ranking": {"max_history": 3, "max_image_pixels": 1024}}
    (user.workdir / "tune.yaml").write_text(yaml.safe_dump({"trials": 1, "train": train}))
    config = ["--config", user.workdir / "tune.yaml"]
    tune = user.submitting("tune", "shop", "--modes", "raw_image", "--out", "sweep", *config)
    # The checkout itself, as the README says it: relative paths are those of VLRANK_WORKDIR.
    rerank = ["shop", "--model", "run", "--candidates", "popular", "--out", "ranked.parquet", "--limit", "20"]
    rerank += ["engine.name=transformers", "engine.gpus=0"]
    env_vars = {"PYTHONPATH": "platform", "VLRANK_WORKDIR": str(user.workdir)}
    job = user.start_ray_job(ROOT, "python", "jobs/rerank.py", *rerank, env_vars=env_vars)
    ranked = last_line(finish(job, code=1))
    # Most lists hold the item whose picture is gone: what could be ranked is there, and the job says what is not.
    assert (ranked["status"], ranked["output"]) == ("error", str(user.workdir / "ranked.parquet"))
    assert "PictureMissing" in ranked["message"]  # type: ignore[operator]
    lists = pl.read_parquet(user.workdir / "ranked.parquet")
    assert 0 < lists.height == 20 - ranked["counts"]["quarantined"]  # type: ignore[index]
    assert last_line(finish(tune))["counts"]["completed"] == 1  # type: ignore[index]
    best = json.loads((user.workdir / "sweep" / "best.json").read_text())["raw_image"]
    assert best["metric"] == "recall@1"
    winner = user.workdir / "sweep" / "runs" / best["trial_id"]
    facts = json.loads((winner / "best.json").read_text())
    assert facts["value"] == best["value"]
    assert (winner / facts["checkpoint"]).is_dir()

    report = ["shop", "--rankings", "ranked.parquet", "--out", "report", "--sweep", "sweep", "--bootstrap", 200]
    output = user.submit("evaluate", *report)
    assert (user.workdir / "report" / "report.html").exists()
    again = user.submit("evaluate", *report)
    assert "known already" in again, "the same job is not run a second time"
    assert job_id(again) == job_id(output)
    assert "SUCCEEDED" in user.run("jobs", "show", job_id(again))
    assert last_line(user.run("jobs", "logs", job_id(again))) == last_line(output)


@pytest.mark.stack
def test_a_wrong_config_never_leaves_the_users_machine(user: User) -> None:
    output = user.submit("train", "shop", "--mode", "caption", "--out", "never", "learning_rate=1", code=2)
    assert "unknown config key `learning_rate`" in output
    assert "relative path" in user.run("submit", "train", "shop", "--mode", "caption", "--out", "never", code=2)
    planned = user.submit("train", "shop", "--mode", "caption", "--out", "never", "--dry_run")
    assert str(user.workdir / "never") in planned
    assert job_id(planned) not in user.run("jobs", "list")


@pytest.mark.stack
def test_a_job_that_fails_says_why_in_its_status(user: User) -> None:
    # A wrong config sent past the check, through `ray job submit`, fails the same way and as fast.
    folder = user.workdir / "package"
    folder.mkdir()
    package(folder, {"dataset": "/x", "out": "/y", "mode": "captions"})
    command = ["python", "-m", "vlrank.jobs", "train", "--config", "job.yaml"]
    by_ray = user.start_ray_job(folder, *command, env_vars={})
    lost = user.start_ray_job(folder, *command[:3], "retrieve", "shop", env_vars={})
    output = user.submit("retrieve", "no_such_dataset", "--name", "x", code=2)
    assert "no_such_dataset" in output
    shown = user.run("jobs", "show", job_id(output))
    assert "FAILED" in shown
    assert "no_such_dataset" in shown
    said = finish(by_ray, code=1)
    assert last_line(said)["status"] == "error"
    assert "unknown mode 'captions'" in said
    assert "Status message" in said.partition("unknown mode 'captions'")[0] or said.count("unknown mode") > 1
    assert "`dataset` is shop, a relative path" in finish(lost, code=1), "it would be read from the job's own folder"


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
    # Places that nobody named: raw files and dataset of a known name would lie in the job's temporary folder.
    beauty = absolute_paths(PrepareConfig(dataset_code="beauty"), "/data")
    assert (beauty["out"], beauty["raw_dir"]) == ("/data/data/beauty", "/data/data/raw")
    with pytest.raises(UserError, match="`raw_dir` is data/raw, a relative path"):
        absolute_paths(PrepareConfig(dataset_code="beauty"), None)


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
    with pytest.raises(UserError, match=r"^--dry_run is no option of .*\nOptions of a stage stand behind its name"):
        config_of("--dry_run", ["retrieve", "shop"])


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
    file.write_text("capacity: {GPU: many}")
    with pytest.raises(UserError, match="`capacity` of GPU is 'many', expected a number"):
        Environment.read(file)


def test_help_before_a_stage_is_of_submit_and_behind_it_of_the_stage() -> None:
    def said(*words: str) -> str:
        command = [sys.executable, "-c", VLRANK, "submit", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "--workdir" in said("--help")
    assert "--batch_size" in said("train", "--help")

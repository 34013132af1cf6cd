"""A killed worker or driver changes nothing but time.

What a user would lose: hours of GPU time, or, worse, a model that silently continued from the wrong place.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Program, command_line, family, of_living
from vlrank.config import RayConfig, TrainConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.runtime import ray_session
from vlrank.training.checkpoints import torn_file
from vlrank.training.history import read_history
from vlrank.training.run import run
from vlrank.training.state import saved_states

pytestmark = pytest.mark.stack

DRIVER = """
import sys, json
from vlrank.config import TrainConfig
from vlrank.training.run import run
run(TrainConfig.model_validate(json.loads(sys.argv[1])))
"""


def numbers(folder: Path) -> list[dict[str, Any]]:
    """What must not depend on luck: everything but times."""
    return [{k: v for k, v in line.items() if k not in ("time", "validation_s")} for line in read_history(folder)]


def wait_for_evaluation(folder: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not read_history(folder):
        if time.monotonic() > end:
            raise TimeoutError("no evaluation")
        time.sleep(0.05)


def workers(of: int) -> list[psutil.Process]:
    lines = of_living(family(of), command_line)
    return [process for process, line in lines.items() if "RayTrainWorker" in line]


@pytest.fixture(scope="module")
def settings(
    shop: Dataset, tiny_vision_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., TrainConfig]]:
    """Configs of one run in different folders, by default with two gloo workers, in one Ray."""
    base = tmp_path_factory.mktemp("faults")
    shutil.copytree(shop.path, base / "shop")

    def make(name: str, workers: int = 2, **more: Any) -> TrainConfig:
        return load_config(
            TrainConfig,
            dataset=base / "shop",
            out=base / name,
            mode="raw_image",
            model=str(tiny_vision_model),
            method="lora",
            workers=workers,
            epochs=3,
            batch_size=8,
            lr=1e-3,
            val_users=16,
            ranking={"max_history": 4, "max_item_chars": 80},
            # Inside the data-parallel wrapper; it changes nothing either.
            **{"gradient_checkpointing": workers > 1, **more},
        )

    with ray_session(RayConfig(num_cpus=4)):
        yield make


@pytest.fixture(scope="module")
def unbroken(settings: Callable[..., TrainConfig]) -> list[dict[str, Any]]:
    """The history of a run that nothing happened to, with one worker: the number of workers changes nothing either."""
    config = settings("unbroken", workers=1)
    run(config)
    assert saved_states(config.out, 10**9)[0].finished
    assert not list(config.out.rglob("rank-*.safetensors")), "what a run resumes from is gone when it is over"
    return numbers(config.out)


def test_a_killed_worker(settings: Callable[..., TrainConfig], unbroken: list[dict[str, Any]]) -> None:
    config = settings("killed-worker")
    killed: list[int] = []

    def kill() -> None:
        wait_for_evaluation(config.out)
        victim = workers(os.getpid())[-1]
        killed.append(victim.pid)
        victim.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    run(config)
    thread.join()
    assert killed
    assert_same(numbers(config.out), unbroken)
    # A report cut off by the crash may have left a folder that nothing knows: it must be gone.
    known = json.loads((config.out / "qwen3vl_rerank_vl" / "checkpoint_manager_snapshot.json").read_text())
    names = {result["checkpoint_dir_name"] for result in known["checkpoint_results"]}
    assert all(torn_file(config.out / "qwen3vl_rerank_vl" / name) is None for name in names)
    assert {path.name for path in (config.out / "qwen3vl_rerank_vl").glob("checkpoint-*")} == names


def test_a_killed_driver_of_sharded_weights(
    settings: Callable[..., TrainConfig], unbroken: list[dict[str, Any]]
) -> None:
    """FSDP2 learns what one worker does, resumes from its own state, and leaves the same plain adapter."""
    config = settings("killed-driver", parallel="fsdp2", gradient_checkpointing=False)
    given = json.dumps(config.model_dump(mode="json") | {"ray": {"address": "local"}})
    driver = Program(sys.executable, "-c", DRIVER, given)
    try:
        driver.wait_for(lambda: read_history(config.out), "an evaluation")
    finally:
        driver.kill()
    assert not (config.out / "result.json").exists()
    run(config)  # resume: auto
    assert_same(numbers(config.out), unbroken)
    best = json.loads((config.out / "best.json").read_text())["checkpoint"]
    ours, plain = (
        load_file(config.out.parent / name / best / "adapter_model.safetensors")
        for name in (config.out.name, "unbroken")
    )
    assert ours.keys() == plain.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, plain[name], atol=1e-4, rtol=1e-3)


def test_a_torn_newest_checkpoint_costs_what_was_trained_since_the_one_before(
    settings: Callable[..., TrainConfig], unbroken: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that was full, or a copy that was cut off, would end every further start in a traceback."""
    config = settings("torn", workers=1)
    shutil.copytree(config.out.parent / "unbroken", config.out)
    (config.out / "result.json").unlink()
    home = config.out / "qwen3vl_rerank_vl"
    newest = home / f"checkpoint-{unbroken[-1]['step']}"
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    before = read_history(config.out)
    run(config)
    assert_same(numbers(config.out), unbroken)
    # What it resumed from is gone with the end of the run: it trained again, and kept what was whole.
    assert read_history(config.out)[:-1] == before[:-1]
    assert (home / f"torn-{newest.name}").is_dir()
    said = " ".join(capsys.readouterr().err.split())
    assert "is torn (adapter_model.safetensors is cut off); the run goes on from the start" in said
    load_file(weights)
    result = json.loads((config.out / "result.json").read_text())
    assert sum(result["phases"].values()) == pytest.approx(result["seconds"], abs=0.01)


def test_a_terminated_driver_ends_as_by_ctrl_c(settings: Callable[..., TrainConfig]) -> None:
    """Batch systems, containers and `ray job stop` end programs by SIGTERM, at which Ray prints stacks and aborts."""
    config = settings("terminated", workers=1).model_copy(update={"epochs": 500, "patience": 500})
    file = config.out.parent / "terminated.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude={"ray"})))  # JSON is YAML
    command = [sys.executable, "-m", "vlrank", "train", "--config", str(file), "ray.num_cpus=4"]
    # A lone worker needs no process group, and must not look for one that this host's launcher speaks of.
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1"}
    driver = Program(*command, env=launched)
    driver.wait_for(lambda: read_history(config.out), "an evaluation")
    # Importing torch where nothing computes costs seconds of every start, and of every trial's.
    started = driver.family()
    with_torch = of_living(started, lambda one: one.name() if loads_torch(one) else None)
    assert [name for name in with_torch.values() if name] == ["ray::RayTrainWorker"]
    driver.process.send_signal(signal.SIGTERM)
    said = driver.finish(130)
    assert "interrupted; what was committed stays" in said
    assert "SIGTERM" not in said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


def loads_torch(process: psutil.Process) -> bool:
    return any("libtorch_cpu" in part.path for part in process.memory_maps())


def assert_same(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for mine, other in zip(got, expected, strict=True):
        for key, value in other.items():
            assert mine[key] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), key

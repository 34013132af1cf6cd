"""Signals and lost Ray processes, sent to real commands at every stage of their life.

What a user would lose: the answer why a job ended, a GPU held by what it left behind, and the minutes until a batch
system kills what does not end. `timeout`, systemd and a terminal signal the process group, others the process alone; a
full machine's kernel kills Ray's own processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import Program, command_line, of_living
from vlrank.data.dataset import Dataset

pytestmark = pytest.mark.stack
Words = list[object]


@pytest.fixture(scope="module")
def place(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop, with lists to rerank; commands write beside it."""
    folder = tmp_path_factory.mktemp("signals")
    shutil.copytree(shop.path, folder / "shop")
    Program(sys.executable, "-m", "vlrank", "retrieve", folder / "shop", "--method", "popularity").finish()
    return folder


@pytest.fixture
def command(place: Path, tmp_path: Path, tiny_vision_model: Path) -> Callable[[str], Words]:
    """Commands that go on for minutes."""
    small: Words = ["ranking.max_history=3", "ranking.max_image_pixels=1024"]
    training: Words = ["epochs=500", "patience=500", "val_users=8", "negatives=4", "batch_size=8", "lr=1e-3"]
    training += ["metric=recall@1", f"model={tiny_vision_model}", "method=lora", *small]
    engine: Words = ["--model", tiny_vision_model, "engine.name=transformers", "engine.batch_size=1", "--shard_rows", 1]
    dataset = tmp_path / "shop"
    shutil.copytree(place / "shop", dataset)
    out = tmp_path / "out"
    lists: Words = ["--candidates", "popularity", "--as_mode", "raw_image", "--out", out / "r.parquet"]
    commands: dict[str, Words] = {
        "train": ["train", dataset, "--mode", "raw_image", "--out", out, *training],
        "tune": ["tune", dataset, "--modes", "raw_image", "--out", out, "--trials", 2]
        + [f"train.{key_value}" for key_value in [*training, "gpus_per_worker=0"]],
        "generate": ["generate", dataset, "--what", "caption", "--max_tokens", 256, *engine],
        "rerank": ["rerank", dataset, *lists, *engine, *small],
        "demo": ["demo", "--out", out],
    }
    return lambda name: [sys.executable, "-m", "vlrank", *commands[name]]


@pytest.fixture
def start(command: Callable[[str], Words]) -> Iterator[Callable[[str], Program]]:
    started: list[Program] = []

    def program(name: str) -> Program:
        started.append(Program(*command(name)))
        return started[-1]

    yield program
    for each in started:
        each.lose_power()


def named(program: Program, name: str) -> list[psutil.Process]:
    """The descendants with this name or, of a Python process, this word in its title."""
    called = of_living(program.family()[1:], lambda process: process.name() == name or name in command_line(process))
    return [process for process, matches in called.items() if matches]


WORKING = {
    "train": "RayTrainWorker",
    "tune": "RayTrainWorker",
    "generate": "MapWorker",
    "rerank": "MapWorker",
    "demo": "MapWorker",
}
PHASES = {"imports": "python", "start of ray": "gcs_server", "first workers": "raylet"}


def reach(program: Program, name: str, phase: str) -> list[psutil.Process]:
    """Wait for a phase; returns the processes of the command then."""
    sought = PHASES.get(phase) or WORKING[name]
    program.wait_for(lambda: named(program, sought), f"{sought} of {name}")
    return program.family()


def check(program: Program, family: list[psutil.Process], code: int, message: str) -> None:
    """One message and nothing else of Ray or Python; no process is left."""
    said = program.finish(code)
    assert said.count(message) == 1, said
    for noise in ("Traceback", "SIGTERM", "SIGABRT", "Failed to connect to GCS", "*** "):
        assert noise not in said, said
    assert not [process for process in family if process.is_running()], said


INTERRUPTED = "interrupted; what was committed stays"


@pytest.mark.parametrize(
    ("name", "phase", "number", "send"),
    [
        ("train", "imports", signal.SIGTERM, os.killpg),
        ("train", "start of ray", signal.SIGTERM, os.killpg),
        ("train", "first workers", signal.SIGINT, os.kill),
        ("train", "work", signal.SIGTERM, os.killpg),
        ("tune", "start of ray", signal.SIGINT, os.killpg),
        ("tune", "work", signal.SIGTERM, os.killpg),
        ("generate", "start of ray", signal.SIGTERM, os.killpg),
        ("generate", "work", signal.SIGTERM, os.killpg),
        ("rerank", "first workers", signal.SIGTERM, os.kill),
        ("rerank", "work", signal.SIGINT, os.killpg),
        ("demo", "first workers", signal.SIGTERM, os.killpg),
    ],
)
def test_a_signal_ends_a_command_with_one_message(
    start: Callable[[str], Program],
    name: str,
    phase: str,
    number: signal.Signals,
    send: Callable[[int, signal.Signals], None],
) -> None:
    program = start(name)
    family = reach(program, name, phase)
    send(program.pid, number)
    check(program, family, 130, INTERRUPTED)


@pytest.mark.parametrize(
    ("name", "lost"), [("train", "gcs_server"), ("train", "raylet"), ("tune", "raylet"), ("generate", "gcs_server")]
)
def test_a_lost_process_of_ray_ends_a_command_with_one_message(
    start: Callable[[str], Program], name: str, lost: str
) -> None:
    program = start(name)
    family = reach(program, name, "work")
    (victim,) = [process for process, called in of_living(family, psutil.Process.name).items() if called == lost]
    victim.kill()
    check(program, family, 1, f"Ray's process {lost} ended while the command was running")


def test_a_signal_to_every_process_of_a_job(start: Callable[[str], Program]) -> None:
    """scancel and systemd reach each process of a control group, Ray's own ones too."""
    program = start("train")
    family = reach(program, "train", "work")
    of_living(family, psutil.Process.terminate)
    said = program.finish(130)  # with a line of Ray, perhaps, whose workers end before its driver hears of anything
    assert said.count(INTERRUPTED) == 1, said
    assert "Traceback" not in said, said
    assert not [process for process in family if process.is_running()], said

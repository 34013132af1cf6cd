"""The real server, asked over HTTP: its answers, and what happens when clients, replicas or the server itself go."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest

from tests.processes import Program
from vlrank.data.dataset import Dataset
from vlrank.prompting.negatives import sampled_candidates

pytestmark = pytest.mark.stack
VLRANK = (sys.executable, "-m", "vlrank")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def home() -> Iterator[dict[str, str]]:
    """The environment of a Ray of our own, which `ray.address=auto` finds; its sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="vs", ignore_cleanup_errors=True) as folder:
        yield {"RAY_TMPDIR": folder}


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(dataset: Dataset, run: Path, home: dict[str, str], port: int) -> Iterator[Program]:
    program = Program(*VLRANK, "serve", run, "--dataset", dataset.path, "--port", port, env=home)
    program.wait_for(lambda: "serving at" in program.output, "the server")
    yield program
    program.lose_power()


@pytest.fixture(scope="module")
def client(server: Program, port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        yield client


def test_scores_are_those_of_the_bulk_job_to_the_last_bit(
    client: httpx.Client, dataset: Dataset, run: Path, home: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "r.parquet"
    words = ["--model", run, "--out", out, "limit=12", "ray.address=auto"]
    Program(*VLRANK, "rerank", dataset.path, *words, env=home).finish()
    histories = dataset.histories("test")
    items = sorted(range(1, dataset.n_items + 1))
    for user, expected, scores in pl.read_parquet(out).select("user_id", "item_ids", "scores").iter_rows():
        history, target = histories[user]
        candidates = sampled_candidates(user, history, target, np.asarray(items), 19, 0)[0]
        answer = client.post(
            "/v1/rank", json={"user": user, "history": history, "candidates": [int(item) for item in candidates]}
        ).json()
        assert [place["id"] for place in answer["ranking"]] == expected
        assert [place["score"] for place in answer["ranking"]] == scores


def test_a_signal_ends_the_server_in_good_order(server: Program, client: httpx.Client) -> None:
    server.process.send_signal(signal.SIGTERM)
    said = server.finish(0)
    assert "Traceback" not in said

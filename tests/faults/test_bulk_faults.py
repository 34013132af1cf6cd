"""Kill a driver, a worker and a node in the middle of a bulk run: nothing is lost, nothing is done twice."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import psutil
import pytest

import vlrank
from vlrank.data.tables import read_parquet

sys.path.insert(0, str(Path(__file__).parent))
from .bulk_driver import SHARD_ROWS, is_bad, make_shards

pytestmark = pytest.mark.stack
ROWS = 200


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """The driver as a process of its own, in a session of its own."""
    source = Path(vlrank.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "bulk_driver.py"), str(folder), str(ROWS), *flags]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return output


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """The driver dies at once; what it had started (its Ray) must not outlive the test."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=10)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "the run did not get so far"
        time.sleep(0.02)


def shard_files(folder: Path) -> dict[str, str]:
    files = make_shards(folder).folder.glob("*.parquet")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_complete(folder: Path) -> None:
    """Every row is on disk exactly once: good ones in a shard, bad ones in quarantine; no leftovers."""
    shards = make_shards(folder)
    rows = pl.concat([read_parquet(file, shards.schema) for file in shards.folder.glob("*.parquet")])
    good = [key for key in range(1, ROWS + 1) if not is_bad(key)]
    assert sorted(rows["item_id"].to_list()) == good
    assert sorted(rows["text"].to_list()) == sorted(f"text {key}" for key in good)
    bad = pl.concat([pl.read_parquet(file) for file in shards.quarantine.glob("*.parquet")])
    assert sorted(map(int, bad["key"])) == [key for key in range(1, ROWS + 1) if is_bad(key)]
    leftovers = [path.name for path in shards.folder.iterdir() if path.suffix != ".parquet" and path.name != ".lock"]
    assert not leftovers


def test_a_killed_driver_costs_at_most_the_shards_in_work(tmp_path: Path) -> None:
    first = start(tmp_path)
    wait_for(lambda: len(shard_files(tmp_path)) >= 4, first)
    kill_with_children(first)
    committed = shard_files(tmp_path)
    assert 4 <= len(committed) < ROWS // SHARD_ROWS, "killed in the middle"

    output = finish(start(tmp_path))
    check_complete(tmp_path)
    after = shard_files(tmp_path)
    assert {name: after.get(name) for name in committed} == committed, "what was committed is not touched"
    reused = sum(
        read_parquet(make_shards(tmp_path).folder / name, make_shards(tmp_path).schema).height for name in committed
    )
    assert f"reused={reused}" in output


def test_a_killed_worker_is_replaced_and_its_rows_are_done_again(tmp_path: Path) -> None:
    run = start(tmp_path, "--one")
    wait_for(lambda: len(shard_files(tmp_path)) >= 3, run)
    (victim,) = {int(file.name.split("-")[0]) for file in (tmp_path / "pids").iterdir()}
    os.kill(victim, signal.SIGKILL)
    committed = shard_files(tmp_path)
    finish(run)
    check_complete(tmp_path)
    after = shard_files(tmp_path)
    assert {name: after.get(name) for name in committed} == committed
    assert len(list((tmp_path / "pids").iterdir())) == 2, "another process took over"


def test_a_lost_node_is_survived(tmp_path: Path) -> None:
    run = start(tmp_path, "--nodes")
    wait_for(lambda: len(shard_files(tmp_path)) >= 3, run)
    committed = shard_files(tmp_path)
    (tmp_path / "kill_node").touch()
    output = finish(run)
    assert (tmp_path / "node_killed").exists(), "the node was killed while the run went on"
    check_complete(tmp_path)
    assert committed.keys() <= shard_files(tmp_path).keys()
    assert "reused=0" in output

"""Kill a driver, a worker and a node in the middle of a bulk run: nothing is lost, nothing is done twice."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import polars as pl
import pytest

import vlrank
from vlrank.data.tables import read_parquet

sys.path.insert(0, str(Path(__file__).parent))
from tests.processes import Program

from .bulk_driver import SHARD_ROWS, is_bad, make_shards

pytestmark = pytest.mark.stack
ROWS = 200


def start(folder: Path, *flags: str) -> Program:
    source = Path(vlrank.__file__).parents[1]
    environment = {"PYTHONPATH": f"{source}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    return Program(sys.executable, Path(__file__).parent / "bulk_driver.py", folder, ROWS, *flags, env=environment)


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
    first.wait_for(lambda: len(shard_files(tmp_path)) >= 4)
    first.kill()
    committed = shard_files(tmp_path)
    assert 4 <= len(committed) < ROWS // SHARD_ROWS, "killed in the middle"

    output = start(tmp_path).finish()
    check_complete(tmp_path)
    after = shard_files(tmp_path)
    assert {name: after.get(name) for name in committed} == committed, "what was committed is not touched"
    reused = sum(
        read_parquet(make_shards(tmp_path).folder / name, make_shards(tmp_path).schema).height for name in committed
    )
    assert f"reused={reused}" in output


def test_a_killed_worker_is_replaced_and_its_rows_are_done_again(tmp_path: Path) -> None:
    run = start(tmp_path, "--one")
    run.wait_for(lambda: len(shard_files(tmp_path)) >= 3)
    (victim,) = {int(file.name.split("-")[0]) for file in (tmp_path / "pids").iterdir()}
    os.kill(victim, signal.SIGKILL)
    committed = shard_files(tmp_path)
    run.finish()
    check_complete(tmp_path)
    after = shard_files(tmp_path)
    assert {name: after.get(name) for name in committed} == committed
    assert len(list((tmp_path / "pids").iterdir())) == 2, "another process took over"


def test_a_lost_node_is_survived(tmp_path: Path) -> None:
    run = start(tmp_path, "--nodes")
    run.wait_for(lambda: len(shard_files(tmp_path)) >= 3)
    committed = shard_files(tmp_path)
    (tmp_path / "kill_node").touch()
    output = run.finish()
    assert (tmp_path / "node_killed").exists(), "the node was killed while the run went on"
    check_complete(tmp_path)
    assert committed.keys() <= shard_files(tmp_path).keys()
    assert "reused=0" in output

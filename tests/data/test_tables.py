"""A crash or a full disk must leave the old file or none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from vlrank.data import schemas
from vlrank.data.tables import (
    atomic_path,
    atomic_write_json,
    atomic_write_text,
    read_json,
    read_parquet,
    write_parquet_atomic,
)
from vlrank.errors import UserError

SCHEMA = pa.schema([("id", pa.int32()), ("names", pa.list_(pa.string()))])


def test_schema_is_enforced_in_names_types_and_order(tmp_path: Path) -> None:
    frame = pl.DataFrame({"names": [["a"], []], "id": [1, 2]})
    write_parquet_atomic(frame, tmp_path / "t.parquet", SCHEMA)
    table = read_parquet(tmp_path / "t.parquet", SCHEMA)
    assert table.columns == ["id", "names"]
    assert table.schema == {"id": pl.Int32, "names": pl.List(pl.String)}
    assert table.rows() == [(1, ["a"]), (2, [])]


@pytest.mark.parametrize("frame", [pl.DataFrame({"id": [1]}), pl.DataFrame({"id": [1], "names": [["a"]], "x": [1]})])
def test_missing_and_unknown_columns_are_refused(tmp_path: Path, frame: pl.DataFrame) -> None:
    with pytest.raises(ValueError, match="columns"):
        write_parquet_atomic(frame, tmp_path / "t.parquet", SCHEMA)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_does_not_fit_is_refused_not_wrapped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.parquet"):
        write_parquet_atomic(pl.DataFrame({"id": [2**40], "names": [["a"]]}), tmp_path / "t.parquet", SCHEMA)
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "f", "old")

    def interrupted() -> None:
        with atomic_path(tmp_path / "f") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_full_disk_is_a_message_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"f\.json.*No space left"):
        atomic_write_json(tmp_path / "f.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_real_limit_on_file_size_leaves_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write, as a full disk or a quota does."""
    program = """
import resource, signal, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from vlrank.data.tables import write_parquet_atomic
from vlrank.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
table = pa.table({"x": np.random.default_rng(0).random(100_000)})
try:
    write_parquet_atomic(table, Path(sys.argv[1]) / "t.parquet", table.schema)
except UserError as error:
    print(error.problem)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "t.parquet" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "write",
    [
        "import torch; x = torch.rand(100_000); save = lambda path: torch.save(x, path)",
        "import torch, safetensors.torch as s; x = {'x': torch.rand(9999)}; save = lambda path: s.save_file(x, path)",
        "save = lambda path: path.write_bytes(bytes(100_000))",
    ],
    ids=["torch", "safetensors", "python"],
)
def test_every_writer_of_a_checkpoint_says_that_the_disk_is_full(write: str, tmp_path: Path) -> None:
    """A training run would otherwise be tried again, and end in a traceback about zip files."""
    program = f"""
import resource, signal, sys
from pathlib import Path
from vlrank.data.tables import DiskFull, disk_errors
{write}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with disk_errors(Path("runs")):
        save(Path(sys.argv[1]) / "weights")
except DiskFull as error:
    print(error.problem)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot write runs: ")


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_parquet(tmp_path / "no.parquet", SCHEMA)
    (tmp_path / "bad.parquet").write_text("PAR0")
    with pytest.raises(UserError, match="not a readable Parquet"):
        read_parquet(tmp_path / "bad.parquet", SCHEMA)
    pl.DataFrame({"id": ["a"]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match="no column names"):
        read_parquet(tmp_path / "other.parquet", SCHEMA)
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "m.json")


def test_many_rows_are_written_in_groups_and_read_back_alike(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": range(1, 150_001)}).select(
        pl.col("user_id").cast(pl.Int32),
        source_user=pl.col("user_id").cast(pl.String),
        item_ids=pl.concat_list(pl.col("user_id").cast(pl.Int32)),
        timestamps=pl.concat_list("user_id"),
    )
    write_parquet_atomic(frame, tmp_path / "s.parquet", schemas.SEQUENCES)
    assert read_parquet(tmp_path / "s.parquet", schemas.SEQUENCES).equals(frame)

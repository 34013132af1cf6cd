"""Files that are either whole or absent: Parquet tables with an enforced schema, text and JSON.

Everything is written to a temporary sibling, flushed to the disk and renamed into place (POSIX rename is atomic), so a
crash, a full disk or Ctrl-C leaves the old file or none, never half of one. What goes to a bucket is written to a
temporary file and uploaded in one piece, which comes to the same.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, Union

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from vlrank.errors import UserError
from vlrank.storage import BucketPath, Location

Table: TypeAlias = Union[pa.Table, pl.DataFrame, Sequence[Mapping[str, Any]]]  # noqa: UP007 (Arrow is untyped)
"""What can be written as a table: Arrow, Polars, or a list of rows."""

_ROWS_PER_GROUP = 65_536
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TORCH_CANNOT_WRITE = ("inline_container.cc", "iostream error", "PytorchStreamWriter")


class DiskFull(UserError):
    """No space is left, or no more of a quota."""


@contextmanager
def disk_errors(path: Location) -> Iterator[None]:
    """Turn "the disk is full" and "not allowed" into messages that name the file.

    Raises:
        DiskFull: whatever writes found no space: Python, Arrow, safetensors or ``torch.save``.
        UserError: not allowed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"cannot write {path}: {error.strerror}", "Choose a folder you may write to.") from error
        reason = _no_space(error)
        if reason is None:
            raise
        raise DiskFull(
            f"cannot write {path}: {reason}",
            "Free some space (or raise the quota) and run the same command again; what was committed before is intact.",
        ) from error


def _no_space(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _NO_SPACE else None
    said = str(error)
    if any(sign in said for sign in _TORCH_CANNOT_WRITE):
        return "the disk is probably full"
    codes = (number for number in _NO_SPACE if f"(os error {number})" in said)  # safetensors
    return next((os.strerror(number) for number in codes), None)


@contextmanager
def atomic_path(path: Location, *, sync: bool = True) -> Iterator[Path]:
    """A temporary sibling to write to; renamed to ``path`` when the block ends well, removed otherwise.

    With ``sync`` the content is on the disk before the name is: even a power failure leaves no empty file.

    Raises:
        UserError: no space left, or no permission.
    """
    if isinstance(path, BucketPath):
        with disk_errors(path), tempfile.TemporaryDirectory(prefix="vlrank-") as folder:
            draft = Path(folder) / path.name
            yield draft
            path.upload(draft)
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            yield temporary
            if sync:
                _sync(temporary)
            os.replace(temporary, path)
            if sync:
                _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def atomic_write_bytes(path: Location, data: bytes, *, sync: bool = True) -> None:
    """Write a whole file or nothing."""
    if isinstance(path, BucketPath):
        path.write_bytes(data)
        return
    with atomic_path(path, sync=sync) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Location, text: str) -> None:
    """Write a whole UTF-8 file or nothing."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Location, value: Any) -> None:
    """Write indented JSON, keys in the order given, ending in a newline."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Location) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: missing, not readable, not JSON, or not an object.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: it is not valid JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, expected an object")
    return loaded


def read_json_lines(path: Location) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, one per line; empty where there is no file.

    Lines that are no JSON object are left out: the writer of the last one may have been killed, or still be at work.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def next_file(folder: Location) -> Location:
    """A new name that sorts after all existing ones, and that no other process chooses at the same time."""
    numbers = [int(file.name[:8]) for file in folder.glob("*.parquet") if file.name[:8].isdigit()]
    return folder / f"{max(numbers, default=0) + 1:08d}-{uuid.uuid4().hex[:8]}.parquet"


def write_parquet_atomic(table: Table, path: Location, schema: pa.Schema) -> None:
    """Write a Parquet file with exactly the columns, types and order of ``schema``.

    Rows are cast and written in groups, so the copy in the target's types never holds the whole table.

    Raises:
        UserError: no space left, or no permission.
        ValueError: a column is missing, unknown, or cannot be cast without loss.
    """
    source = _as_arrow(table, schema)
    if set(source.column_names) != set(schema.names):
        missing = [name for name in schema.names if name not in source.column_names]
        unknown = [name for name in source.column_names if name not in schema.names]
        raise ValueError(f"{path.name}: missing columns {missing}, unknown columns {unknown}")
    source = source.select(schema.names)
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for start in range(0, source.num_rows, _ROWS_PER_GROUP):
            try:
                group = source.slice(start, _ROWS_PER_GROUP).cast(schema)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path.name}: {error}") from error
            writer.write_table(group)


def _as_arrow(table: Table, schema: pa.Schema) -> pa.Table:
    if isinstance(table, pa.Table):
        return table
    if isinstance(table, pl.DataFrame):
        return table.to_arrow(compat_level=pl.CompatLevel.oldest())
    return pa.Table.from_pylist([dict(row) for row in table], schema=schema)


def parquet_file(path: Location) -> pq.ParquetFile:
    """An open Parquet file: mapped from a disk, or read from a bucket in one request."""
    if isinstance(path, BucketPath):
        return pq.ParquetFile(pa.BufferReader(path.read_bytes()))
    return pq.ParquetFile(path, memory_map=True)


def read_parquet(path: Location, schema: pa.Schema) -> pl.DataFrame:
    """A Parquet file as a Polars frame with the columns and types of ``schema``.

    Raises:
        UserError: missing, unreadable, or with other columns or types.
    """
    try:
        table = parquet_file(path).read()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    try:
        frame = pl.from_arrow(table.select(schema.names).cast(schema))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path} does not have the types of its schema: {error}") from None
    assert isinstance(frame, pl.DataFrame)
    return frame


def empty_frame(schema: pa.Schema) -> pl.DataFrame:
    """A frame without rows and with the columns and types of ``schema``."""
    frame = pl.from_arrow(schema.empty_table())
    assert isinstance(frame, pl.DataFrame)
    return frame


def file_size(path: Location) -> int:
    """Bytes of a file."""
    return path.size() if isinstance(path, BucketPath) else path.stat().st_size


def file_sha256(path: Location) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

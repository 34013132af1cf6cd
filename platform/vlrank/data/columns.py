"""Columns of raw Parquet files in the types of their roles, whatever type they were written in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlrank.data.rawfiles import excerpt
from vlrank.errors import UserError


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file for reading in batches.

    Raises:
        UserError: missing or unreadable.
    """
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"input file {path} does not exist", "Check the path.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"input file {path} is not a readable Parquet file: {error}") from None


def read_batches(path: Path, file: pq.ParquetFile, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of an open file, so many rows at a time.

    Raises:
        UserError: the file is damaged, or Arrow cannot read a column.
    """
    try:
        yield from file.iter_batches(batch_size=rows, columns=columns)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk's trouble, not the file's
            raise
        raise UserError(
            f"input file {path} is damaged or cannot be read: {error}", "Write or download it again."
        ) from None


def parquet_column(path: Path, role: str, name: str, column: pa.Array) -> pa.Array:
    """A column as its CSV form would be read.

    Args:
        path: The file, for messages.
        role: ``user``, ``item``, ``timestamp`` or ``rating``.
        name: The column's name, for messages.
        column: Of any type.

    Returns:
        Ids as strings; ratings as float64; times as int64 milliseconds for dates and int64 or float64 for numbers.
        Ratings and times that are text, of which a row is no number, as strings.

    Raises:
        UserError: a type that cannot be meant.
    """
    try:
        plain = _plain(column)
        if role in ("user", "item"):
            return _ids(plain)
        if role == "rating":
            return _numbers(plain, (pa.float64(),))
        if is_dated(plain.type):
            return plain.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
        if pa.types.is_temporal(plain.type) or pa.types.is_boolean(plain.type):
            raise pa.ArrowTypeError("a duration or a truth value is no time")
        return _numbers(plain, (pa.int64(), pa.float64()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        example = next((value for value in column.to_pylist() if value is not None), None)
        raise UserError(
            f"column {name} of {path} holds {column.type}, such as {excerpt(repr(example))}, expected the {role}",
            f"Name another column with columns.{role}=NAME, or write it as text or numbers.",
        ) from None


def is_dated(kind: pa.DataType) -> bool:
    """Whether a column of this type holds dates or moments."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_date(kind) or pa.types.is_timestamp(kind)


def _plain(column: pa.Array) -> pa.Array:
    """Without what only says how values are stored: dictionaries, extensions, large offsets, decimals."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(column.storage)
    if pa.types.is_dictionary(kind):
        return _plain(column.dictionary_decode())
    if pa.types.is_decimal(kind):
        return column.cast(pa.int64() if _all_whole(column) else pa.float64(), safe=False)
    if pa.types.is_null(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return column.cast(pa.string())
    return column


def _all_whole(numbers: pa.Array) -> bool:
    return pc.all(pc.equal(numbers, pc.floor(numbers))).as_py() is not False


def _ids(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):  # pandas makes integers floats where one is missing
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
        column = column.cast(pa.int64()) if _all_whole(column) else column
    return column.cast(pa.string())


def _numbers(column: pa.Array, types: tuple[pa.DataType, ...]) -> pa.Array:
    """The column in the first of the types that takes all its values; text that none takes stays text."""
    for wanted in types:
        try:
            return column.cast(wanted)
        except pa.ArrowInvalid:
            continue
    return column

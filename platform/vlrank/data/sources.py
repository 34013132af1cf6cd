"""Interactions and item metadata from the files that people have.

| source | interactions | items |
| --- | --- | --- |
| Amazon 2014 | reviewerID, asin, overall, unixReviewTime (s) | asin, title, brand, categories, description, imUrl |
| Amazon 2018 | the same | asin, title, brand, category, description, imageURLHighRes, imageURL |
| Amazon 2023 | user_id, parent_asin, rating, timestamp (ms) | parent_asin, title, store, categories, images |
| RecBole | user_id:token, item_id:token, rating:float, timestamp:float | item_id:token, title:token_seq, ... |
| CSV, Parquet | any names, see `vlrank.config.ColumnsConfig` | any names |

Sources: McAuley et al. 2015 (2014 files), Ni et al. 2019 (2018 files), Hou et al. 2024 (2023 files), RecBole's "atomic
files" (Zhao et al. 2021). Large files are read in blocks: a fast reader takes blocks without surprises, and any block
it refuses is read again row by row, so that exactly the bad lines are put aside.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from vlrank.config import ColumnsConfig
from vlrank.data.columns import is_dated, open_parquet, parquet_column, read_batches
from vlrank.data.delimited import BYTE_ORDER_MARK, Dialect, Records, read_dialect, record_blocks
from vlrank.data.rawfiles import (
    Rejects,
    decode,
    excerpt,
    line_blocks,
    open_raw,
    parse_record,
    printable,
    refuse_array,
)
from vlrank.errors import UserError

Kind = Literal["json", "delimited", "parquet"]
TimestampUnit = Literal["auto", "s", "ms", "us", "ns"]

# What public data sets call a column, the most specific first: Amazon 2023 rows have both parent_asin and asin, and its
# metadata is keyed by parent_asin.
ALIASES: dict[str, tuple[str, ...]] = {
    "user": ("reviewerID", "user_id", "user", "userId", "userID", "uid", "source_user", "customer_id"),
    "item": (
        "parent_asin",
        "asin",
        "item_id",
        "item",
        "itemId",
        "itemID",
        "iid",
        "source_id",
        "product_id",
        "article_id",
    ),
    "timestamp": ("unixReviewTime", "timestamp", "time", "sort_timestamp", "ts", "date", "t_dat"),
    "rating": ("overall", "rating", "stars", "score"),
    "title": ("title", "name", "item_name", "prod_name"),
    "brand": ("brand", "store", "manufacturer"),
    "categories": ("categories", "category", "genre", "genres", "class"),
    "description": ("description", "desc", "detail_desc"),
    "image": ("imageURLHighRes", "imageURL", "imUrl", "images", "image", "image_path", "image_url", "img"),
}
_MILLISECONDS = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
_SCALES = ((1e17, 1e-6), (1e14, 1e-3), (1e11, 1.0))  # least size -> milliseconds; smaller numbers are seconds
_MAX_TIME_MS = 253_402_300_800_000  # the year 10000
_NO_RATING = {"", "na", "n/a", "nan", "null", "none"}
_NO_ID = ("", "nan", "NaN", "None", "null", "NULL", "NA", "<NA>", "\\N")  # what programs write where an id is missing
_PARQUET_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """Some interactions in file order; all arrays have the same length.

    Attributes:
        user: User ids of the source, Arrow strings.
        item: Item ids of the source, Arrow strings.
        time_ms: int64, milliseconds since 1970.
        rating: float32, NaN where there is none.
        keys: Where row i comes from, for the quarantine.
    """

    user: pa.Array
    item: pa.Array
    time_ms: np.ndarray
    rating: np.ndarray
    keys: Callable[[int], str]


@dataclass(frozen=True, slots=True)
class RawOptions:
    """How raw files are read; see `vlrank.config.PrepareConfig` for the meaning."""

    columns: ColumnsConfig
    timestamp_unit: TimestampUnit = "auto"
    max_line_bytes: int = 64 << 20
    allow_truncated: bool = False
    image_root: Path | None = None

    def for_metadata(self) -> RawOptions:
        """The same for files of items, where the item's id may have another name."""
        columns = self.columns
        return replace(self, columns=columns.model_copy(update={"item": columns.meta_item or columns.item}))

    def names(self, role: str) -> tuple[str, ...]:
        """The configured column of a role alone, or all names it is known by."""
        chosen = getattr(self.columns, role)
        return (chosen,) if chosen else ALIASES[role]


def kind_of(path: Path) -> Kind:
    """Which reader a file needs, told by its name without ``.gz`` and the like.

    Raises:
        UserError: an unknown kind.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".bz2", ".xz")]
    last = suffixes[-1].lower() if suffixes else ""
    if last in (".json", ".jsonl", ".ndjson"):
        return "json"
    if last in (".csv", ".tsv", ".txt", ".inter", ".item"):
        return "delimited"
    if last in (".parquet", ".pq"):
        return "parquet"
    raise UserError(
        f"input file {path} has no known kind",
        "Known are .json, .jsonl, .csv, .tsv, .inter, .item (also .gz) and .parquet.",
    )


# ---- interactions ---------------------------------------------------------------------------------------------------


def interactions(path: Path, options: RawOptions, rejects: Rejects) -> Iterator[Batch]:
    """All usable interactions of a file, in file order; the others go to ``rejects``.

    Raises:
        UserError: missing or damaged file, columns that cannot be found.
    """
    reader = {"json": _json_interactions, "delimited": _delimited_interactions, "parquet": _parquet_interactions}
    return reader[kind_of(path)](path, options, rejects)


def _json_interactions(path: Path, options: RawOptions, rejects: Rejects) -> Iterator[Batch]:
    roles = ("user", "item", "timestamp", "rating")
    names: dict[str, str] | None = None  # of the file's first good line: what the fast reader looks for

    def slow(line: bytes) -> tuple[str, str, int, float]:
        record = parse_record(line)
        return _interaction(options.timestamp_unit, *(first_value(record, options.names(role)) for role in roles))

    with open_raw(path, rejects, allow_truncated=options.allow_truncated) as stream:
        for number, lines in line_blocks(stream, options.max_line_bytes):
            if number == 1:
                refuse_array(path, lines)
            batch = _fast_json(path, number, lines, names, options.timestamp_unit) if names else None
            numbers = range(number, number + len(lines))
            batch = batch or _row_by_row(path, numbers, lines, slow, rejects, options.max_line_bytes)
            if number == 1 and not len(batch.rating) and (keys := _json_keys(lines)):
                find_roles(path, keys, options, {"user", "item", "timestamp"}, roles)
            yield batch
            names = names or _json_names(lines, {role: options.names(role) for role in roles})


def _json_names(lines: Sequence[bytes | int], aliases: Mapping[str, Sequence[str]]) -> dict[str, str] | None:
    for line in lines[:100]:
        try:
            record = json.loads(line) if isinstance(line, bytes) else None
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found = {role: next((n for n in names if record.get(n) is not None), "") for role, names in aliases.items()}
            if found["user"] and found["item"] and found["timestamp"]:
                return {role: name for role, name in found.items() if name}
    return None


def _json_keys(lines: Sequence[bytes | int]) -> list[str]:
    """The fields of a file's first objects; empty where a line is none."""
    keys: dict[str, None] = {}
    for line in lines[:100]:
        try:
            keys |= dict.fromkeys(parse_record(line) if isinstance(line, bytes) else ())
        except ValueError:
            continue
    return list(keys)


def _fast_json(
    path: Path, number: int, lines: Sequence[bytes | int], names: Mapping[str, str], unit: TimestampUnit
) -> Batch | None:
    """The whole block by Arrow's reader, or None where a line is unusual in any way."""
    if any(isinstance(line, int) or not line for line in lines):
        return None
    block = b"\n".join(lines)  # type: ignore[arg-type]
    types = {"user": pa.string(), "item": pa.string(), "timestamp": pa.int64(), "rating": pa.float64()}
    schema = pa.schema([(name, types[role]) for role, name in names.items()])
    try:
        block.decode("utf-8")
        table = pyarrow.json.read_json(
            io.BytesIO(block),
            read_options=pyarrow.json.ReadOptions(block_size=len(block) + 1),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
        return None
    columns = {role: table[name].combine_chunks() for role, name in names.items()}
    return _fast_batch(path, range(number, number + len(lines)), columns, unit)


def _fast_batch(
    path: Path, numbers: Sequence[int], columns: Mapping[str, pa.Array], unit: TimestampUnit
) -> Batch | None:
    user, item, timestamp = columns["user"], columns["item"], columns["timestamp"]
    expected = len(numbers)
    if len(user) != expected or any(column.null_count for column in (user, item, timestamp)):
        return None
    if not expected:
        return None
    user, item = plain_ids(user), plain_ids(item)
    if any(pc.any(pc.is_in(column, value_set=pa.array(_NO_ID))).as_py() for column in (user, item)):
        return None
    time_ms = _times(timestamp.to_numpy(zero_copy_only=False), unit)
    if time_ms is None:
        return None
    return Batch(user, item, time_ms, _ratings(columns.get("rating"), expected), _row_keys(path, numbers))


def plain_id(text: str) -> str:
    """An id without blanks around it; ``123.0`` is ``123``: pandas makes integers floats where one is missing."""
    return re.sub(r"^(-?[0-9]+)\.0$", r"\1", text.strip())


def plain_ids(column: pa.Array) -> pa.Array:
    """`plain_id` of Arrow strings."""
    column = pc.utf8_trim_whitespace(column)
    if pc.any(pc.ends_with(column, ".0")).as_py():
        column = pc.replace_substring_regex(column, r"^(-?\d+)\.0$", r"\1")
    return column


def _times(values: np.ndarray, unit: TimestampUnit) -> np.ndarray | None:
    """Milliseconds since 1970 as int64; None if any is not a time."""
    numbers = values.astype(np.float64)
    scale: Any
    if unit == "auto":
        size = np.abs(numbers)
        scale = np.select([size >= least for least, _ in _SCALES], [scale for _, scale in _SCALES], 1000.0)
    else:
        scale = _MILLISECONDS[unit]
    milliseconds = np.floor(numbers * scale)
    if not np.isfinite(milliseconds).all() or (np.abs(milliseconds) > _MAX_TIME_MS).any():
        return None
    return milliseconds.astype(np.int64)


def _ratings(column: pa.Array | None, n: int) -> np.ndarray:
    if column is None:
        return np.full(n, np.nan, np.float32)
    return column.to_numpy(zero_copy_only=False).astype(np.float32)


def _row_keys(path: Path, numbers: Sequence[int]) -> Callable[[int], str]:
    return lambda row: f"{path}:{numbers[row]}"


def _row_by_row(
    path: Path,
    numbers: Sequence[int],
    rows: Sequence[bytes | int],
    parse: Callable[[bytes], tuple[str, str, int, float]],
    rejects: Rejects,
    max_line_bytes: int,
) -> Batch:
    """The batch of the rows that can be parsed; the others are put aside one by one."""
    good, kept = [], []
    for number, row in zip(numbers, rows, strict=True):
        key = f"{path}:{number}"
        if isinstance(row, int):
            rejects.add(key, "LineTooLong", f"{row} bytes, at most {max_line_bytes} are read")
        elif row.strip():
            try:
                good.append(parse(row))
                kept.append(number)
            except ValueError as error:
                rejects.add(key, "BadInteraction", f"{error}; the line: {excerpt(row)}")
    users, items, times, ratings = zip(*good, strict=True) if good else ((), (), (), ())
    return Batch(
        pa.array(users, pa.string()),
        pa.array(items, pa.string()),
        np.array(times, np.int64),
        np.array(ratings, np.float32),
        _row_keys(path, kept),
    )


def _interaction(unit: TimestampUnit, user: Any, item: Any, timestamp: Any, rating: Any) -> tuple[str, str, int, float]:
    """One checked interaction.

    Raises:
        ValueError: what is wrong, in words.
    """
    return identifier(user, "user"), identifier(item, "item"), _time(timestamp, unit), _rating(rating)


def identifier(value: Any, role: str) -> str:
    """A user's or item's id as text.

    Raises:
        ValueError: missing, or not a string or number.
    """
    if isinstance(value, str):
        value = plain_id(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value in _NO_ID:
        missing = value is None or value in _NO_ID
        raise ValueError(f"no {role} id" if missing else f"the {role} id is a {type(value).__name__}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"no {role} id")
        value = int(value) if value.is_integer() else value
    return printable(str(value))


def _time(value: Any, unit: TimestampUnit) -> int:
    if value is None or value == "":
        raise ValueError("no timestamp")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return _date(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"timestamp {value!r} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    size = abs(number)
    scale = _MILLISECONDS[unit] if unit != "auto" else next((s for least, s in _SCALES if size >= least), 1000.0)
    milliseconds = number * scale
    if not math.isfinite(milliseconds) or abs(math.floor(milliseconds)) > _MAX_TIME_MS:
        raise ValueError(f"timestamp {value!r} is not a time")
    return math.floor(milliseconds)


def _date(text: str) -> int:
    iso = text.strip().removesuffix(" UTC")
    try:
        moment = datetime.fromisoformat(iso.replace("/", "-") if re.match(r"\d{4}/", iso) else iso)
    except ValueError:
        raise ValueError(f"timestamp {excerpt(text)!r} is neither a number nor an ISO date") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return math.floor(moment.timestamp() * 1000)


def _rating(value: Any) -> float:
    if value is None or (isinstance(value, str) and value.strip().lower() in _NO_RATING):
        return math.nan
    if isinstance(value, str) and re.fullmatch(r"-?\d+,\d{1,2}", value.strip()):
        value = value.replace(",", ".")  # a decimal comma
    try:
        return float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        raise ValueError(f"rating {value!r} is not a number") from None


# ---- delimited files ------------------------------------------------------------------------------------------------


def plain_name(column: str) -> str:
    """A column's name without the type that RecBole appends, as in ``user_id:token``."""
    return column.partition(":")[0].strip().strip('"')


def _delimiter(path: Path, options: RawOptions) -> str:
    tabbed = any(suffix in (".tsv", ".inter", ".item") for suffix in path.suffixes)
    return options.columns.delimiter or ("\t" if tabbed else ",")


def _is_recbole(path: Path) -> bool:
    return any(suffix in (".inter", ".item") for suffix in path.suffixes)


def find_roles(
    path: Path, columns: Sequence[str], options: RawOptions, required: Set[str], wanted: Sequence[str]
) -> dict[str, str]:
    """role -> column.

    Raises:
        UserError: a required or configured column is not there.
    """
    by_name = {plain_name(column): column for column in columns}
    roles = {}
    for role in wanted:
        found = next((by_name[name] for name in options.names(role) if name in by_name), None)
        if found is not None:
            roles[role] = found
        elif role in required or getattr(options.columns, role):
            expected = getattr(options.columns, role) or f"one of {', '.join(ALIASES[role])}"
            key = "meta_item" if role == "item" and "user" not in required else role
            headless = kind_of(path) == "delimited" and "user" in required
            raise UserError(
                f"{path} has no {role} column ({expected}); its columns are {', '.join(by_name)}",
                f"Name it with columns.{key}=NAME"
                + (" (or columns.names=[...] for a file without a header line)." if headless else "."),
            )
    return roles


def _telling(header: str, delimiter: str, options: RawOptions, required: Set[str]) -> str:
    """The delimiter by which the header names what is required: a .csv may have semicolons, for decimal commas."""
    for mark in (delimiter, *"\t;,|"):
        names = {plain_name(name) for name in next(csv.reader([header], delimiter=mark), [])}
        if all(names.intersection(options.names(role)) for role in required):
            return mark
    return delimiter


def read_header(
    path: Path,
    blocks: Iterator[tuple[int, list[bytes | int]]],
    options: RawOptions,
    required: Set[str],
    wanted: Sequence[str],
) -> tuple[Dialect, dict[str, str], Iterator[tuple[int, list[bytes | int]]]]:
    """(how a delimited file is written, role -> column, its lines without the header).

    The columns come from the header or, for interactions, from ``columns.names``.

    Raises:
        UserError: the file is empty, required columns are missing, or a name stands twice.
    """
    number, lines = next(blocks, (1, []))
    if lines and isinstance(lines[0], bytes):
        lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
        if b"\r" in lines[0].rstrip(b"\r"):
            raise UserError(f"the lines of {path} end in carriage returns alone", "Convert it: `tr '\\r' '\\n'`.")
    names = options.columns.names if "user" in required else ()
    delimiter = _delimiter(path, options)
    if lines and isinstance(lines[0], bytes) and not names and not options.columns.delimiter:
        delimiter = _telling(decode(lines[0]), delimiter, options, required)
    dialect = read_dialect(lines, delimiter, quoting=not _is_recbole(path), names=names)
    header = tuple(name if name.strip() else f"column {place}" for place, name in enumerate(dialect.header, start=1))
    dialect = replace(dialect, header=header)
    if not dialect.header:
        raise UserError(f"{path} is empty", "Expected a header line and rows.")
    if len(set(dialect.header)) != len(dialect.header):
        raise UserError(f"{path} has a column name twice: {', '.join(dialect.header)}", "Rename one of them.")
    skipped = dialect.header_lines
    rest = chain([(number + skipped, lines[skipped:])], blocks)
    return dialect, find_roles(path, dialect.header, options, required, wanted), rest


def _delimited_interactions(path: Path, options: RawOptions, rejects: Rejects) -> Iterator[Batch]:
    wanted = ("user", "item", "timestamp", "rating")
    with open_raw(path, rejects, allow_truncated=options.allow_truncated) as stream:
        blocks = line_blocks(stream, options.max_line_bytes)
        dialect, roles, blocks = read_header(path, blocks, options, {"user", "item", "timestamp"}, wanted)
        places = [dialect.header.index(roles[role]) if role in roles else None for role in wanted]

        def slow(record: bytes) -> tuple[str, str, int, float]:
            values = dialect.split(record)
            given = (None if place is None else values[place] for place in places)
            return _interaction(options.timestamp_unit, *given)

        types: dict[str, Any] = {}
        for found in record_blocks(blocks, dialect, _succeeds(slow), options.max_line_bytes):
            types = types or (_column_types(dialect, roles, found.records) if found.records else {})
            batch = _fast_delimited(path, found, dialect, roles, types, options.timestamp_unit)
            yield batch or _row_by_row(path, found.numbers, found.records, slow, rejects, options.max_line_bytes)


def _succeeds(parse: Callable[[bytes], Any]) -> Callable[[bytes], bool]:
    def succeeds(line: bytes) -> bool:
        try:
            parse(line)
        except ValueError:
            return False
        return True

    return succeeds


def _column_types(dialect: Dialect, roles: Mapping[str, str], records: Sequence[bytes | int]) -> dict[str, Any]:
    """Arrow types for the fast reader, after the first row; a block that differs is read row by row."""
    types = {roles["user"]: pa.string(), roles["item"]: pa.string(), roles["timestamp"]: pa.int64()}
    if "rating" in roles:
        types[roles["rating"]] = pa.float64()
    for record in records[:1]:
        try:
            values = dialect.split(record) if isinstance(record, bytes) else []
        except ValueError:
            continue
        value = values[dialect.header.index(roles["timestamp"])] if values else ""
        if not re.fullmatch(r"-?\d+", value.strip()):
            types[roles["timestamp"]] = pa.float64() if re.fullmatch(r"[-+.\deE]+", value) else pa.string()
    return types


def _fast_delimited(
    path: Path,
    found: Records,
    dialect: Dialect,
    roles: Mapping[str, str],
    types: Mapping[str, Any],
    unit: TimestampUnit,
) -> Batch | None:
    """The whole block by Arrow's reader, or None where a row is unusual in any way."""
    if not found.text:
        return None
    quoted = dialect.quoting and b'"' in found.text
    try:
        found.text.decode("utf-8")
        table = pyarrow.csv.read_csv(
            io.BytesIO(found.text),
            read_options=pyarrow.csv.ReadOptions(column_names=list(dialect.header), block_size=len(found.text) + 1),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=dialect.delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict(types), include_columns=list(types), null_values=[""]
            ),
        )
        columns = {role: table[name].combine_chunks() for role, name in roles.items()}
        if pa.types.is_string(columns["timestamp"].type):
            columns["timestamp"] = _iso_dates(columns["timestamp"])
            unit = "ms"
    except (pa.ArrowInvalid, pl.exceptions.PolarsError, UnicodeDecodeError):
        return None
    return _fast_batch(path, found.numbers, columns, unit)


def _iso_dates(column: pa.Array) -> pa.Array:
    if not pc.all(pc.match_substring_regex(column, r"^\s*\d{4}[-/T]?\d")).as_py():
        raise pa.ArrowInvalid("not ISO dates")  # 1/2/2015 is another day in another country
    times = pl.Series(column).str.to_datetime(time_unit="ms", time_zone="UTC", strict=True)
    return times.cast(pl.Int64).to_arrow()


def _parquet_interactions(path: Path, options: RawOptions, rejects: Rejects) -> Iterator[Batch]:
    file = open_parquet(path)
    wanted = ("user", "item", "timestamp", "rating")
    roles = find_roles(path, file.schema_arrow.names, options, {"user", "item", "timestamp"}, wanted)
    number = 1
    for batch in read_batches(path, file, _PARQUET_ROWS, list(roles.values())):
        columns = {role: parquet_column(path, role, name, batch.column(name)) for role, name in roles.items()}
        dated = is_dated(batch.schema.field(roles["timestamp"]).type)
        unit = "ms" if dated else options.timestamp_unit
        numbers = range(number, number + len(batch))
        fast = _fast_parquet(path, numbers, columns, unit)
        yield fast or _parquet_rows(path, numbers, columns, unit, rejects)
        number += len(batch)


def _fast_parquet(
    path: Path, numbers: Sequence[int], columns: Mapping[str, pa.Array], unit: TimestampUnit
) -> Batch | None:
    """The whole batch, or None where a value is missing or cannot be read."""
    if "rating" in columns and pa.types.is_string(columns["rating"].type):
        return None
    if pa.types.is_string(columns["timestamp"].type):
        try:
            columns, unit = {**columns, "timestamp": _iso_dates(columns["timestamp"])}, "ms"
        except (pa.ArrowInvalid, pl.exceptions.PolarsError):
            return None
    return _fast_batch(path, numbers, columns, unit)


def _parquet_rows(
    path: Path, numbers: Sequence[int], columns: Mapping[str, pa.Array], unit: TimestampUnit, rejects: Rejects
) -> Batch:
    """A Parquet batch with values that are missing or cannot be read."""
    roles = ("user", "item", "timestamp", "rating")
    lists = [columns[role].to_pylist() if role in columns else [None] * len(numbers) for role in roles]
    rows = [json.dumps(row, default=str).encode() for row in zip(*lists, strict=True)]
    return _row_by_row(path, numbers, rows, lambda row: _interaction(unit, *json.loads(row)), rejects, 1 << 30)


def first_value(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these keys that is there and not empty."""
    for name in names:
        value = record.get(name)
        if value is not None and value != "" and value != []:
            return value
    return None

"""Files of ranked lists, as retrievers and other programs write them, with the ids that they hold.

| file | content |
| --- | --- |
| `.parquet` | a row per user: a list of items, optionally scores and split |
| | a row per item: a user, an item, and a score or rank |
| `.jsonl`, `.json` | the same, one object a line |
| `.tsv`, `.csv`, other text | a line per item, with or without a header: `user item score [rank]`, in any order |
| | a line per user: `user<TAB>item item ...`, or a header that names a user and a list of items |
| | MyMediaLite: `user<TAB>[item:score,item:score]` |
| TREC run | `user Q0 item rank score tag` |
| `.pkl` | LlamaRec's `retrieved.pkl`, through an unpickler that knows arrays and numbers only |

Text is separated by tabs, semicolons, commas, bars or, where it has none of them, blanks; it may be compressed. A row
may also hold a list of items with their scores, as Spark's ALS recommends.

Scores order a list, the best first (of a column called distance, the lowest); equal scores are ordered by rank, and
items whose score is no number come last.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from vlrank.data.candidates_io import read_llamarec
from vlrank.data.cells import parse_cell
from vlrank.data.rawfiles import Rejects, decode, excerpt, open_raw
from vlrank.data.sources import ALIASES, plain_name
from vlrank.errors import UserError

FORMATS = (
    "Parquet, JSONL, CSV or TSV with a user and a list of items, or with a user, an item, its score and rank a line; "
    "a TREC run; `user<TAB>items`"
)
_USER = ("user_id", "user", "source_user", *ALIASES["user"])
_ITEMS = ("item_ids", "candidates", "items", "item_list", "prediction", "predictions", "recommendations")
_SCORE = ("scores", "score", "rating", "prediction", "pred", "relevance", "similarity", "weight", "value")
_RANK = ("rank", "position")
_DISTANCE = ("distance", "dist")
_PEEK_LINES = 1000
_TREC = re.compile(r"(.*\S)\s+Q0\s+(.*\S)\s+(\S+)\s+(\S+)\s+(\S+)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RawLists:
    """Lists with the ids of their file.

    Attributes:
        table: ``split``, ``user``, ``items`` (list), ``scores`` (list<float32>, null where the order alone is known),
            ``our_names`` (whether the columns are called as ours are).
        layout: What the file was taken for, in words.
        notes: What is worth knowing about its order, label -> text.
    """

    table: pl.DataFrame
    layout: str
    notes: dict[str, str] = field(default_factory=dict)


def read_lists(path: Path, split: str) -> RawLists:
    """The lists of a file.

    Args:
        path: The file.
        split: The split of files that do not say it.

    Raises:
        UserError: unreadable, or columns that cannot be told.
    """
    suffix = next((end.lower() for end in reversed(path.suffixes) if end not in (".gz", ".bz2", ".xz")), "")
    if suffix in (".pkl", ".pickle"):
        names = ("split", "user_id", "item_ids", "scores")
        rows = (dict(zip(names, row, strict=True)) for row in read_llamarec(path, top_k=200))
        return _from_table(_frame(rows), path, split)
    if suffix == ".parquet":
        return _from_table(_parquet(path), path, split)
    with open_raw(path, Rejects(lambda _: None)) as stream:
        content = stream.read().removeprefix(b"\xef\xbb\xbf")
    lines = [decode(line).rstrip("\r") for line in content.split(b"\n")]
    first = next((line for line in lines if line.strip()), "")
    if suffix in (".jsonl", ".json", ".ndjson") or first.lstrip().startswith("{"):
        return _from_table(_frame(_json_rows(lines, path)), path, split)
    if re.search(r"\sQ0\s", first, re.IGNORECASE):
        return _long(_trec(lines, path), split, "a TREC run")
    return _from_text(lines, first, path, split)


def _parquet(path: Path) -> pl.DataFrame:
    try:
        frame = pl.from_arrow(pq.ParquetFile(path).read())
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    assert isinstance(frame, pl.DataFrame)
    return frame


def _frame(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), infer_schema_length=None, strict=False)


def _json_rows(lines: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg})", "One object per line is expected."
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: an object with a user and items is expected")
        key = next((key for key in ("candidates", "items") if isinstance(row.get(key), list)), None)
        if key and not any(isinstance(item, dict) for item in row[key]):
            # numbers and strings may be mixed in a line; compare them as text
            row[key] = [str(item) for item in row[key]]
        yield row


# ---- tables with named columns ---------------------------------------------------------------------------------------


def _column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column that goes by one of these names: ``userId``, ``user_id:token`` and ``User ID`` are ``user_id``."""
    known = {_folded(column): column for column in reversed(columns)}
    return next((known[_folded(name)] for name in names if _folded(name) in known), None)


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]", "", plain_name(name)).lower()


def _from_table(table: pl.DataFrame, path: Path, split: str) -> RawLists:
    """One list, or one item, per row."""
    columns = table.columns
    user, items, item = (_column(columns, names) for names in (_USER, _ITEMS, ALIASES["item"]))
    if user is None or (items is None and item is None):
        raise UserError(
            f"{path} has columns {excerpt(', '.join(columns))}; "
            "a user and a list of items are needed, or a user and an item",
            f"Formats: {FORMATS}.",
        )
    table = table.with_columns(
        pl.col("split").cast(pl.String) if "split" in columns else pl.lit(split).alias("split"),
        _id(table, user).alias("user"),
    )
    if item is not None and not table.schema[item].is_nested():
        score, rank = _column(columns, _SCORE), _column(columns, _RANK)
        if score is None and rank is None:
            score, rank = _by_content(table, user, [name for name in columns if name not in (user, item, "split")])
        distance = _column(columns, _DISTANCE) if score is None or _column([score], _DISTANCE) else None
        score = distance or score
        told = [name for name in (user, item, score, rank) if name]
        for column in (score, rank):
            if column and len(texts := table.filter(_number(column).is_null())):
                raise UserError(
                    f"column {column} of {path} holds {excerpt(str(texts[column][0]))!r}, expected numbers",
                    "Correct it, or rename the column if it is neither score nor rank.",
                )
        single = table.select(
            "split",
            "user",
            _id(table, item).alias("item"),
            (_number(score) * (-1 if distance else 1) if score else pl.lit(None, pl.Float64)).alias("score"),
            (_number(rank) if rank else pl.lit(None, pl.Float64)).alias("rank"),
        )
        return _long(single, split, f"one item a line ({', '.join(told)})")
    name = items or item or ""
    lists = _list_column(table, name, path)
    if isinstance(inner := getattr(lists.dtype, "inner", None), pl.Struct) and _column(
        [field.name for field in inner.fields], ALIASES["item"]
    ):  # [{item_id, rating}, ...], as Spark's ALS recommends
        flat = table.select("split", "user", lists.alias(name)).explode(name).drop_nulls(name).unnest(name)
        return _from_table(flat, path, split)
    scores = _column(columns, ("scores", "score"))
    has_scores = scores is not None and isinstance(table.schema[scores], pl.List)
    return RawLists(
        table.select(
            "split",
            "user",
            lists.alias("items"),
            (pl.col(scores or "") if has_scores else pl.lit(None)).cast(pl.List(pl.Float32)).alias("scores"),
            pl.lit(user == "user_id" and name == "item_ids").alias("our_names"),
        ),
        f"one list a line ({user}, {name})",
    )


def _by_content(table: pl.DataFrame, user: str, others: Sequence[str]) -> tuple[str | None, str | None]:
    """(score, rank) among one or two columns of numbers whose names say nothing."""
    times = {_folded(name) for name in ALIASES["timestamp"]}
    flat = [name for name in others if _folded(name) not in times and not table.schema[name].is_nested()]
    numbers = table.select(_number(name) for name in flat)
    numbers = numbers.select(name for name in flat if not numbers[name].null_count())
    columns = {role: name for name, role in _roles(table[user], numbers).items()} if 1 <= numbers.width <= 2 else {}
    return columns.get("score"), columns.get("rank")


def _id(table: pl.DataFrame, name: str) -> pl.Expr:
    """Ids as integers or text; pandas makes integers floats where one is missing."""
    kind = table.schema[name]
    if kind.is_integer():
        return pl.col(name)
    if kind.is_float() and (table[name].drop_nans().drop_nulls() % 1 == 0).all():
        return pl.col(name).cast(pl.Int64, strict=False)
    return without_fraction(pl.col(name).cast(pl.String))


def without_fraction(ids: pl.Expr) -> pl.Expr:
    """``123.0`` is ``123``: pandas makes integers floats where one is missing."""
    return ids.str.replace(r"^(-?\d+)\.0$", "$1")


def _number(name: str) -> pl.Expr:
    """Numbers of a column of any type: NaN where the value is missing, null where it is no number."""
    text = pl.col(name).cast(pl.String).str.strip_chars()
    missing = text.is_null() | text.str.to_lowercase().is_in(["", "nan", "none", "null", "na", "<na>"])
    text = text.str.replace(r"^([-+]?\d*),(\d+)$", "$1.$2")  # a decimal comma
    return pl.when(missing).then(float("nan")).otherwise(text.cast(pl.Float64, strict=False)).alias(name)


def _list_column(table: pl.DataFrame, name: str, path: Path) -> pl.Series:
    column = table[name]
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if column.dtype == pl.String:  # "['A', 'B']" or "A B"
        cells = [parse_cell(cell) for cell in column.to_list()]
        split = [re.split(r"[\s,|]+", cell.strip()) if isinstance(cell, str) else cell or [] for cell in cells]
        if any(len(items) > 1 for items in split):
            column = pl.Series(name, [[str(item) for item in items] for items in split], pl.List(pl.String))
    if not isinstance(column.dtype, pl.List):
        raise UserError(f"column {name} of {path} holds {column.dtype}, expected a list of items")
    return column


# ---- text ----------------------------------------------------------------------------------------------------------


def _trec(lines: Iterable[str], path: Path) -> pl.DataFrame:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = _TREC.fullmatch(line.strip())
        try:
            user, item, rank, score = found.groups()[:4] if found else ("", "", "", "")
            rows.append((user, item, float(rank), float(score)))
        except ValueError as error:
            width = len(line.split())
            problem = error if width == 6 else f"{width} columns, expected 6"
            raise UserError(
                f"{path}, line {number}: not a TREC run line: {problem}", "Expected: user Q0 item rank score tag."
            ) from None
    return pl.DataFrame(rows, schema=["user", "item", "rank", "score"], orient="row")


def _from_text(lines: list[str], first: str, path: Path, split: str) -> RawLists:
    delimiter = next((mark for mark in "\t;,|" if mark in first), "\t")  # semicolons leave the comma to decimals
    if delimiter not in first and len(first.split()) > 2:
        lines = ["\t".join(line.split()) for line in lines]
    head = [line for line in lines[:_PEEK_LINES] if line.strip()]
    if head and all(line.endswith(delimiter) for line in head):
        lines = [line.removesuffix(delimiter) for line in lines]
        head = [line.removesuffix(delimiter) for line in head]
    rows = list(csv.reader(head, delimiter=delimiter))
    widths = {len(row) for row in rows}
    named = rows and _column(rows[0], _USER) and (_column(rows[0], _ITEMS) or _column(rows[0], ALIASES["item"]))
    lists_of_items = delimiter == "\t" and not named and (len(widths) > 1 or max(widths, default=0) <= 2)
    table = None if lists_of_items else _text_table(lines, delimiter, path, ragged=delimiter == "\t" and not named)
    if table is not None and named:
        names = [name.strip() or unnamed for name, unnamed in zip(rows[0], table.columns, strict=True)]
        if len(set(names)) < len(names):
            raise UserError(f"{path} has a column name twice: {', '.join(names)}", "Rename one of them.")
        return _from_table(table.slice(1).rename(dict(zip(table.columns, names, strict=True))), path, split)
    if table is not None and (single := _unnamed(table, delimiter)) is not None:
        order = ", ".join(name for name in ("user", "item", "score", "rank") if name in single.columns)
        return _long(single, split, f"one item a line ({order}, without a header line)")
    if delimiter != "\t":
        raise UserError(
            f"{path}: the columns of its first line, {excerpt(first)}, are not told by names, and are not user, item, "
            "score and rank",
            "Give it a header line, such as user_id,item_id,score,rank.",
        )
    lists = _frame(_text_rows(lines, path, split))
    joined = len(lists) < sum(bool(line.strip()) for line in lines)
    return RawLists(lists, "one item a line (user<TAB>item)" if joined else "lists of items (user<TAB>items)")


def _text_table(lines: Sequence[str], delimiter: str, path: Path, *, ragged: bool) -> pl.DataFrame | None:
    """All lines as columns of text; None if ``ragged`` and the lines have different numbers of columns."""
    text = "\n".join(line for line in lines if line.strip()) + "\n"
    width = len(next(csv.reader(io.StringIO(text), delimiter=delimiter)))
    names = [f"column {number}" for number in range(1, width + 1)]
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(text.encode("utf-8", "replace")),
            read_options=pyarrow.csv.ReadOptions(column_names=names, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except pa.ArrowInvalid as error:
        if ragged:
            return None
        raise UserError(f"{path}: {error}", f"Formats: {FORMATS}.") from None
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(pl.all().str.strip_chars())


def _unnamed(table: pl.DataFrame, delimiter: str) -> pl.DataFrame | None:
    """``user item [score] [rank]`` by position, below unknown names or none; None if that cannot be meant."""
    if not 2 <= table.width <= 4:
        return None
    for rows in (table, table.slice(1)):
        numbers = rows.select(_number(name) for name in rows.columns[2:])
        if not any(column.null_count() for column in numbers):
            break
    else:
        return None
    rows = rows.rename(dict(zip(rows.columns[:2], ("user", "item"), strict=True)))
    named = {role: numbers[name] for name, role in _roles(rows["user"], numbers).items()}
    lists_of_numbers = all(column.is_nan().not_().all() and (column % 1 == 0).all() for column in numbers)
    if len(named) < numbers.width or (delimiter == "\t" and lists_of_numbers and rows["user"].is_unique().all()):
        return None
    return rows.select("user", "item").with_columns(**named)


def _roles(users: pl.Series, numbers: pl.DataFrame) -> dict[str, str]:
    """column -> score or rank. Ranks count from 0 or 1 in every list; of two columns either may be the rank."""
    if not numbers.width:
        return {}
    per_user = numbers.with_columns(user=users).group_by("user")
    lengths = per_user.len().sort("user")["len"]
    lowest, highest, distinct = (
        per_user.agg(expression).sort("user") for expression in (pl.all().min(), pl.all().max(), pl.all().n_unique())
    )

    def is_rank(name: str) -> bool:
        start = lowest[name]
        return bool(
            start.is_in([0.0, 1.0]).all()
            and (distinct[name] == lengths).all()
            and (highest[name] - start == lengths - 1).all()
        )

    ranks = [name for name in numbers.columns if is_rank(name)]
    if numbers.width == 2:  # ranks with gaps, where a file was filtered
        whole = [name for name in numbers.columns if (numbers[name] % 1 == 0).all()]
        ranks = ranks or (whole if len(whole) == 1 else [])
        return {name: "rank" if name == ranks[-1] else "score" for name in numbers.columns} if ranks else {}
    falling = (users != users.shift()) | (numbers.to_series().diff() < 0) if ranks else None
    return {name: "score" if falling is None or falling.all() else "rank" for name in numbers.columns}


def _text_rows(lines: Iterable[str], path: Path, split: str) -> Iterator[dict[str, Any]]:
    rows: list[tuple[str, list[str]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        user, tab, rest = line.partition("\t")
        if not tab or not user.strip():
            width = len(line.split())
            raise UserError(
                f"{path}, line {number}: no tab between user and items, but {width} columns", f"Formats: {FORMATS}."
            )
        rows.append((user.strip(), [rest.strip()]))
    # One item a line names its users again and again; ids may have blanks.
    single = 2 * len({user for user, _ in rows}) < len(rows) and not any("\t" in rest for _, (rest,) in rows)
    if not single:
        rows = [(user, rest.replace(",", " ").split()) for user, (rest,) in rows]
    if rows and all(re.fullmatch(r"\[.*\]", " ".join(items)) for _, items in rows):  # MyMediaLite: [item:score,...]
        rows = [(user, " ".join(items).strip("[] ").split()) for user, items in rows]
        pairs = [(user, [item.rpartition(":") for item in items]) for user, items in rows]
        try:
            scored = [(user, [(item, float(score)) for item, _, score in found]) for user, found in pairs]
        except ValueError:
            scored = []
        for user, found in scored:
            best = sorted(found, key=lambda pair: -pair[1])
            scores = [score for _, score in best]
            yield {
                "split": split,
                "user": user,
                "items": [item for item, _ in best],
                "scores": scores,
                "our_names": False,
            }
        if scored:
            return
    if all(len(items) <= 1 for _, items in rows):
        joined: dict[str, list[str]] = {}
        for user, items in rows:
            joined.setdefault(user, []).extend(items)
        rows = list(joined.items())
    for user, items in rows:
        yield {"split": split, "user": user, "items": items, "scores": None, "our_names": False}


# ---- one item a row ------------------------------------------------------------------------------------------------


def _long(rows: pl.DataFrame, split: str, layout: str) -> RawLists:
    """Lists from rows of ``user``, ``item`` and, where known, ``split``, ``score`` and ``rank``."""
    defaults = {"split": pl.lit(split), "score": pl.lit(None, pl.Float64), "rank": pl.lit(None, pl.Float64)}
    rows = rows.with_columns(**{name: value for name, value in defaults.items() if name not in rows.columns})
    rows = rows.with_columns(pl.col("score", "rank").fill_nan(None))
    scored, keys = rows["score"].is_not_null(), ("split", "user")
    rises = (pl.len() > 1) & ((pl.col("score").diff() > 0).sum() == pl.len() - 1)
    rising = rows.group_by(keys).agg(up=rises)["up"].all()
    ordered = rows.sort("score", "rank", descending=[True, False], nulls_last=True, maintain_order=True)
    lists = ordered.group_by(keys, maintain_order=True).agg(
        items=pl.col("item"),
        scores=pl.when(pl.col("score").is_finite().fill_null(False).all()).then(
            pl.col("score").cast(pl.Float32).implode()
        ),
        backwards=((pl.col("rank").diff() < 0) & (pl.col("score").diff() < 0)).any(),
        reverse=(pl.len() > 1) & ((pl.col("rank").diff() < 0).sum() == pl.len() - 1),
    )
    notes = {}
    if unscored := int(scored.not_().sum()) if scored.any() else 0:
        notes["scores"] = f"{unscored:,} of {len(rows):,} are no numbers: their items come last"
    backwards = int(lists["backwards"].sum())
    reverse = bool(lists["reverse"].all()) and len(lists) > 1
    if rising and len(lists) > 1 and not reverse:
        notes["order"] = "the scores rise along the lines of every list: the highest comes first all the same"
    if reverse and "TREC" not in layout:
        raise UserError(
            f"{len(rows):,} lines of {layout}: the ranks contradict the scores in all {len(lists):,} lists",
            "Leave out the column that does not count; if the scores are distances, call their column distance.",
        )
    if backwards:
        notes["ranks"] = f"contradict the scores in {backwards:,} of {len(lists):,} lists: the scores count"
    return RawLists(
        lists.select("split", "user", "items", "scores", our_names=pl.lit(False)),
        f"{len(rows):,} lines of {layout}",
        notes,
    )

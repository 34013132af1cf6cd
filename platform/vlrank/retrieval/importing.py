"""Candidate lists of other programs: Parquet, JSONL, TREC runs and plain text, with their ids mapped to ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from vlrank.config import Split
from vlrank.data.candidates_io import read_llamarec
from vlrank.data.dataset import Dataset
from vlrank.errors import UserError

Ids = Literal["auto", "source", "vlrank"]

_USER = ("user_id", "user", "source_user", "uid")
_ITEMS = ("item_ids", "candidates", "items", "item_list")
_SCORES = ("scores", "score")
_FORMATS = "Parquet or JSONL with a user, a list of items and optionally scores and split; a TREC run; `user<TAB>items`"


@dataclass(frozen=True, slots=True)
class Imported:
    """Lists as they were read, with our ids.

    Attributes:
        table: ``split``, ``user_id`` int32, ``item_ids`` list<int32>, ``scores`` list<float32>.
        rejected: What could not be used, as quarantine rows (``key``, ``error_type``, ``message``).
    """

    table: pl.DataFrame
    rejected: list[dict[str, str]]


def read_candidates(path: Path, dataset: Dataset, *, split: Split = "test", ids: Ids = "auto") -> Imported:
    """Read a candidates file.

    Formats, told apart by suffix and content:
        ``.parquet``: columns user_id or user, item_ids or candidates or items, optionally scores and split.
        ``.jsonl``, ``.json``: one object per line with the same keys.
        ``.pkl``: LlamaRec's ``retrieved.pkl``, through an unpickler that knows arrays and numbers only.
        TREC run: ``user Q0 item rank score tag``, best score first, equal scores by rank.
        Other text: ``user<TAB>item item ...``, items separated by spaces, commas or tabs, best first; or one item per
        line, a user's lines in their order.

    Of several lists of one user the first counts.

    Args:
        path: The file.
        dataset: Gives the ids.
        split: The split of files that do not say it.
        ids: Whose ids the file holds. ``auto``: integers in columns user_id and item_ids are ours; everything else is
            the source's, unless none of its users is known and all are numbers within our range.

    Raises:
        UserError: unreadable, unknown columns, or not one row could be matched.
    """
    if not path.is_file():
        raise UserError(f"candidates file {path} does not exist", f"Formats: {_FORMATS}.")
    raw = _read(path, split)
    if raw.is_empty():
        raise UserError(f"candidates file {path} holds no lists", f"Formats: {_FORMATS}.")
    ours = {"auto": None, "source": False, "vlrank": True}[ids]
    return _map_ids(raw, dataset, ours, path)


def _read(path: Path, split: str) -> pl.DataFrame:
    """Columns split, user, items, scores; ids as they are."""
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle"):
        names = ("split", "user_id", "item_ids", "scores")
        return _columns(
            _frame(dict(zip(names, row, strict=True)) for row in read_llamarec(path, top_k=200)), path, split
        )
    if suffix == ".parquet":
        try:
            return _columns(pl.read_parquet(path), path, split)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{path} is not a readable Parquet file: {error}") from None
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
        lines.seek(0)
        if suffix in (".jsonl", ".json", ".ndjson") or first.lstrip().startswith("{"):
            return _columns(_frame(_json_rows(lines, path)), path, split)
        parts = first.split()
        if len(parts) == 6 and parts[1].upper() == "Q0":
            return _trec(lines, path).with_columns(split=pl.lit(split))
        return _frame(_text_rows(lines, path, split))


def _frame(rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), infer_schema_length=None, strict=False)


def _columns(table: pl.DataFrame, path: Path, split: str) -> pl.DataFrame:
    user, items = (next((n for n in names if n in table.columns), None) for names in (_USER, _ITEMS))
    if user is None or items is None:
        raise UserError(
            f"{path} has columns {', '.join(table.columns)}; a user and a list of items are needed", _FORMATS
        )
    if not isinstance(table.schema[items], pl.List):
        raise UserError(f"column {items} of {path} holds {table.schema[items]}, expected a list of items")
    scores = next((n for n in _SCORES if n in table.columns and isinstance(table.schema[n], pl.List)), None)
    return table.select(
        pl.col("split").cast(pl.String) if "split" in table.columns else pl.lit(split).alias("split"),
        pl.col(user).alias("user"),
        pl.col(items).alias("items"),
        (pl.col(scores) if scores else pl.lit(None)).cast(pl.List(pl.Float32)).alias("scores"),
        (pl.lit(user == "user_id") & pl.lit(items == "item_ids")).alias("our_names"),
    )


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
        if "candidates" in row or "items" in row:  # numbers and strings may be mixed in a line; compare them as text
            key = "candidates" if "candidates" in row else "items"
            row[key] = [str(item) for item in row[key]] if isinstance(row[key], list) else row[key]
        yield row


def _trec(lines: Iterable[str], path: Path) -> pl.DataFrame:
    rows = []
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if not parts:
            continue
        try:
            rows.append((parts[0], parts[2], int(parts[3]), float(parts[4])))
        except (IndexError, ValueError):
            raise UserError(
                f"{path}, line {number}: not a TREC run line", "Expected: user Q0 item rank score tag."
            ) from None
    table = pl.DataFrame(rows, schema=["user", "item", "rank", "score"], orient="row")
    return (
        table.sort("score", "rank", descending=[True, False], maintain_order=True)
        .group_by("user", maintain_order=True)
        .agg(items=pl.col("item"), scores=pl.col("score").cast(pl.Float32))
        .with_columns(our_names=pl.lit(False))
    )


def _text_rows(lines: Iterable[str], path: Path, split: str) -> Iterator[dict[str, Any]]:
    rows: list[tuple[str, list[str]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        user, tab, rest = line.strip("\r\n").partition("\t")
        if not tab or not user.strip():
            raise UserError(f"{path}, line {number}: no tab between user and items", f"Formats: {_FORMATS}.")
        rows.append((user.strip(), rest.replace(",", " ").split()))
    if all(len(items) <= 1 for _, items in rows):
        joined: dict[str, list[str]] = {}
        for user, items in rows:
            joined.setdefault(user, []).extend(items)
        rows = list(joined.items())
    for user, items in rows:
        yield {"split": split, "user": user, "items": items, "scores": None, "our_names": False}


def _map_ids(raw: pl.DataFrame, dataset: Dataset, ours: bool | None, path: Path) -> Imported:
    raw = raw.with_row_index("row")
    split_ok = pl.col("split").is_in(["val", "test"])
    rejected = [
        _reject(user, "UnknownSplit", f"split {split!r} is neither val nor test")
        for user, split in raw.filter(~split_ok.fill_null(False)).select("user", "split").iter_rows()
    ]
    raw = raw.filter(split_ok).with_columns(pl.col("scores").cast(pl.List(pl.Float32)))
    raw = raw.with_columns(
        scores=pl.when(pl.col("scores").list.len() == pl.col("items").list.len())
        .then("scores")
        # Without scores the order alone counts: falling numbers keep it for whoever sorts by score.
        .otherwise(pl.int_ranges(0, -pl.col("items").list.len().cast(pl.Int64), -1).cast(pl.List(pl.Float32)))
    )
    integer_items = isinstance(inner := raw.schema["items"], pl.List) and inner.inner.is_integer()
    if ours is None:
        ours = bool(raw["our_names"].all()) and raw.schema["user"].is_integer() and integer_items
        if not ours:
            ours = not _known(raw["user"], dataset.sequences()["source_user"]) and _numbers(
                raw["user"], dataset.n_users
            )
    users = _ids(dataset.sequences(), "user_id", "source_user", ours)
    items = _ids(dataset.items(), "item_id", "source_id", ours)
    matched = raw.with_columns(pl.col("user").cast(pl.String)).join(
        users, left_on="user", right_on="key", how="left", maintain_order="left"
    )
    unknown = matched.filter(pl.col("user_id").is_null())
    rejected += [_reject(user, "UnknownUser", "not a user of the dataset") for user in unknown["user"].unique().sort()]
    matched = matched.filter(pl.col("user_id").is_not_null())
    first = pl.struct("split", "user_id").is_first_distinct()
    rejected += [_reject(user, "DuplicateUser", "another list came first") for user in matched.filter(~first)["user"]]
    matched = matched.filter(first)
    pairs = (
        matched.select("row", "items", "scores")
        .filter(pl.col("items").list.len() > 0)
        .explode("items", "scores")
        .with_columns(pl.col("items").cast(pl.String))
        .join(items, left_on="items", right_on="key", how="left", maintain_order="left")
    )
    strangers = pairs.filter(pl.col("item_id").is_null()).group_by("items").len().sort("items")
    rejected += [
        _reject(item, "UnknownItem", f"not an item of the dataset; left out of {count} lists")
        for item, count in strangers.iter_rows()
    ]
    lists = (
        pairs.filter(pl.col("item_id").is_not_null())
        .group_by("row", maintain_order=True)
        .agg(item_ids=pl.col("item_id"), scores=pl.col("scores"))
    )
    table = matched.drop("scores").join(lists, on="row", how="inner").sort("split", "user_id")
    if table.is_empty():
        shown = ", ".join(repr(value) for value in raw["user"].head(3).cast(pl.String).to_list())
        raise UserError(
            f"{path}: no list could be matched to {dataset.path} (its first users are {shown})",
            "Say whose ids they are: ids=source (those of the raw data) or ids=vlrank (user_id, item_id).",
        )
    return Imported(table.select("split", "user_id", "item_ids", "scores"), rejected)


def _ids(table: pl.DataFrame, ours: str, source: str, by_ours: bool) -> pl.DataFrame:
    key = pl.col(ours).cast(pl.String) if by_ours else pl.col(source)
    return table.select(key=key, **{ours: pl.col(ours)})


def _known(users: pl.Series, source: pl.Series) -> bool:
    return bool(users.cast(pl.String).is_in(source.implode()).any())


def _numbers(users: pl.Series, largest: int) -> bool:
    numbers = users.cast(pl.String).cast(pl.Int64, strict=False)
    return bool(numbers.is_between(1, largest).fill_null(False).all())


def _reject(key: Any, error_type: str, message: str) -> dict[str, str]:
    return {"key": str(key), "error_type": error_type, "message": message}

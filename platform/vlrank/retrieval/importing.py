"""Candidate lists of other programs: Parquet, JSONL, TREC runs and plain text, with their ids mapped to ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from vlrank.config import Split
from vlrank.data.dataset import Dataset
from vlrank.data.rawfiles import excerpt
from vlrank.errors import UserError
from vlrank.retrieval.list_files import FORMATS, read_lists, without_fraction

Ids = Literal["auto", "source", "vlrank"]


@dataclass(frozen=True, slots=True)
class Imported:
    """Lists as they were read, with our ids.

    Attributes:
        table: ``split``, ``user_id`` int32, ``item_ids`` list<int32>, ``scores`` list<float32>.
        rejected: What could not be used, as quarantine rows (``key``, ``error_type``, ``message``).
        notes: How the file was understood, label -> text.
    """

    table: pl.DataFrame
    rejected: list[dict[str, str]]
    notes: dict[str, str]


def read_candidates(path: Path, dataset: Dataset, *, split: Split = "test", ids: Ids = "auto") -> Imported:
    """Read a candidates file.

    `vlrank.retrieval.list_files` says which formats there are and how they are told apart.

    Of several lists of one user the first counts.

    Args:
        path: The file.
        dataset: Gives the ids.
        split: The split of files that do not say it.
        ids: Whose ids the file holds. ``auto``: integers in columns user_id and item_ids are ours; everything else is
            the source's, unless none of its users is known and all are numbers within our range.

    Raises:
        UserError: unreadable, unknown columns, most lists name a user again, or not one row could be matched.
    """
    if not path.is_file():
        raise UserError(f"candidates file {path} does not exist", f"Formats: {FORMATS}.")
    raw = read_lists(path, split)
    if raw.table.is_empty():
        raise UserError(f"candidates file {path} holds no lists", f"Formats: {FORMATS}.")
    ours = {"auto": None, "source": False, "vlrank": True}[ids]
    table, rejected = _map_ids(raw.table, dataset, ours, path)
    again = sum(row["error_type"] == "DuplicateUser" for row in rejected)
    if again > len(raw.table) / 2:
        raise UserError(
            f"{path} was read as {raw.layout}, and {again:,} of its {len(raw.table):,} lists name a user again",
            f"Nothing was imported. Formats: {FORMATS}.",
        )
    return Imported(table, rejected, {"read as": raw.layout} | raw.notes)


def _map_ids(
    raw: pl.DataFrame, dataset: Dataset, ours: bool | None, path: Path
) -> tuple[pl.DataFrame, list[dict[str, str]]]:
    """Lists with the dataset's ids, and what was left out of them."""
    named, unknown_splits = _with_splits(raw)
    named = _with_scores(named)
    if ours is None:
        ours = _are_ours(named, dataset)
    matched, unknown_users = _with_users(named, _ids(dataset.sequences(), "user_id", "source_user", ours))
    lists, unknown_items = _with_items(matched, _ids(dataset.items(), "item_id", "source_id", ours))
    rejected = [*unknown_splits, *unknown_users, *unknown_items]
    table = matched.drop("scores").join(lists, on="row", how="inner").sort("split", "user_id")
    if table.is_empty():
        if named.is_empty():
            raise UserError(f"{path}: {rejected[0]['message']}", "Call the splits val and test.")
        side = "items" if len(matched) else "users"
        first_ones = (matched["items"].explode() if len(matched) else named["user"]).head(3).to_list()
        shown = excerpt(", ".join(repr(value) for value in first_ones))
        raise UserError(
            f"{path}: no list could be matched to {dataset.path}, none of its {side} is known (the first are {shown})",
            "Say whose ids they are: ids=source (those of the raw data) or ids=vlrank (user_id, item_id).",
        )
    return table.select("split", "user_id", "item_ids", "scores"), rejected


def _with_splits(raw: pl.DataFrame) -> tuple[pl.DataFrame, list[dict[str, str]]]:
    """Rows of val and test, numbered, and the others."""
    raw = raw.with_row_index("row").with_columns(
        pl.col("split").str.to_lowercase().replace({"valid": "val", "validation": "val", "dev": "val"})
    )
    known = pl.col("split").is_in(["val", "test"])
    rejected = [
        _reject(user, "UnknownSplit", f"split {split!r} is neither val nor test")
        for user, split in raw.filter(~known.fill_null(False)).select("user", "split").iter_rows()
    ]
    return raw.filter(known), rejected


def _with_scores(lists: pl.DataFrame) -> pl.DataFrame:
    lists = lists.with_columns(pl.col("scores").cast(pl.List(pl.Float32)))
    return lists.with_columns(
        scores=pl.when(pl.col("scores").list.len() == pl.col("items").list.len())
        .then("scores")
        # Without scores the order alone counts: falling scores keep it when sorted by score.
        .otherwise(pl.int_ranges(0, -pl.col("items").list.len().cast(pl.Int64), -1).cast(pl.List(pl.Float32)))
    )


def _are_ours(lists: pl.DataFrame, dataset: Dataset) -> bool:
    """Whether the ids are the dataset's own numbers, not those of the raw data."""
    integer_items = isinstance(inner := lists.schema["items"], pl.List) and inner.inner.is_integer()
    if bool(lists["our_names"].all()) and lists.schema["user"].is_integer() and integer_items:
        return True
    unknown = not _known(lists["user"], dataset.sequences()["source_user"])
    return unknown and _numbers(lists["user"], dataset.n_users)


def _with_users(lists: pl.DataFrame, users: pl.DataFrame) -> tuple[pl.DataFrame, list[dict[str, str]]]:
    """The first list of every known user and split, and the others."""
    matched = lists.with_columns(pl.col("user").cast(pl.String)).join(
        users, left_on="user", right_on="key", how="left", maintain_order="left"
    )
    unknown = matched.filter(pl.col("user_id").is_null())["user"].unique().sort()
    rejected = [_reject(user, "UnknownUser", "not a user of the dataset") for user in unknown]
    matched = matched.filter(pl.col("user_id").is_not_null())
    first = pl.struct("split", "user_id").is_first_distinct()
    rejected += [_reject(user, "DuplicateUser", "another list came first") for user in matched.filter(~first)["user"]]
    return matched.filter(first), rejected


def _with_items(lists: pl.DataFrame, items: pl.DataFrame) -> tuple[pl.DataFrame, list[dict[str, str]]]:
    """``row``, ``item_ids`` and ``scores`` of the known items, and the unknown ones."""
    pairs = (
        lists.select("row", "items", "scores")
        .filter(pl.col("items").list.len() > 0)
        .explode("items", "scores")
        .with_columns(pl.col("items").cast(pl.String))
        .join(items, left_on="items", right_on="key", how="left", maintain_order="left")
    )
    strangers = pairs.filter(pl.col("item_id").is_null()).group_by("items").len().sort("items")
    rejected = [
        _reject(item, "UnknownItem", f"not an item of the dataset; left out of {count} lists")
        for item, count in strangers.iter_rows()
    ]
    known = pairs.filter(pl.col("item_id").is_not_null()).group_by("row", maintain_order=True)
    return known.agg(item_ids=pl.col("item_id"), scores=pl.col("scores")), rejected


def _ids(table: pl.DataFrame, ours: str, source: str, by_ours: bool) -> pl.DataFrame:
    key = pl.col(ours).cast(pl.String) if by_ours else without_fraction(pl.col(source))
    return table.select(key=key, **{ours: pl.col(ours)}).unique("key", keep="first")


def _known(users: pl.Series, source: pl.Series) -> bool:
    known = source.to_frame().select(without_fraction(pl.first())).to_series()
    return bool(users.cast(pl.String).is_in(known.implode()).any())


def _numbers(users: pl.Series, largest: int) -> bool:
    numbers = users.cast(pl.String).cast(pl.Int64, strict=False)
    return bool(numbers.is_between(1, largest).fill_null(False).all())


def _reject(key: Any, error_type: str, message: str) -> dict[str, str]:
    return {"key": str(key), "error_type": error_type, "message": message}

"""Files of other programs: LlamaRec's pickles in, TREC runs, JSONL and long tables out, long frames both ways."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from vlrank.data import schemas
from vlrank.data.tables import atomic_write_text, write_parquet_atomic
from vlrank.errors import UserError
from vlrank.storage import Location

if TYPE_CHECKING:
    from vlrank.data.dataset import Dataset

# What a pickle of arrays and numbers needs, under the names of NumPy 1 and 2 and of torch's tensors.
_ALLOWED = {
    (module, name)
    for core in ("numpy.core.multiarray", "numpy._core.multiarray")
    for module, name in ((core, "_reconstruct"), (core, "scalar"))
} | {
    ("_codecs", "encode"),  # bytes in old protocols
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}

_FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".tsv": "tsv",
    ".csv": "csv",
    ".trec": "trec",
    ".run": "trec",
    ".txt": "trec",
}


class _ArraysOnly(pickle.Unpickler):
    """Plain Python values and NumPy arrays; anything else could run code while it is read."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of the file")


def read_pickle(path: Path) -> Any:
    """A pickle that holds nothing but dictionaries, lists, numbers, strings and numeric NumPy arrays.

    Raises:
        UserError: missing, cut off, or it holds anything else.
    """
    try:
        loaded = _ArraysOnly(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # damaged pickles raise almost anything
        raise UserError(
            f"{path} is refused: {error}",
            "Only arrays and numbers are read from pickles. Save it as Parquet, JSONL or a TREC run instead.",
        ) from None
    return loaded


def read_llamarec(path: Path, *, top_k: int = 50) -> list[tuple[str, int, list[int], list[float]]]:
    """LlamaRec's ``retrieved.pkl``: per split and user its best items.

    The file holds ``val_probs`` and ``test_probs`` ([users, items + 1], item 0 is padding) beside the targets
    ``val_labels`` and ``test_labels``, users in ascending order (Yue et al. 2023, ``trainer/lru.py``).

    Returns:
        (split, user id from 1, item ids best first, their scores); equal scores by item id.

    Raises:
        UserError: not such a file.
    """
    loaded = read_pickle(path)
    if not isinstance(loaded, dict) or not {"val_probs", "test_probs"} & set(loaded):
        raise UserError(f"{path} is not LlamaRec's retrieved.pkl: it has neither val_probs nor test_probs")
    rows: list[tuple[str, int, list[int], list[float]]] = []
    for split in ("val", "test"):
        if f"{split}_probs" not in loaded:
            continue
        try:
            probs = np.asarray(loaded[f"{split}_probs"], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {split}_probs is not a table of numbers: {error}") from None
        if probs.ndim != 2 or probs.shape[1] < 2:
            raise UserError(f"{path}: {split}_probs has shape {probs.shape}, expected [users, items + 1]")
        for user, scores in enumerate(probs, start=1):
            best = np.argsort(-scores[1:], kind="stable")[:top_k] + 1
            rows.append((split, user, best.tolist(), scores[best].tolist()))
    return rows


def check_output(path: Location, dataset: Dataset) -> None:
    """Whether rankings of this dataset can be written to such a file, before anything is ranked.

    Raises:
        UserError: an unknown ending, or a TREC run although an id of the source holds a blank.
    """
    if _format_of(path) != "trec":
        return
    for names in (dataset.sequences()["source_user"], dataset.items()["source_id"]):
        blank = names.filter(names.str.contains(r"\s"))
        if not blank.is_empty():
            raise UserError(
                f"{path}: a TREC run cannot hold ids with blanks, such as {blank[0]!r}", "Use .tsv, .csv or .jsonl."
            )


def _format_of(path: Location, format: str | None = None) -> str:
    chosen = format or _FORMATS.get(path.suffix.lower(), "")
    if chosen not in _FORMATS.values():
        raise UserError(
            f"rankings cannot be written as {format or path.suffix!r}", "Use .parquet, .jsonl, .tsv, .csv or .trec."
        )
    return chosen


def write_rankings(
    table: pl.DataFrame, path: Location, format: str | None = None, dataset: Dataset | None = None
) -> None:
    """Write rankings, whole or not at all.

    Args:
        table: `schemas.RANKINGS`.
        path: ``.parquet``, ``.jsonl``, ``.tsv`` or ``.csv`` with one item a line (`long_table`), or ``.trec``,
            ``.run``, ``.txt`` for a TREC run.
        format: ``parquet``, ``jsonl``, ``tsv``, ``csv`` or ``trec``; default by the path's suffix.
        dataset: Where given, all but Parquet show the source's ids instead of ours.

    Raises:
        UserError: an unknown format.
    """
    chosen = _format_of(path, format)
    if chosen == "parquet":
        write_parquet_atomic(table, path, schemas.RANKINGS)
        return
    if chosen in ("tsv", "csv"):
        separator = "\t" if chosen == "tsv" else ","
        atomic_write_text(path, long_table(table, dataset).write_csv(separator=separator))
        return
    users, items = _source_ids(dataset)
    lines = []
    for row in table.iter_rows(named=True):
        user: Any = users.get(row["user_id"], row["user_id"])
        listed: list[Any] = [items.get(item, item) for item in row["item_ids"]]
        if chosen == "jsonl":
            record = {
                "split": row["split"],
                "user": user,
                "items": listed,
                "scores": row["scores"],
                "source": row["source"],
            }
            lines.append(json.dumps(record))
            continue
        tag = row["source"].replace(" ", "_")
        ranked = zip(listed, row["scores"], strict=True)
        lines += [f"{user} Q0 {item} {rank} {score:.9g} {tag}" for rank, (item, score) in enumerate(ranked, start=1)]
    atomic_write_text(path, "".join(f"{line}\n" for line in lines))


def _source_ids(dataset: Dataset | None) -> tuple[Mapping[int, str], Mapping[int, str]]:
    """(user_id -> the source's id, item_id -> the source's id); empty without a dataset."""
    if dataset is None:
        return {}, {}
    users = dict(dataset.sequences().select("user_id", "source_user").iter_rows())
    return users, dict(dataset.items().select("item_id", "source_id").iter_rows())


def long_table(table: pl.DataFrame, dataset: Dataset | None = None) -> pl.DataFrame:
    """Candidates or rankings with one item a row, as RecTools, WarpRec and Elliot have them.

    Args:
        table: ``user_id``, ``item_ids``, ``scores``.
        dataset: Where given, the ids are the source's instead of ours.

    Returns:
        ``user_id``, ``item_id``, ``score`` (float32), ``rank`` (from 1); users in their order, each best first.
    """
    long = (
        table.filter(pl.col("item_ids").list.len() > 0)
        .select("user_id", "item_ids", "scores", rank=pl.int_ranges(1, pl.col("item_ids").list.len() + 1))
        .explode("item_ids", "scores", "rank")
        .select("user_id", item_id="item_ids", score="scores", rank="rank")
    )
    users, items = _source_ids(dataset)
    if dataset is None:
        return long
    return long.with_columns(
        pl.col("user_id").replace_strict(users, return_dtype=pl.String),
        pl.col("item_id").replace_strict(items, return_dtype=pl.String),
    )


def long_to_lists(frame: Any) -> dict[int, list[int]]:
    """A long frame (``user_id``, ``item_id``, and ``rank`` or ``score``) as lists, best first.

    Args:
        frame: polars, or pandas as RecTools has it.

    Raises:
        UserError: a missing column, or an item named twice for one user.
    """
    table = frame if isinstance(frame, pl.DataFrame) else pl.DataFrame({name: frame[name].to_numpy() for name in frame})
    order = next((name for name in ("rank", "score") if name in table.columns), None)
    missing = {"user_id", "item_id"} - set(table.columns)
    if missing or order is None:
        raise UserError(
            f"the frame has columns {', '.join(table.columns)}", "It needs user_id, item_id, and rank or score."
        )
    twice = table.filter(table.select("user_id", "item_id").is_duplicated())
    if not twice.is_empty():
        raise UserError(f"item {twice['item_id'][0]} appears more than once for user {twice['user_id'][0]}")
    users = table["user_id"].unique(maintain_order=True)
    ordered = table.sort(order, descending=order == "score", maintain_order=True)
    lists: dict[int, list[int]] = {user: [] for user in users}
    for user, item in ordered.select("user_id", "item_id").iter_rows():
        lists[user].append(item)
    return lists


def lists_to_long(lists: Mapping[int, Sequence[tuple[int, float]]]) -> pl.DataFrame:
    """Rankings ``{user: [(item, score), ...]}``, best first, as user_id, item_id, rank from 1, score."""
    rows = [
        (user, item, rank, score)
        for user, ranked in lists.items()
        for rank, (item, score) in enumerate(ranked, start=1)
    ]
    return pl.DataFrame(
        rows,
        schema={"user_id": pl.Int64, "item_id": pl.Int64, "rank": pl.Int64, "score": pl.Float32},
        orient="row",
    )

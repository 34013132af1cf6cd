"""The split of each user's sequence into training part, validation target and test target.

``leave_one_out``: train is ``[:-2]``, the validation target ``[-2]``, the test target ``[-1]`` (as in SASRec, Kang and
McAuley 2018). ``temporal``: two points in time divide all users; a target is the user's first interaction of the
validation or test period, and the history is everything before it, so no prompt sees what happened later anywhere
(Meng et al. 2020, "global temporal").

The manifest records the split: ``{"method": "leave_one_out"}`` or ``{"method": "temporal", "val_from", "test_from"}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from vlrank.config import Split
from vlrank.errors import UserError


def training_part(sequences: pl.DataFrame, split: Mapping[str, Any]) -> pl.DataFrame:
    """Columns ``user_id`` and ``items``: what each user's models may train on, oldest first; users without it left out.

    Args:
        sequences: The sequences table (`schemas.SEQUENCES`).
        split: From the manifest.
    """
    table = _with_lengths(sequences, split)
    length = pl.col("n") - 2 if _is_leave_one_out(split) else pl.col("n_train")
    return table.filter(length > 0).select("user_id", items=pl.col("item_ids").list.head(length))


def with_targets(sequences: pl.DataFrame, split: Mapping[str, Any], part: Split) -> pl.DataFrame:
    """The sequences that have a history and a target in ``part``, with the target's 0-based ``position``."""
    if part not in ("val", "test"):
        raise ValueError(f"split must be 'val' or 'test', got {part!r}")
    table = _with_lengths(sequences, split)
    if _is_leave_one_out(split):
        position = pl.col("n") - (2 if part == "val" else 1)
        present = position > 0
    else:
        position = pl.col("n_train") if part == "val" else pl.col("n_before_test")
        end = pl.col("n_before_test") if part == "val" else pl.col("n")
        present = (position > 0) & (position < end)
    return table.with_columns(position=position).filter(present)


def _is_leave_one_out(split: Mapping[str, Any]) -> bool:
    return bool(split["method"] == "leave_one_out")


def _with_lengths(sequences: pl.DataFrame, split: Mapping[str, Any]) -> pl.DataFrame:
    """Sequences with ``n`` and, under a temporal split, the number of interactions before each cut (int64)."""
    table = sequences.with_columns(n=pl.col("item_ids").list.len().cast(pl.Int64))
    if _is_leave_one_out(split):
        return table
    before = {"n_train": int(split["val_from"]), "n_before_test": int(split["test_from"])}
    times = pl.col("timestamps")
    return table.with_columns(
        [times.list.eval(pl.element() < cut).list.sum().cast(pl.Int64).alias(name) for name, cut in before.items()]
    )


def temporal_cuts(
    timestamps: np.ndarray, val_fraction: float, test_fraction: float, cuts: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(val_from, test_from) in the unit of ``timestamps``; training is what happened before val_from.

    A cut is the time of the interaction at that share of all interactions, and all interactions of that moment fall
    behind it. So no training interaction is later than, or as late as, the first validation or test interaction.

    Raises:
        UserError: a period would be empty.
    """
    times = np.sort(timestamps)
    n = len(times)
    if cuts is None:
        first_test = n - max(1, round(n * test_fraction))
        first_val = max(0, first_test - max(1, round(n * val_fraction)))
        val_from, test_from = int(times[first_val]), int(times[max(0, first_test)])
    else:
        val_from, test_from = cuts
    before_val, before_test = np.searchsorted(times, [val_from, test_from])
    parts = {"training": before_val, "validation": before_test - before_val, "test": n - before_test}
    empty = [name for name, size in parts.items() if size == 0]
    if empty:
        raise UserError(
            f"the temporal split at {val_from} and {test_from} leaves no interactions for {', '.join(empty)}"
            f" (times run from {int(times[0])} to {int(times[-1])})",
            "Give val_from and test_from, or other shares with val_fraction and test_fraction.",
        )
    return val_from, test_from

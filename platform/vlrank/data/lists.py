"""Ragged lists of items, one per user, as flat arrays: what metrics, baselines and checks work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lists:
    """One list of items per user, best first.

    Attributes:
        users: int64 [U], distinct.
        offsets: int64 [U + 1]; user u's items are ``items[offsets[u]:offsets[u + 1]]``.
        items: integer [N].
        scores: float [N] aligned with ``items``, or None.
    """

    users: Ints
    offsets: Ints
    items: NDArray[np.integer[Any]]
    scores: NDArray[np.floating[Any]] | None = None

    @classmethod
    def from_frame(cls, table: pl.DataFrame) -> Lists:
        """From a candidates or rankings table (``user_id``, ``item_ids`` and, where present, ``scores``)."""
        offsets, items = _flatten(table["item_ids"])
        scores = None
        if "scores" in table.columns:
            score_offsets, scores = _flatten(table["scores"])
            if not np.array_equal(offsets, score_offsets):
                scores = None  # lists without scores (or not one per item) have an order but no strengths
        return cls(table["user_id"].cast(pl.Int64).to_numpy(), offsets, items, scores)

    @classmethod
    def from_dict(cls, lists: Mapping[int, Sequence[int]]) -> Lists:
        """From ``{user: [item, ...]}``."""
        lengths = np.fromiter((len(items) for items in lists.values()), np.int64, len(lists))
        items = np.fromiter(chain.from_iterable(lists.values()), np.int64, int(lengths.sum()))
        return cls(np.fromiter(lists, np.int64, len(lists)), offsets_of(lengths), items)

    def to_frame(self, **constants: str) -> pl.DataFrame:
        """A table of ``user_id``, ``item_ids``, ``scores`` (zeros without scores) and the given constant columns."""
        scores = np.zeros(len(self.items), np.float32) if self.scores is None else self.scores.astype(np.float32)
        index = pl.DataFrame({"row": self.segments(), "item_ids": self.items.astype(np.int32), "scores": scores})
        grouped = index.group_by("row", maintain_order=True).agg("item_ids", "scores")
        rows = pl.DataFrame({"row": np.arange(len(self.users)), "user_id": self.users.astype(np.int32)})
        table = rows.join(grouped, on="row", how="left", maintain_order="left").drop("row")
        empty_items = pl.lit([], dtype=pl.List(pl.Int32))
        empty_scores = pl.lit([], dtype=pl.List(pl.Float32))
        return table.with_columns(
            pl.col("item_ids").fill_null(empty_items),
            pl.col("scores").fill_null(empty_scores),
            *(pl.lit(value).alias(name) for name, value in constants.items()),
        )

    @property
    def lengths(self) -> Ints:
        """int64 [U]: items per user."""
        return np.diff(self.offsets)

    def segments(self) -> Ints:
        """int64 [N]: which row of ``users`` an item belongs to."""
        return np.repeat(np.arange(len(self.users)), self.lengths)

    def positions(self) -> Ints:
        """int64 [N]: 0-based place of an item in its list."""
        return np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)

    def standardised(self) -> tuple[Floats, Floats]:
        """Scores with mean 0 and variance 1 within each list, and each list's standard deviation.

        A score that is no finite number is NaN and counts in neither. A list whose scores differ by less than float32
        can tell has zeros and a deviation of 0.

        Returns:
            float64 [N] and float64 [U].
        """
        scores = np.zeros(len(self.items)) if self.scores is None else np.asarray(self.scores, dtype=np.float64)
        finite, rows, users = np.isfinite(scores), self.segments(), len(self.users)
        counts = np.maximum(1, np.bincount(rows, finite, minlength=users))
        values = np.where(finite, scores, 0)
        centred = scores - (np.bincount(rows, values, minlength=users) / counts)[rows]
        spreads = np.sqrt(np.bincount(rows, np.where(finite, centred, 0) ** 2, minlength=users) / counts)
        largest = np.zeros(users)
        np.maximum.at(largest, rows, np.abs(values))
        flat = is_flat(spreads, largest)
        spreads[flat] = 0
        scaled = np.where(flat[rows], 0, centred / np.where(flat, 1, spreads)[rows])
        return np.where(finite, scaled, np.nan), spreads

    def take(self, rows: Ints) -> Lists:
        """The lists of these rows, in this order."""
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return Lists(self.users[rows], offsets, self.items[index], None if self.scores is None else self.scores[index])

    def keep(self, mask: NDArray[np.bool_]) -> Lists:
        """The items where ``mask`` (bool [N]) holds; users stay, possibly with empty lists."""
        counts = np.bincount(self.segments()[mask], minlength=len(self.users))
        return Lists(
            self.users, offsets_of(counts), self.items[mask], None if self.scores is None else self.scores[mask]
        )

    def head(self, k: int) -> Lists:
        """The first ``k`` items of each list."""
        return self if not len(self.users) or self.lengths.max() <= k else self.keep(self.positions() < k)

    def for_users(self, users: Ints) -> Lists:
        """The lists of these users, in this order; a user without a list gets an empty one."""
        order = np.argsort(self.users, kind="stable")
        where = np.searchsorted(self.users[order], users)
        where[where == len(self.users)] = 0
        found = self.users[order][where] == users if len(self.users) else np.zeros(len(users), bool)
        padded = Lists(np.append(self.users, -1), np.append(self.offsets, self.offsets[-1]), self.items, self.scores)
        rows = np.where(found, order[where] if len(self.users) else 0, len(self.users))
        taken = padded.take(rows)
        return Lists(users, taken.offsets, taken.items, taken.scores)

    def sorted_by(self, scores: NDArray[np.floating[Any]]) -> Lists:
        """Each list sorted by falling score; ties keep the present order, NaN goes last.

        Stability is what makes a constant scorer reproduce the retriever: no tie ever favours the target.
        """
        lengths = self.lengths
        if len(lengths) and (lengths == lengths[0]).all():
            block = np.argsort(-scores.reshape(len(lengths), -1), axis=1, kind="stable")
            order = (block + self.offsets[:-1, None]).ravel()
        else:
            order = np.lexsort((-scores, self.segments()))
        return Lists(self.users, self.offsets, self.items[order], scores[order])

    def rank_of(self, targets: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """int32 [U]: 1-based rank of each user's target (int [U]), 0 if not listed; of duplicates the first counts."""
        found = np.flatnonzero(self.items == np.repeat(targets.astype(self.items.dtype), self.lengths))
        rows = np.searchsorted(self.offsets, found, side="right") - 1
        ranks = np.zeros(len(self.users), np.int32)
        # Written back to front, so that of several places the first one stays.
        ranks[rows[::-1]] = (found - self.offsets[rows] + 1)[::-1]
        return ranks

    def same_scores(self, tolerance: float = 1e-3) -> bool:
        """Whether all users have the same scores down their lists, up to a constant: they say nothing about the items.

        Lists of equal length are compared, and at least five lists have to be: fewer may be alike by chance.
        """
        if self.scores is None:
            return False
        compared = 0
        for length in np.unique(self.lengths[self.lengths > 1]):
            block = self.take(np.flatnonzero(self.lengths == length))
            scores = np.asarray(block.scores, np.float64).reshape(-1, length)
            if not (np.ptp(scores - scores[:, :1], axis=0) <= tolerance).all():
                return False
            compared += len(scores) if len(scores) > 1 else 0
        return compared >= 5

    def duplicates(self) -> NDArray[np.bool_]:
        """bool [N]: whether the same item already stands earlier in the list."""
        if not len(self.items):
            return np.zeros(0, bool)
        segments = self.segments()
        order = np.lexsort((self.items, segments))
        same = (self.items[order][1:] == self.items[order][:-1]) & (segments[order][1:] == segments[order][:-1])
        mask = np.zeros(len(self.items), bool)
        mask[order[1:][same]] = True
        return mask

    def contains(self, users: Ints, items: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """bool [len(users)]: whether ``items[i]`` is in the list of ``users[i]``."""
        if not len(users) or not len(self.items):
            return np.zeros(len(users), bool)
        base = int(max(self.items.max(), items.max())) + 1
        own = np.sort(np.repeat(self.users, self.lengths) * base + self.items)
        asked = users.astype(np.int64) * base + items
        where = np.minimum(np.searchsorted(own, asked), len(own) - 1)
        return own[where] == asked


def rank_by_score(scores: NDArray[np.floating[Any]], target: int) -> int:
    """Rank of the target (0-based position) among ``scores`` (float [N]), from 1; of equal scores the earlier is first.

    Scores that are no numbers rank it last: comparing with them would put it first.
    """
    if np.isnan(scores).any():
        return len(scores)
    own = scores[target]
    return int(1 + (scores > own).sum() + (scores[:target] == own).sum())


def is_flat(spreads: Any, largest: Any) -> Any:
    """Whether deviations of scores up to ``largest`` in size are rounding, below the resolution of float32."""
    return np.logical_not(spreads > 1e-6 * np.maximum(1.0, largest))


def mean_spread(spreads: Floats) -> float:
    """Mean of those deviations (`Lists.standardised`) that are not 0; 1 where all are."""
    return float(spreads[spreads > 0].mean()) if (spreads > 0).any() else 1.0


def offsets_of(lengths: NDArray[np.integer[Any]]) -> Ints:
    """``[2, 0, 3]`` -> ``[0, 2, 2, 5]``."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _flatten(column: pl.Series) -> tuple[Ints, NDArray[Any]]:
    # Through Arrow: polars' explode would turn an empty list into one null. A missing list counts as empty.
    array = column.to_arrow()
    lengths = column.list.len().fill_null(0).to_numpy()
    return offsets_of(lengths), array.flatten().to_numpy(zero_copy_only=False)

"""Several retrievers' lists as one: a weighted sum of standardised scores, with weights chosen on validation users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vlrank.config import Split
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Floats, Ints, Lists, offsets_of
from vlrank.errors import UserError

PREFIX = "ensemble:"
_K = 10
_STEPS = {2: 20, 3: 10, 4: 10}
"""Number of tables -> weights are multiples of one over this."""


def members(method: str, dataset: Dataset, name: str) -> list[str]:
    """The tables of ``ensemble:A,B``.

    Raises:
        UserError: fewer than two or more than four, one twice, one that does not exist or lacks a split, or one that
            the ensemble would replace.
    """
    names = [part.strip() for part in method.removeprefix(PREFIX).split(",") if part.strip()]
    existing = f"Candidates of {dataset.path}: {', '.join(dataset.candidate_names()) or 'none'}."
    if len(names) not in _STEPS or len(set(names)) < len(names):
        raise UserError(f"{method!r} is no ensemble: it takes two to four different tables", existing)
    if unknown := [one for one in names if one not in dataset.candidate_names()]:
        raise UserError(f"{method}: there are no candidates {', '.join(unknown)}", existing)
    if name in names:
        raise UserError(f"the ensemble {name!r} would replace one of its own tables", "Choose another --name.")
    for one in names:
        if missing := {"val", "test"} - set(dataset.candidates(one)["split"]):
            raise UserError(
                f"candidates {one!r} have no lists of the split {' or '.join(sorted(missing))}",
                "Weights are chosen on validation users: make the lists of both splits.",
            )
    return names


def retrieve(dataset: Dataset, names: Sequence[str], top_k: int) -> tuple[dict[Split, Lists], dict[str, object]]:
    """Mix tables of candidates.

    Args:
        dataset: Holds them.
        names: Two to four tables that have lists of both splits, see `members`.
        top_k: List length.

    Returns:
        The lists of each split with the mixed scores, and facts for the summary.
    """
    tables = [dataset.candidates(name) for name in names]
    targets = {user: target for user, (_, target) in dataset.histories("val").items()}
    val = Union.of(tables, "val")
    weights, gain = best_weights(val, targets)
    shares = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, weights, strict=True))
    alone = ", ".join(
        f"{name} {val.ndcg(row, targets):.4f}" for name, row in zip(names, np.eye(len(names)), strict=True)
    )
    lines: dict[str, object] = {
        "weights": f"{shares}, of standardised scores, chosen on {len(targets):,} validation users",
        "validation NDCG@10": f"{gain:.4f}, on the same users; alone: {alone}",
    }
    return {"val": val.mixed(weights).head(top_k), "test": Union.of(tables, "test").mixed(weights).head(top_k)}, lines


def best_weights(union: Union, targets: dict[int, int]) -> tuple[Floats, float]:
    """The weights with the highest mean NDCG@10, and that NDCG; of equal ones the most even.

    Args:
        union: Lists of validation users.
        targets: user id -> target, of all validation users; one without a list is a miss.

    Returns:
        float64 [tables], adding up to 1, in steps of 0.05 (two tables) or 0.1.
    """
    steps = _STEPS[union.scores.shape[1]]
    grid = [np.array(parts) / steps for parts in _partitions(steps, union.scores.shape[1])]
    grid.sort(key=lambda weights: float((weights**2).sum()))
    gains = union.ndcgs(grid, targets)
    best = int(np.argmax(np.round(gains, 12)))
    return grid[best], float(gains[best])


def _partitions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``total`` as a sum of so many non-negative numbers."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _partitions(total - first, parts - 1):
            yield (first, *rest)


@dataclass(frozen=True)
class Union:
    """What any of several tables lists for each user.

    Attributes:
        lists: Users in ascending order; items by id, without scores.
        scores: float64 [N, tables]: per list of mean 0 and variance 1. An item that a list lacks has the lowest score
            of that list, and 0 where the table has no list of the user or one of equal scores.
    """

    lists: Lists
    scores: Floats

    @classmethod
    def of(cls, tables: Sequence[pl.DataFrame], split: Split) -> Union:
        """The union of tables of candidates (`schemas.CANDIDATES`)."""
        standardised = [_standardised(table.filter(pl.col("split") == split)) for table in tables]
        listed = pl.concat([table.select("user", "item") for table in standardised])
        union = listed.unique().sort("user", "item")
        columns = []
        for table in standardised:
            lowest = table.group_by("user").agg(lowest=pl.col("z").min())
            joined = union.join(table, on=["user", "item"], how="left", maintain_order="left")
            joined = joined.join(lowest, on="user", how="left", maintain_order="left")
            columns.append(joined.select(pl.coalesce("z", "lowest", pl.lit(0.0))).to_series().to_numpy())
        users, counts = np.unique(union["user"].to_numpy(), return_counts=True)
        lists = Lists(users.astype(np.int64), offsets_of(counts), union["item"].to_numpy())
        return cls(lists, np.stack(columns, axis=1))

    def mixed(self, weights: Floats) -> Lists:
        """The lists in the order of the weighted sum, with these scores; equal ones by item id."""
        return self.lists.sorted_by(self.scores @ weights)

    def ndcg(self, weights: Floats, targets: dict[int, int]) -> float:
        """Mean NDCG@10 over all ``targets`` (user id -> item id)."""
        return float(self.ndcgs([weights], targets)[0])

    def ndcgs(self, grid: Sequence[Floats], targets: dict[int, int]) -> NDArray[np.float64]:
        """`ndcg` of several weights."""
        wanted = np.array([targets.get(int(user), 0) for user in self.lists.users])
        places = np.flatnonzero(self.lists.items == np.repeat(wanted, self.lists.lengths))  # of targets that are listed
        if not len(places):
            return np.zeros(len(grid))
        rows = self.lists.segments()[places]
        spans = self.lists.take(rows).lengths
        starts = offsets_of(spans)[:-1]
        index: Ints = np.arange(spans.sum()) + np.repeat(self.lists.offsets[rows] - starts, spans)
        earlier = index < np.repeat(places, spans)
        gains = []
        for weights in grid:
            mixed = self.scores @ weights
            scores, own = mixed[index], np.repeat(mixed[places], spans)
            ranks = 1 + np.add.reduceat((scores > own) | ((scores == own) & earlier), starts)
            gains.append(np.where(ranks <= _K, 1 / np.log2(1 + ranks), 0).sum() / len(targets))
        return np.array(gains)


def _standardised(table: pl.DataFrame) -> pl.DataFrame:
    """``user``, ``item`` and ``z``; a score that is no number has none."""
    long = table.filter(pl.col("item_ids").list.len() > 0).select(user="user_id", item="item_ids", score="scores")
    score = pl.col("score").cast(pl.Float64)
    long = long.explode("item", "score").with_columns(score=pl.when(score.is_finite()).then(score))
    centred, spread = score - score.mean().over("user"), score.std(ddof=0).over("user")
    flat = spread <= 1e-6 * pl.max_horizontal(1.0, score.abs().max().over("user"))  # below the resolution of float32
    return long.select("user", "item", z=pl.when(flat).then(centred * 0).otherwise(centred / spread))

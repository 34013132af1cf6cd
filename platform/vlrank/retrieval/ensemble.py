"""Several retrievers' lists as one: a weighted sum of standardised scores, with weights chosen on validation users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vlrank.config import Split
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Floats, Ints, Lists, mean_spread, offsets_of
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
        spreads: float64 [U, tables]: the standard deviation of the user's list over the mean one of its table; 0 where
            the table has no list of the user or one of equal scores.
    """

    lists: Lists
    scores: Floats
    spreads: Floats

    @classmethod
    def of(cls, tables: Sequence[pl.DataFrame], split: Split) -> Union:
        """The union of tables of candidates (`schemas.CANDIDATES`)."""
        parts = [_standardised(table, split) for table in tables]
        union = pl.concat([items.select("user", "item") for items, _ in parts]).unique().sort("user", "item")
        users, counts = np.unique(union["user"].to_numpy(), return_counts=True)
        lists = Lists(users.astype(np.int64), offsets_of(counts), union["item"].to_numpy())
        everyone = pl.DataFrame({"user": users}, schema={"user": union.schema["user"]})
        scores, spreads = [], []
        for items, owners in parts:
            lowest = items.group_by("user").agg(lowest=pl.col("z").min())
            joined = union.join(items, on=["user", "item"], how="left", maintain_order="left")
            joined = joined.join(lowest, on="user", how="left", maintain_order="left")
            scores.append(joined.select(pl.coalesce("z", "lowest", pl.lit(0.0))).to_series().to_numpy())
            known = everyone.join(owners, on="user", how="left", maintain_order="left")
            spreads.append(known["spread"].fill_null(0.0).to_numpy())
        return cls(lists, np.stack(scores, axis=1), np.stack(spreads, axis=1))

    def mixed(self, weights: Floats) -> Lists:
        """The lists in the order of the weighted sum; equal ones by item id.

        The scores are these sums times the weighted mean of the spreads: where the tables tell a user's items apart
        clearly, so does the mix. It decides nothing within a list, but much where the mix is fused with a model.
        """
        return self.lists.sorted_by(self.scores @ weights * (self.spreads @ weights)[self.lists.segments()])

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


def _standardised(table: pl.DataFrame, split: Split) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Of one split: ``user``, ``item`` and ``z`` (null where the score is no number), and ``user`` and ``spread``."""
    table = table.filter(pl.col("item_ids").list.len() > 0)
    lists = Lists.from_frame(table)
    z, spreads = lists.standardised()
    spreads /= mean_spread(spreads)
    wanted = (table["split"] == split).to_numpy()
    rows, users = lists.segments(), table["user_id"]
    items = pl.DataFrame({"user": users.gather(rows), "item": lists.items, "z": pl.Series(z, nan_to_null=True)})
    return items.filter(wanted[rows]), pl.DataFrame({"user": users, "spread": spreads}).filter(wanted)

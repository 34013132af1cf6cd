"""Ranking metrics, per user and averaged, with bootstrap intervals.

Recall@K, HitRate@K, NDCG@K, MRR@K and MAP@K with binary relevance, as in trec_eval. With one target per user,
as in leave-one-out, every metric is a function of the target's rank; so one small table of values per rank, the ranks'
histogram and a multinomial draw give means and bootstrap intervals at a cost that does not grow with the users.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vlrank.data.lists import Floats, Ints, Lists

KS = (1, 5, 10, 20, 50)
METRICS = ("recall", "hit_rate", "ndcg", "mrr", "map")
LABELS = {"recall": "Recall", "hit_rate": "HitRate", "ndcg": "NDCG", "mrr": "MRR", "map": "MAP"}


def label(name: str) -> str:
    """``"ndcg@10"`` -> ``"NDCG@10"``."""
    metric, _, k = name.partition("@")
    return f"{LABELS[metric]}@{k}"


def metric_values(hits: NDArray[np.bool_], relevant: NDArray[np.integer[Any]], ks: Sequence[int]) -> dict[str, Floats]:
    """Per-user metrics from hits.

    Args:
        hits: bool [U, D]; whether the item at each place is relevant, best first. An item may be a hit only once.
        relevant: int [U]; relevant items of each user, listed or not, at least 1.
        ks: Cut-offs, each at least 1; beyond D the list counts as ended.

    Returns:
        ``{"recall@K": float64 [U], ...}`` in [0, 1]. Recall: hits in the first K / relevant. NDCG: sum of
        ``1 / log2(place + 1)`` over hits, divided by what min(relevant, K) hits at the top would give (Järvelin and
        Kekäläinen 2002). MRR: 1 / place of the first hit.
        MAP: sum of precisions at hits / relevant (trec_eval's map_cut).
    """
    depth = hits.shape[1]
    places = np.arange(1, depth + 1)
    discounts = 1.0 / np.log2(places + 1)
    gains = np.cumsum(hits * discounts, axis=1)
    found = np.cumsum(hits, axis=1)
    precisions = np.cumsum(hits * found / places, axis=1)
    longest = max(max(ks), int(relevant.max(initial=1)))
    ideal = np.cumsum(1.0 / np.log2(np.arange(1, longest + 1) + 1))
    first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0) if depth else np.zeros(len(hits), np.int64)
    zeros = np.zeros(len(hits))
    values = {}
    for k in ks:
        last = min(k, depth) - 1
        count = found[:, last] if depth else zeros
        values[f"recall@{k}"] = count / relevant
        values[f"hit_rate@{k}"] = (count > 0).astype(np.float64)
        values[f"ndcg@{k}"] = (gains[:, last] if depth else zeros) / ideal[np.minimum(relevant, k) - 1]
        values[f"mrr@{k}"] = np.where((first > 0) & (first <= k), 1.0 / np.maximum(first, 1), 0.0)
        values[f"map@{k}"] = (precisions[:, last] if depth else zeros) / relevant
    return values


def rank_values(ks: Sequence[int]) -> dict[str, Floats]:
    """Metrics by one target's rank: float64 [max(ks) + 2], at 0 (not listed), 1, 2, ..., beyond max(ks)."""
    depth = max(ks)
    hits = np.vstack([np.zeros((1, depth), bool), np.eye(depth, dtype=bool), np.zeros((1, depth), bool)])
    return metric_values(hits, np.ones(depth + 2, np.int64), ks)


def ranking_metrics(
    ranked_lists: Mapping[Any, Sequence[Any]] | Sequence[Sequence[Any]],
    targets: Mapping[Any, Any] | Sequence[Any],
    ks: Sequence[int] = (1, 5, 10, 20),
) -> dict[str, float]:
    """Metrics averaged over all users with a target.

    Args:
        ranked_lists: ``{user: [item, ...]}`` or one list per user, best first; ``(item, score)`` pairs, as
            `Qwen3VLReranker.rerank` returns them, are taken by their item. The order of the list counts, so a scorer
            that gives equal scores must keep its input's order (`Lists.sorted_by` does).
        targets: ``{user: item}`` or one item per user; a collection of items where several are relevant.
        ks: Cut-offs.

    Returns:
        ``{"recall@1": ..., "hit_rate@1": ..., "ndcg@1": ..., "mrr@1": ..., "map@1": ..., "recall@5": ...}``. A user
        whose target is not listed, or who has no list at all, counts as a miss.

    Raises:
        ValueError: no users, a list without a target, or sequences of different length.

    >>> ranking_metrics({7: [3, 1, 2]}, {7: 1}, ks=(1, 2))["mrr@2"]
    0.5
    """
    check_ks(ks)
    if isinstance(ranked_lists, Mapping) != isinstance(targets, Mapping):
        raise ValueError("ranked_lists and targets must both be mappings by user or both be sequences")
    if isinstance(ranked_lists, Mapping) and isinstance(targets, Mapping):
        strangers = [user for user in ranked_lists if user not in targets]
        if strangers:
            raise ValueError(f"{len(strangers)} ranked lists have no target, e.g. of user {strangers[0]!r}")
        rows = [ranked_lists.get(user, ()) for user in targets]
        wanted = list(targets.values())
    else:
        rows, wanted = list(ranked_lists), list(targets)
        if len(rows) != len(wanted):
            raise ValueError(f"{len(rows)} ranked lists but {len(wanted)} targets")
    if not rows:
        raise ValueError("no users to evaluate")
    depth = max(ks)
    hits = np.zeros((len(rows), depth), bool)
    relevant = np.ones(len(rows), np.int64)
    for row, (items, target) in enumerate(zip(rows, wanted, strict=True)):
        goal = set(target) if isinstance(target, Collection) and not isinstance(target, str) else {target}
        if not goal:
            raise ValueError("a user has an empty set of targets")
        relevant[row] = len(goal)
        for place, item in enumerate(items[:depth]):
            key = item[0] if isinstance(item, tuple) else item
            if key in goal:
                hits[row, place] = True
                goal.discard(key)  # a duplicate later in the list earns nothing
    return {name: float(values.mean()) for name, values in metric_values(hits, relevant, ks).items()}


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one ranking reached.

    Attributes:
        users: int64 [U]; the evaluated users.
        ranks: int32 [U]; 1-based rank of each user's target, 0 where it was not listed.
        ks: Cut-offs.
        means: Over all evaluated users, misses included.
        intervals: 95% percentile bootstrap intervals of ``means``; users are resampled.
        retrieved: Means over the users whose target was listed; NaN when there are none.
        coverage: Share of users whose target was listed: the ceiling of Recall@K for any order of these lists.
    """

    users: Ints
    ranks: NDArray[np.int32]
    ks: tuple[int, ...]
    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    retrieved: dict[str, float]
    coverage: float

    def per_user(self, name: str) -> Floats:
        """float64 [U]: the metric of every user, e.g. ``per_user("ndcg@10")``."""
        return rank_values(self.ks)[name][clip_ranks(self.ranks, self.ks)]


def evaluate_ranks(
    ranks: NDArray[np.integer[Any]],
    users: Ints | None = None,
    *,
    ks: Sequence[int] = KS,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Metrics:
    """Metrics of the targets' ranks.

    Args:
        ranks: int [U]; 1-based rank of each user's target, 0 for a miss.
        users: int [U]; default 0, 1, ...
        ks: Cut-offs.
        bootstrap: Resamples for the intervals; 0 leaves them at the means.
        seed: Of the resampling.

    Raises:
        ValueError: no users, or a negative rank.
    """
    check_ks(ks)
    if not len(ranks):
        raise ValueError("no users to evaluate")
    if ranks.min() < 0:
        raise ValueError("ranks start at 1; 0 stands for a target that is not listed")
    table = rank_values(ks)
    names, values = list(table), np.stack(list(table.values()), axis=1)
    clipped = clip_ranks(ranks, ks)
    counts = np.bincount(clipped, minlength=len(values))
    means = counts @ values / len(ranks)
    low, high = bootstrap_interval(counts, values, bootstrap, seed) if bootstrap else (means, means)
    listed = counts[1:].sum()
    retrieved = counts[1:] @ values[1:] / listed if listed else np.full(len(names), np.nan)
    return Metrics(
        users=np.arange(len(ranks)) if users is None else users,
        ranks=np.asarray(ranks, np.int32),
        ks=tuple(ks),
        means=dict(zip(names, means.tolist(), strict=True)),
        intervals={name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)},
        retrieved=dict(zip(names, retrieved.tolist(), strict=True)),
        coverage=float(listed / len(ranks)),
    )


def evaluate_rankings(
    rankings: pl.DataFrame | Lists,
    targets: Mapping[int, int],
    ks: Sequence[int] = KS,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Metrics:
    """Metrics of a rankings (or candidates) table of one split over all users of ``targets``.

    Args:
        rankings: Columns ``user_id`` and ``item_ids``, best first; the order of the list counts, not the scores.
        targets: ``{user_id: item_id}``: the evaluated users. One without a row counts as a miss.
        ks: Cut-offs.
        bootstrap: Resamples for the intervals; 0 leaves them out.
        seed: Of the resampling.

    Raises:
        ValueError: no targets, or two rows for one user (several splits or sources in one table).
    """
    lists = rankings if isinstance(rankings, Lists) else Lists.from_frame(rankings)
    if len(np.unique(lists.users)) != len(lists.users):
        raise ValueError("several rankings of one user: evaluate one split and one source at a time")
    users = np.fromiter(targets, np.int64, len(targets))
    wanted = np.fromiter(targets.values(), np.int64, len(targets))
    ranks = lists.for_users(users).rank_of(wanted)
    return evaluate_ranks(ranks, users, ks=ks, bootstrap=bootstrap, seed=seed)


def expected_random(lengths: Ints, covered: NDArray[np.bool_], ks: Sequence[int] = KS) -> dict[str, float]:
    """What a uniformly random order of the lists reaches on average, exactly.

    Args:
        lengths: int [U]; candidates per user.
        covered: bool [U]; whether the target is among them.
        ks: Cut-offs.

    Returns:
        As `ranking_metrics`: per covered user the mean of the metric over all places 1..length, 0 for the others.
    """
    check_ks(ks)
    expected = {}
    for name, values in rank_values(ks).items():
        sums = np.concatenate([[0.0], np.cumsum(values[1:])])  # places beyond max(ks) add nothing
        per_user = sums[np.minimum(lengths, max(ks))] / np.maximum(lengths, 1)
        expected[name] = float(np.where(covered, per_user, 0.0).mean())
    return expected


def bootstrap_interval(
    counts: NDArray[np.integer[Any]], values: Floats, resamples: int, seed: int, level: float = 0.95
) -> tuple[Floats, Floats]:
    """Percentile bootstrap interval of means (Efron 1979) over users that fall into few kinds.

    Drawing U users with replacement is drawing the counts of their kinds from a multinomial distribution: the same
    resampling, without touching users one by one.

    Args:
        counts: int [R]; users of each kind.
        values: float64 [R, M]; metrics of each kind.
        resamples: Bootstrap samples.
        seed: Of the draw.
        level: Of the interval.

    Returns:
        Lower and upper ends, float64 [M] each.
    """
    total = counts.sum()
    kinds = np.flatnonzero(counts)
    drawn = np.random.default_rng(seed).multinomial(total, counts[kinds] / total, size=resamples)
    means = drawn @ values[kinds] / total
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high


def clip_ranks(ranks: NDArray[np.integer[Any]], ks: Sequence[int]) -> Ints:
    """Ranks as rows of `rank_values`: all that lie beyond the largest cut-off are one kind."""
    return np.minimum(ranks, max(ks) + 1).astype(np.int64)


def check_ks(ks: Sequence[int]) -> None:
    """Raises: ValueError: no cut-offs, or one below 1."""
    if not ks or min(ks) < 1:
        raise ValueError(f"cut-offs must be at least 1, got {tuple(ks)}")

"""Paired comparisons of rankings on the same users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlrank.data.lists import Floats
from vlrank.evaluation.metrics import bootstrap_interval, clip_ranks, rank_values


@dataclass(frozen=True, slots=True)
class Difference:
    """``a`` minus ``b`` in one metric, over the same users.

    Attributes:
        a, b: Names of the methods.
        metric: E.g. ``ndcg@10``.
        mean_a, mean_b: Means over all users.
        difference: ``mean_a - mean_b``.
        low, high: 95% percentile bootstrap interval of the difference; users are resampled, pairs stay together.
        p: Two-sided sign-flip permutation test: the smallest value it can take is 1 / (flips + 1).
        p_wilcoxon: Two-sided Wilcoxon signed-rank test (zeros left out, normal approximation); 1 if nothing differs.
        p_holm: ``p`` corrected for all comparisons of the same metric (Holm 1979); equal to ``p`` for a single one.
        wins, losses, users: Users for whom ``a`` is better, worse, and all.
    """

    a: str
    b: str
    metric: str
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p: float
    p_wilcoxon: float
    p_holm: float
    wins: int
    losses: int
    users: int

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """Whether ``a`` beats ``b`` at the 5% level after the correction."""
        if self.p_holm >= 0.05:
            return "unclear"
        return "better" if self.difference > 0 else "worse"

    def flipped(self) -> Difference:
        """``b`` minus ``a``."""
        return replace(
            self,
            a=self.b,
            b=self.a,
            mean_a=self.mean_b,
            mean_b=self.mean_a,
            difference=-self.difference,
            low=-self.high,
            high=-self.low,
            wins=self.losses,
            losses=self.wins,
        )


def compare_ranks(
    a: NDArray[np.integer[Any]],
    b: NDArray[np.integer[Any]],
    *,
    names: tuple[str, str] = ("A", "B"),
    metrics: Sequence[str],
    ks: Sequence[int],
    bootstrap: int = 2000,
    flips: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """Paired differences between two rankings of the same users.

    Users with the same two ranks are interchangeable, so resampling and sign flips draw multinomial and binomial counts
    of the kinds of users instead of single users: exact, and as fast for a million users as for a thousand.

    Args:
        a, b: int [U]; 1-based ranks of the same users' targets, 0 for a miss.
        names: Of the methods.
        metrics: Which metrics, e.g. ``("ndcg@10",)``.
        ks: Cut-offs that hold those of ``metrics``.
        bootstrap, flips, seed: Resamples, sign flips and their seed.

    Raises:
        ValueError: different numbers of users, or none.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired comparisons need the same users, got {len(a)} and {len(b)}")
    table = rank_values(ks)
    values = np.stack([table[metric] for metric in metrics], axis=1)
    codes, counts = np.unique(clip_ranks(a, ks) * len(values) + clip_ranks(b, ks), return_counts=True)
    first, second = values[codes // len(values)], values[codes % len(values)]
    deltas = first - second
    total = len(a)
    observed = counts @ deltas / total
    low, high = bootstrap_interval(counts, deltas, bootstrap, seed)
    p_values = _sign_flip(counts, deltas, flips, seed)
    return [
        Difference(
            a=names[0],
            b=names[1],
            metric=metric,
            mean_a=float(counts @ first[:, column] / total),
            mean_b=float(counts @ second[:, column] / total),
            difference=float(observed[column]),
            low=float(low[column]),
            high=float(high[column]),
            p=float(p_values[column]),
            p_wilcoxon=_wilcoxon(counts, deltas[:, column]),
            p_holm=float(p_values[column]),
            wins=int(counts[deltas[:, column] > 0].sum()),
            losses=int(counts[deltas[:, column] < 0].sum()),
            users=total,
        )
        for column, metric in enumerate(metrics)
    ]


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The same comparisons with ``p_holm`` set, metric by metric."""
    result = list(differences)
    for metric in dict.fromkeys(d.metric for d in differences):
        rows = [i for i, d in enumerate(differences) if d.metric == metric]
        for i, p in zip(rows, holm([differences[i].p for i in rows]), strict=True):
            result[i] = replace(differences[i], p_holm=float(p))
    return result


def holm(p_values: Sequence[float]) -> Floats:
    """Holm's step-down correction (Holm 1979): float64, in the order given.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _sign_flip(counts: NDArray[np.integer[Any]], deltas: Floats, flips: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    moved = (deltas != 0).any(axis=1)
    counts, deltas = counts[moved], deltas[moved]
    observed = np.abs(counts @ deltas)
    few = counts.sum() <= 20 * len(counts)  # a coin per user is then cheaper than a binomial draw per kind
    weights = np.repeat(deltas, counts, axis=0) if few else deltas
    extreme = np.zeros(deltas.shape[1])
    step = max(1, 4_000_000 // max(len(weights), 1))
    for start in range(0, flips, step):
        size = min(step, flips - start)
        if few:
            signs = 2.0 * rng.integers(0, 2, size=(size, len(weights)), dtype=np.int8) - 1
        else:
            # Of n users of a kind k keep their sign: together they add (2k - n) times their difference.
            signs = 2.0 * rng.binomial(counts, 0.5, size=(size, len(counts))) - counts
        extreme += (np.abs(signs @ weights) >= observed - 1e-9).sum(axis=0)
    return (1 + extreme) / (flips + 1)


def _wilcoxon(counts: NDArray[np.integer[Any]], deltas: Floats) -> float:
    from scipy.stats import wilcoxon

    moved = np.repeat(deltas, counts)
    moved = moved[moved != 0]
    return float(wilcoxon(moved, method="asymptotic").pvalue) if len(moved) else 1.0

"""Sliding windows for more candidates than one prompt holds, and permutations.

Windows follow listwise reranking as in RankGPT (Sun et al. 2023): from the tail of the list to its head, each window
reordered in place, so that a good candidate found at the bottom is carried upwards by the overlap.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlrank.prompting.prior import with_prior


def windows(n: int, size: int = 20, stride: int = 10) -> Iterator[tuple[int, int]]:
    """Half-open windows over ``n`` candidates, tail to head; the last one starts at 0.

    >>> list(windows(45, size=20, stride=10))
    [(25, 45), (15, 35), (5, 25), (0, 20)]

    Raises:
        ValueError: a stride outside 1..size, which would skip candidates.
    """
    if not 1 <= stride <= size:
        raise ValueError(f"stride must be in 1..{size}, got {stride}")
    if n == 0:
        return
    start = max(0, n - size)
    while True:
        yield start, min(n, start + size)
        if start == 0:
            return
        start = max(0, start - stride)


def stable_order(scores: npt.ArrayLike) -> list[int]:
    """Indices by falling score; ties keep the order they came in, NaN goes last.

    >>> stable_order([0.1, 0.5, 0.5])
    [1, 2, 0]
    """
    return np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable").tolist()  # NumPy sorts NaN last


def permutations(n: int, count: int, seed: int) -> list[list[int]]:
    """``count`` orders of ``n`` candidates: the given order first, then seeded shuffles.

    >>> permutations(3, 1, seed=0)
    [[0, 1, 2]]
    """
    orders = [list(range(n))]
    if count > 1:
        rng = random.Random(seed)
    for _ in range(count - 1):
        order = list(range(n))
        rng.shuffle(order)
        orders.append(order)
    return orders


def average_log_probs(rows: Sequence[npt.ArrayLike]) -> npt.NDArray[np.float32]:
    """Log of the mean probability over shuffles, candidates aligned: float32 [N]; sums to one when each row does."""
    stacked = np.stack([np.asarray(row, dtype=np.float64) for row in rows])
    if len(stacked) == 1:
        return stacked[0].astype(np.float32)
    return (np.logaddexp.reduce(stacked, axis=0) - np.log(len(stacked))).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Ranked:
    """One user's outcome.

    Attributes:
        order: Indices of the candidates, best first.
        scores: float32, aligned with ``order``, falling. Log-probabilities that sum to one where one prompt held all
            candidates; with several windows each window's are lowered until they continue the one above.
    """

    order: list[int]
    scores: npt.NDArray[np.float32]


Request = tuple[int, list[int]]
"""(which list, candidate indices in the order in which the prompt numbers them)."""

Score = Callable[[list[Request]], "Sequence[npt.ArrayLike | Exception]"]
"""Log-probabilities aligned with each request's candidates, or what went wrong with it."""


def first_requests(n: int, *, size: int = 20, stride: int = 10, shuffles: int = 1, seed: int = 0) -> list[list[int]]:
    """The candidate indices of a list's first prompts, those that depend on no answer; arguments as in `rank_lists`.

    >>> first_requests(45, size=20, stride=10) == [list(range(25, 45))]
    True
    """
    start, stop = next(windows(n, size, stride), (0, 0))
    return [[start + at for at in order] for order in _orders(stop - start, shuffles, seed, wave=0)] if n else []


def _orders(n: int, shuffles: int, seed: int, wave: int) -> list[list[int]]:
    return permutations(n, shuffles, seed * 1009 + wave)


def rank_lists(
    sizes: Sequence[int],
    score: Score,
    *,
    size: int = 20,
    stride: int = 10,
    shuffles: int = 1,
    seeds: Sequence[int] | None = None,
    priors: Sequence[npt.NDArray[np.float64]] | None = None,
) -> list[Ranked | Exception]:
    """Rank many candidate lists at once through sliding windows.

    All lists advance together: one call of ``score`` holds every list's next window, with the shuffles of one window
    side by side so that an engine can reuse their common prefix.

    Args:
        sizes: Number of candidates of each list; the retriever's order is 0, 1, 2, ...
        score: See `Score`.
        size: Candidates per prompt.
        stride: Step between windows.
        shuffles: Orders that each window is scored in; the probabilities are averaged.
        seeds: One per list, so that a list's shuffles do not depend on its neighbours; default 0.
        priors: `log_prior` of each list's candidates, to multiply their probabilities with.

    Returns:
        Per list its ranking, or the first error that one of its prompts met.
    """
    orders = [list(range(n)) for n in sizes]
    scores = [np.zeros(n, dtype=np.float32) for n in sizes]
    failed: dict[int, Exception] = {}
    todo = [list(windows(n, size, stride)) for n in sizes]
    for wave in range(max(map(len, todo), default=0)):
        active = [i for i in range(len(sizes)) if wave < len(todo[i]) and i not in failed]
        requests: list[Request] = []
        shuffled: list[list[list[int]]] = []
        for i in active:
            start, stop = todo[i][wave]
            window = orders[i][start:stop]
            shuffled.append(_orders(len(window), shuffles, seeds[i] if seeds else 0, wave))
            requests += [(i, [window[at] for at in permutation]) for permutation in shuffled[-1]]
        answers = iter(score(requests))
        for i, shuffle in zip(active, shuffled, strict=True):
            rows = []
            for permutation in shuffle:
                answer = next(answers)
                if isinstance(answer, Exception):
                    failed.setdefault(i, answer)
                    continue
                row = np.empty(len(permutation), dtype=np.float32)
                row[permutation] = np.asarray(answer, dtype=np.float32)
                rows.append(row)
            if i in failed:
                continue
            start, stop = todo[i][wave]
            values = average_log_probs(rows)
            if priors:
                values = with_prior(values, priors[i][orders[i][start:stop]])
            best, window = stable_order(values), orders[i][start:stop]
            orders[i][start:stop] = [window[at] for at in best]
            scores[i][start:stop] = values[best] + 0.0  # no -0.0
    for i, row in enumerate(scores):
        if len(todo[i]) > 1:
            scores[i] = _continued(row)
    return [failed[i] if i in failed else Ranked(orders[i], scores[i]) for i in range(len(sizes))]


def _continued(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Lower each later window's scores so that the list falls from head to tail; differences within a window stay."""
    steps = np.diff(scores.astype(np.float64))
    return (
        scores[:1].astype(np.float64) + np.concatenate([np.zeros(min(1, len(scores))), np.cumsum(np.minimum(steps, 0))])
    ).astype(np.float32)

"""Drawing negatives: the one rule for training, validation and sampled candidates of bulk reranking.

Negatives are items that the user does not have *yet*: training leaves out the user's training items, a question about
a later target leaves out the history before it, as first-stage retrievers do. What the user takes after the target is a
candidate like any other: the validation item in training, the test item in training and validation. Leaving it out
would use knowledge of the future, and make "never seen as a negative" a clue to the answer. (SASRec, Kang and McAuley
2018, draws its 100 sampled candidates so.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def draw_negatives(rng: np.random.Generator, items: np.ndarray, taken: Collection[int], n: int) -> list[int]:
    """``n`` different items that are not taken, one after the other, each entry of ``items`` equally likely.

    An item that is listed k times is drawn k times as often. Rejection is fast where most entries are free; where few
    are, they are listed and shuffled.

    Args:
        rng: Random numbers.
        items: int64 [entries]: what may be drawn.
        taken: A set of items that may not.
        n: How many.

    Raises:
        ValueError: fewer than ``n`` items are free.
    """
    if n <= 0:
        return []
    if len(items) < 4 * (n + len(taken)):
        rest = items[~np.isin(items, np.fromiter(taken, dtype=np.int64, count=len(taken)))]
        free = list(dict.fromkeys(rng.permutation(rest).tolist()))
        if len(free) < n:
            raise ValueError(f"{n} items wanted, {len(free)} are free")
        return free[:n]
    found: dict[int, None] = {}
    while len(found) < n:
        for item in items[rng.integers(len(items), size=2 * (n - len(found)))].tolist():
            if item not in taken and len(found) < n:
                found[item] = None
    return list(found)


def shuffle_in(rng: np.random.Generator, target: int, negatives: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Target and negatives in random order, and the target's 1-based position."""
    order = rng.permutation(len(negatives) + 1)
    everything = [target, *negatives]
    return tuple(everything[i] for i in order), int(np.flatnonzero(order == 0)[0]) + 1


def sampled_candidates(
    user: int, history: Sequence[int], target: int, items: np.ndarray, n: int, seed: int
) -> tuple[tuple[int, ...], int]:
    """A user's target among ``n`` negatives, in random order, and its 1-based position.

    A pure function of its arguments, so validation and ``rerank --split val`` show the same candidates.

    Args:
        user: User id; draws of different users are independent.
        history: All items before the target.
        target: The item to find.
        items: int64 [items]: ids that the mode can show, ascending.
        n: Negatives; fewer where not as many items are left.
        seed: Of the run.
    """
    rng = np.random.default_rng([seed, 4, user])
    taken = {*history, target}
    left = len(items) - int(np.isin(items, np.fromiter(taken, dtype=np.int64, count=len(taken))).sum())
    return shuffle_in(rng, target, draw_negatives(rng, items, taken, min(n, left)))

"""Which rows share a forward pass: packed to a fixed token budget, or in padded batches of similar length.

Packing to a fixed budget keeps every shape static, so compiled layers are compiled once, and no token is padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ROW_TOKENS = 16384
"""Longest packed row unless the config says more: enough to fill a large GPU."""


def row_length(lengths: Sequence[int], share: int, limit: int = ROW_TOKENS) -> int:
    """The length of packed rows that steps of ``share`` prompts fill well.

    A step's tokens vary around ``share * mean``; as few rows of at most ``limit`` tokens as hold nearly all steps are
    shared out evenly. Where there are several, each has room for half a prompt more, because bins are never quite full.

    Args:
        lengths: Of some prompts, in tokens.
        share: Prompts of one step on one device.
        limit: Longest row, unless one prompt alone is longer.

    >>> row_length([1000] * 50, share=8), row_length([1000] * 50, share=64)
    (8064, 16512)
    """
    mean, spread = float(np.mean(lengths)), float(np.std(lengths))
    step = share * mean + 2 * math.sqrt(share) * spread
    rows = math.ceil(step / limit)
    length = max(step / rows + (mean / 2 if rows > 1 else 0), max(lengths))
    return math.ceil(length / 128) * 128


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most ``budget``: first-fit decreasing (Johnson 1973).

    Raises:
        ValueError: one length alone exceeds the budget.

    >>> pack([5, 9, 4, 1], budget=10)
    [[1, 3], [0, 2]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[i]
        if length > budget:
            raise ValueError(f"a prompt of {length} tokens does not fit a packed row of {budget}")
        place = next((b for b, left in enumerate(room) if length <= left), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = len(bins) - 1
        bins[place].append(i)
        room[place] -= length
    return bins


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of at most ``size`` indices, similar lengths together, so that little is padding.

    >>> batches([9, 2, 8, 3], size=2)
    [[0, 2], [3, 1]]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return [order[i : i + size] for i in range(0, len(order), size)]


def share(weights: Sequence[float], rank: int, world: int) -> list[int]:
    """The indices of one rank: as many as the others have (within one), and similar total weight.

    Heaviest first to the rank that has least, as long as it has not its full number of samples.

    >>> [share([9, 5, 4, 3], rank, 2) for rank in (0, 1)]
    [[0, 3], [1, 2]]
    """
    n = len(weights)
    quota = [n // world + (r < n % world) for r in range(world)]
    given: list[list[int]] = [[] for _ in range(world)]
    load = [0.0] * world
    for i in np.argsort(-np.asarray(weights, dtype=float), kind="stable").tolist():
        r = min((r for r in range(world) if len(given[r]) < quota[r]), key=lambda r: (load[r], r))
        given[r].append(i)
        load[r] += weights[i]
    return given[rank]

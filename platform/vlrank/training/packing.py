"""Which rows share a forward pass: packed to a fixed token budget, or in padded batches of similar length.

Packing to a fixed budget keeps all shapes static, so layers are compiled once, and wastes few tokens on padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def launch_tokens(hidden: int) -> int:
    """Tokens that a GPU computes in the time that launching a pass takes: shorter rows take as long as this many.

    Launching takes about 2 ms a layer, forward and backward (measured beside an H100: 60 passes through layers of
    SmolLM2-135M in 120 ms, of which the GPU was busy for 86); a layer's weights, 12 times ``hidden`` squared, cost 6
    floating-point operations per token, of which the GPU makes 4e14 a second.

    >>> launch_tokens(576), launch_tokens(1024), launch_tokens(2048)
    (33489, 10596, 2649)
    """
    return int(2e-3 * 4e14 / (6 * 12 * hidden**2))


def row_length(lengths: Sequence[int], share: int, limit: int, least: int = 0) -> int:
    """The length of packed rows that steps of ``share`` prompts fill best: the one that costs least on a sample.

    Args:
        lengths: Of some prompts, in tokens, in the order in which steps take them.
        share: Prompts of one step on one device.
        limit: Longest row, unless one prompt alone is longer.
        least: Tokens that a row costs at least; see `launch_tokens`.

    Returns:
        A multiple of 128.

    >>> row_length([1000] * 50, share=8, limit=16384), row_length([1000] * 50, share=64, limit=16384)
    (8064, 16000)

    Steps of very different size waste less in shorter rows, but where launching takes the time fewer are faster:

    >>> lengths = [625] * 32 + [1125] * 32
    >>> row_length(lengths, share=32, limit=49152), row_length(lengths, share=32, limit=49152, least=33489)
    (20096, 36096)
    """
    drawn = [*lengths] * -(-share // len(lengths))
    steps = [drawn[i : i + share] for i in range(0, len(drawn) - share + 1, share)]

    def cost(row: int) -> int:
        # A pass costs something of its own, about as much as 256 tokens.
        return sum(len(pack(step, row)) for step in steps) * (max(row, least) + 256)

    shortest = math.ceil(max(drawn) / 128) * 128
    longest = math.ceil(max(map(sum, steps)) / 128) * 128
    return min(range(shortest, max(shortest, min(limit // 128 * 128, longest)) + 1, 128), key=cost)


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


def batches(lengths: Sequence[int], size: int, tokens: float = math.inf) -> list[list[int]]:
    """Batches of at most ``size`` indices and ``tokens`` padded tokens, similar lengths together: little is padding.

    A length of more than ``tokens`` goes alone.

    >>> batches([9, 2, 8, 3], size=2), batches([9, 2, 8, 3], size=4, tokens=18)
    ([[0, 2], [3, 1]], [[0, 2], [3, 1]])
    """
    result: list[list[int]] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if result and len(result[-1]) < size and (len(result[-1]) + 1) * lengths[result[-1][0]] <= tokens:
            result[-1].append(i)
        else:
            result.append([i])
    return result


def share(weights: Sequence[float], rank: int, world: int) -> list[int]:
    """The indices of one rank: all ranks get the same number of samples (within one) and a similar total weight.

    The heaviest sample goes first, to the rank with the least weight that still has room.

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

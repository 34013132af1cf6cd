"""Fusion of the model's scores with the retriever's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from vlrank.data.lists import is_flat, rank_by_score
from vlrank.reranking.windows import stable_order

_WEIGHTS = tuple(i / 20 for i in range(21))


def fuse(model: npt.ArrayLike, retriever: npt.ArrayLike, weight: float, spread: float = 1.0) -> npt.NDArray[np.float32]:
    """``(1 - weight) * log p(model) + weight * retriever / spread``, both centred: float32 [N].

    A logarithmic opinion pool (Genest and Zidek 1986). Neither side is standardised within the list, so in each list
    the side that tells the candidates apart more clearly decides more. Constant scores count as zeros, so a model that
    prefers nothing leaves the retriever's order.

    Args:
        model: Log-probabilities [N].
        retriever: Scores [N].
        weight: Of the retriever, 0 to 1.
        spread: Standard deviation of the retriever's scores within a list, the mean over its table.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"fusion weight must be in 0..1, got {weight}")
    return ((1 - weight) * _centred(model) + weight * _centred(retriever) / spread).astype(np.float32)


def _centred(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    centred = array - array.mean()
    return np.zeros_like(array) if is_flat(centred.std(), np.abs(array).max()) else centred


def best_weight(
    lists: Sequence[tuple[Sequence[int], Sequence[float], Sequence[float], int]], spread: float = 1.0, k: int = 10
) -> float:
    """The fusion weight in steps of 0.05 with the highest mean NDCG@k; the smallest of equals.

    Args:
        lists: (items, model scores, retriever scores, target) per validation user.
        spread: As in `fuse`.
        k: Cut-off.
    """

    def gain(weight: float) -> float:
        total = 0.0
        for items, model, retriever, target in lists:
            if target in items:
                order = stable_order(retriever)  # ties of fused scores keep the retriever's order
                fused = fuse(model, retriever, weight, spread)[order]
                rank = rank_by_score(fused, order.index(list(items).index(target)))
                total += 1 / math.log2(rank + 1) if rank <= k else 0.0
        return total

    return max(_WEIGHTS, key=lambda weight: (round(gain(weight), 9), -weight))


def fused_table(
    rows: pl.DataFrame, retrieved: Mapping[int, Mapping[int, float]], weight: float | None, spread: float = 1.0
) -> pl.DataFrame:
    """Rankings by fused scores; their ties keep the retriever's order.

    Args:
        rows: ``user_id``, ``item_ids`` and ``scores`` of the model, and further columns, which stay.
        retrieved: user id -> item id -> the retriever's score.
        weight: Of the retriever; None leaves the model's rankings as they are.
        spread: As in `fuse`.
    """
    if weight is None:
        return rows
    items, scores = [], []
    for user, listed, model in rows.select("user_id", "item_ids", "scores").iter_rows():
        retriever = [retrieved[user].get(item, 0.0) for item in listed]
        before = stable_order(retriever)
        fused = fuse(model, retriever, weight, spread)
        order = [before[i] for i in stable_order(fused[before])]
        items.append([listed[i] for i in order])
        scores.append(fused[order].tolist())
    return rows.with_columns(
        item_ids=pl.Series(items, dtype=pl.List(pl.Int32)), scores=pl.Series(scores, dtype=pl.List(pl.Float32))
    )

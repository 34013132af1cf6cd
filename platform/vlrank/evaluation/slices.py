"""The same metrics for parts of the users: by history length, popularity, picture and category of the target."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import polars as pl

from vlrank.config import EvaluateConfig
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Ints
from vlrank.evaluation.groups import POPULARITY, Method, Slice
from vlrank.evaluation.metrics import evaluate_ranks
from vlrank.retrieval.baselines import Evidence


def slices(
    config: EvaluateConfig,
    dataset: Dataset,
    evidence: Evidence,
    users: Ints,
    targets: Ints,
    methods: Sequence[Method],
) -> list[Slice]:
    """All slices with at least one user; a kind of slice that does not divide the users is left out."""
    items = dataset.items()
    histories = np.array([len(evidence.histories[int(user)]) for user in users])
    popularity = evidence.popularity[targets]
    pictured = items["image_path"].is_not_null().to_numpy()[targets - 1]
    category = _categories(items)[targets - 1]
    labels = {
        "history length (items)": _bins(histories, (3, 5, 10, 20, 50)),
        POPULARITY: _bins(popularity, (1, 5, 20, 100)),
        "target's picture": [(label, pictured == value) for label, value in (("yes", True), ("no", False))],
        "target's category": [(str(name), category == name) for name in _frequent(category, 10)],
    }
    result = []
    for by, parts in labels.items():
        kept = [(value, mask) for value, mask in parts if mask.any()]
        if len(kept) < 2:
            continue
        for value, mask in kept:
            metrics = {
                method.name: evaluate_ranks(
                    method.metrics.ranks[mask], users[mask], ks=config.ks, bootstrap=config.bootstrap, seed=config.seed
                )
                for method in methods
            }
            result.append(Slice(by, value, int(mask.sum()), metrics))
    return result


def _bins(values: Ints, edges: Sequence[int]) -> list[tuple[str, np.ndarray]]:
    """Labelled masks of values from one edge up to the next: ``0–2``, ``3–4``, ``50+``."""
    parts = [
        (str(low) if high == low + 1 else f"{low}–{high - 1}", (values >= low) & (values < high))
        for low, high in pairwise((0, *edges))
    ]
    return [*parts, (f"{edges[-1]}+", values >= edges[-1])]


def _categories(items: pl.DataFrame) -> np.ndarray:
    """str [I]: each item's category at the first level that tells items apart (no category holds nine in ten)."""
    deepest = int(items["categories"].list.len().max() or 0)  # type: ignore[arg-type]
    names = pl.Series(["(none)"] * len(items))
    for level in range(deepest):
        names = items["categories"].list.get(level, null_on_oob=True).fill_null("(none)")
        if names.value_counts()["count"].max() < 0.9 * len(items):  # type: ignore[operator]
            break
    return names.to_numpy()


def _frequent(values: np.ndarray, count: int) -> list[str]:
    names, sizes = np.unique(values.astype(str), return_counts=True)
    return [str(name) for name in names[np.argsort(-sizes, kind="stable")][:count]]

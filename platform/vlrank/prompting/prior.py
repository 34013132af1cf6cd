"""The popularity prior: restores what training on popularity-sampled negatives removes from a model's answers.

Candidates are a target, drawn from p(item | user), among negatives drawn from q. A model that learns to find the target
in such lists learns p(item | user) / q(item), up to a constant per list: among negatives that are as popular as the
target, popularity is no clue. So log q is added to the log-probabilities. Known as the logQ correction of sampled
softmax (Bengio and Senecal 2008; for recommenders Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large
Corpus Item Recommendations").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vlrank.data.items import ItemMeta
from vlrank.errors import UserError


def log_prior(items: Iterable[ItemMeta]) -> npt.NDArray[np.float64]:
    """log(popularity + 1), the sampling weights of ``negative_sampling=popularity``: float64 [items], up to a constant.

    Raises:
        UserError: an item without ``popularity``.
    """
    try:
        return np.log1p(np.array([item["popularity"] for item in items], dtype=np.float64))
    except KeyError:
        raise UserError(
            "ranking.popularity_prior needs every item's popularity, its training interactions",
            'Take item_meta from load_item_meta("DATASET"), or set popularity_prior=False.',
        ) from None


def with_prior(log_probs: npt.ArrayLike, prior: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Log-probabilities plus the log prior, normalised again: float32 [N].

    >>> np.exp(with_prior(np.log([0.5, 0.5]), np.log([1, 3]))).round(2).tolist()
    [0.25, 0.75]
    """
    product = np.asarray(log_probs, dtype=np.float64) + np.asarray(prior, dtype=np.float64)
    return (product - np.logaddexp.reduce(product)).astype(np.float32)


def with_popularity(item_meta: Mapping[int, ItemMeta], sequences: Mapping[int, Sequence[int]]) -> dict[int, ItemMeta]:
    """``item_meta`` with ``popularity`` counted in these sequences: user id -> training items."""
    counts = Counter(item for items in sequences.values() for item in items)
    return {item: {**entry, "popularity": counts[item]} for item, entry in item_meta.items()}

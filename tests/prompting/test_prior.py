"""Models that learned from negatives drawn by popularity: without the prior they call rare items likely."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlrank.config import RankingConfig, TrainConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.errors import UserError
from vlrank.prompting.prior import log_prior, with_prior
from vlrank.training.data import TrainingData
from vlrank.training.samples import TrainingSamples
from vlrank.training.validation import target_ranks


def test_what_is_learned_from_negatives_by_popularity_becomes_the_share_of_purchases_again() -> None:
    """A model without tastes that has learned all there is to learn from the real sampler's lists."""
    # Items 1..30 are bought four times as often as 31..60.
    weights = np.repeat([4.0, 1.0], 30)
    bought = np.random.default_rng(0).choice(np.arange(1, 61), p=weights / weights.sum(), size=6000).tolist()
    sequences = {user: [100 + user, item] for user, item in enumerate(bought)}
    samples = TrainingSamples(sequences, np.arange(1, 61), negatives=1, seed=0, sampling="popularity")
    popular = rare = 0
    for i in range(len(samples)):
        sample = samples.sample(0, i)
        target = sample.candidates[sample.label - 1]
        [other] = set(sample.candidates) - {target}
        popular += target <= 30 < other
        rare += other <= 30 < target
    learned = np.array([popular, rare]) / (popular + rare)
    assert abs(learned[0] - 0.5) < 0.05, "popularity is no clue in these lists"
    counts = Counter(bought)
    shares = [sum(counts[item] for item in half) // 30 for half in (range(1, 31), range(31, 61))]
    prior = log_prior([{"text": "", "popularity": share} for share in shares])
    assert abs(np.exp(with_prior(np.log(learned), prior))[0] - 0.8) < 0.03


@given(st.lists(st.tuples(st.floats(-30, 0), st.integers(0, 10**6)), min_size=1, max_size=50))
def test_probabilities_sum_to_one_again_and_equal_popularity_changes_no_order(pairs: list[tuple[float, int]]) -> None:
    scores, counts = np.array([score for score, _ in pairs]), [count for _, count in pairs]
    weighted = with_prior(scores, log_prior([{"text": "", "popularity": count} for count in counts]))
    product = np.exp(scores) * (np.array(counts) + 1)
    np.testing.assert_allclose(np.exp(weighted), product / product.sum(), rtol=1e-4, atol=1e-12)
    flat = with_prior(scores, np.full(len(scores), 3.0))
    np.testing.assert_allclose(flat, scores - np.logaddexp.reduce(scores), rtol=1e-5, atol=1e-9)


def test_validation_ranks_as_reranking_does() -> None:
    samples = TrainingSamples({1: [1, 2, 3]}, np.arange(1, 9), negatives=2, seed=0)
    sample = samples.sample(0, 0)
    scores = np.log(np.array([0.4, 0.3, 0.3], dtype=np.float32))
    priors = np.zeros(3)
    priors[sample.label - 1] = 5.0
    assert target_ranks([sample], [scores])[0] == sample.label
    assert target_ranks([sample], [scores], [priors])[0] == 1
    assert target_ranks([sample], [None], [priors])[0] == np.inf


def test_popularity_counts_training_interactions_alone(shop: Dataset) -> None:
    counts = Counter(item for items in shop.train_sequences().values() for item in items)
    assert {item: meta["popularity"] for item, meta in shop.item_meta().items()} == {
        item: counts[item] for item in range(1, shop.n_items + 1)
    }
    lists = {user: [target] for user, (_, target) in shop.histories("val").items()}
    given_none = {item: {"text": meta["text"]} for item, meta in shop.item_meta().items()}
    data = TrainingData.of_lists(shop.train_sequences(), lists, given_none)  # type: ignore[arg-type]
    assert data.item_meta[1]["popularity"] == counts[1]


def test_the_prior_is_on_where_training_drew_by_it_and_nowhere_else() -> None:
    def resolved(**settings: object) -> bool | None:
        config = load_config(TrainConfig, dataset="d", out="o", mode="caption", **settings)
        return config.resolved_ranking.popularity_prior

    assert resolved() is False
    assert resolved(negative_sampling="popularity") is True
    assert resolved(negative_sampling="popularity", candidates="retrieval:als") is False
    assert resolved(negative_sampling="popularity", ranking={"popularity_prior": False}) is False
    assert resolved(ranking={"popularity_prior": True}) is True
    assert RankingConfig().popularity_prior is None


def test_items_without_popularity_are_no_rare_items() -> None:
    with pytest.raises(UserError, match="needs every item's popularity"):
        log_prior([{"text": "a", "popularity": 3}, {"text": "b"}])

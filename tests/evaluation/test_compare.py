"""Claims of "better": what they must agree with, and what they must not claim."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlrank.evaluation.compare import Difference, compare_ranks, corrected, holm
from vlrank.evaluation.metrics import evaluate_ranks

KS = (1, 5, 10)


def ranks(seed: int, users: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 21, size=users)


def test_difference_is_that_of_the_means_and_flips_with_its_sides() -> None:
    a, b = ranks(0), ranks(1)
    (got,) = compare_ranks(a, b, metrics=["ndcg@10"], ks=KS)
    means = [evaluate_ranks(x, ks=KS, bootstrap=0).means["ndcg@10"] for x in (a, b)]
    assert got.difference == pytest.approx(means[0] - means[1])
    assert (got.mean_a, got.mean_b) == pytest.approx(means)
    assert got.low < got.difference < got.high
    back = got.flipped()
    assert (back.difference, back.low, back.high) == (-got.difference, -got.high, -got.low)
    assert (back.wins, back.losses) == (got.losses, got.wins)


def test_agrees_with_scipys_paired_bootstrap_and_permutation_test() -> None:
    from scipy.stats import bootstrap, permutation_test, wilcoxon

    a = ranks(2, 200)
    b = np.where(np.random.default_rng(3).random(200) < 0.25, np.minimum(a + 3, 20), a)
    (got,) = compare_ranks(a, b, metrics=["ndcg@10"], ks=KS, bootstrap=20_000, flips=20_000)
    x, y = (evaluate_ranks(r, ks=KS, bootstrap=0).per_user("ndcg@10") for r in (a, b))
    interval = bootstrap(
        (x - y,), np.mean, method="percentile", n_resamples=20_000, batch=2000, rng=0
    ).confidence_interval
    assert (got.low, got.high) == pytest.approx(tuple(interval), abs=1e-3)
    small = slice(0, 60)
    (few,) = compare_ranks(a[small], b[small], metrics=["ndcg@10"], ks=KS, flips=50_000)
    test = permutation_test(
        (x[small], y[small]), lambda p, q: np.mean(p - q), permutation_type="samples", n_resamples=20_000, rng=0
    )
    assert few.p == pytest.approx(test.pvalue, abs=0.015)
    moved = (x - y)[x != y]
    assert got.p_wilcoxon == pytest.approx(wilcoxon(moved, method="asymptotic").pvalue)


def test_many_alike_users_give_the_same_p_as_few_different_ones() -> None:
    # 12,000 users of a handful of kinds are flipped kind by kind; the normal approximation is the reference.
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 3, size=12_000), rng.integers(1, 3, size=12_000)
    (got,) = compare_ranks(a, b, metrics=["recall@1"], ks=KS)
    delta = (a == 1).astype(float) - (b == 1)
    z = delta.sum() / np.sqrt((delta**2).sum())
    assert got.p == pytest.approx(2 * norm.sf(abs(z)), abs=0.03)


def test_a_ranking_is_not_better_than_itself() -> None:
    (got,) = compare_ranks(ranks(0), ranks(0), metrics=["recall@10"], ks=KS)
    assert (got.difference, got.low, got.high, got.p, got.p_wilcoxon) == (0, 0, 0, 1, 1)
    assert got.verdict == "unclear"


def test_chance_is_called_better_in_one_of_twenty_tries_at_most() -> None:
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(200):
        a, b = rng.integers(0, 21, size=(2, 150))
        (got,) = compare_ranks(a, b, metrics=["ndcg@10"], ks=KS, bootstrap=100, flips=500)
        called += got.verdict != "unclear"
    assert called / 200 < 0.10


def test_a_large_gain_is_seen_and_named() -> None:
    a = ranks(5)
    (got,) = compare_ranks(a, np.where(a > 0, np.minimum(a + 5, 20), 0), metrics=["ndcg@10"], ks=KS)
    assert got.verdict == "better"
    assert got.losses == 0
    assert got.flipped().verdict == "worse"


def test_holm_by_hand() -> None:
    # Sorted p .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04; steps never fall.
    assert holm([0.04, 0.01, 0.03, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]).tolist() == [1, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_helps_and_lies_below_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-12).all()
    assert (adjusted <= np.minimum(np.array(p) * len(p), 1) + 1e-12).all()


def test_metrics_are_corrected_each_on_its_own() -> None:
    rows = [
        Difference("a", b, m, 0, 0, 0.1, 0, 0, p, 0, p, 0, 0, 9)
        for m, ps in (("ndcg@10", (0.01, 0.04)), ("mrr@10", (0.02,)))
        for b, p in zip("xy", ps, strict=False)
    ]
    assert [d.p_holm for d in corrected(rows)] == pytest.approx([0.02, 0.04, 0.02])


def test_other_users_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same users"):
        compare_ranks(ranks(0, 5), ranks(0, 6), metrics=["mrr@10"], ks=KS)

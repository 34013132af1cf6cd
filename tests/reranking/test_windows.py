"""Windows must never lose or repeat a candidate, and must not invent an opinion."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrank.reranking.windows import (
    Ranked,
    Request,
    average_log_probs,
    permutations,
    rank_lists,
    stable_order,
    windows,
)


def test_windows_of_45() -> None:
    # Tail to head in steps of 10; the last would start at -5 and is clamped to the start.
    assert list(windows(45, 20, 10)) == [(25, 45), (15, 35), (5, 25), (0, 20)]
    assert list(windows(20, 20, 10)) == [(0, 20)]
    assert list(windows(3, 20, 10)) == [(0, 3)]
    assert list(windows(0, 20, 10)) == []


@given(n=st.integers(0, 300), size=st.integers(2, 40), data=st.data())
def test_windows_cover_and_overlap(n: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    cut = list(windows(n, size, stride))
    assert {i for start, stop in cut for i in range(start, stop)} == set(range(n))
    assert all(stop - start == min(n, size) for start, stop in cut)
    assert all(later[0] < earlier[0] and earlier[0] <= later[1] for earlier, later in pairwise(cut))


def test_a_stride_that_skips_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match="stride"):
        list(windows(50, 10, 11))


def model(relevance: list[np.ndarray]):  # type: ignore[no-untyped-def]
    def score(requests: list[Request]) -> list[np.ndarray]:
        answers = []
        for i, indices in requests:
            logits = relevance[i][indices]
            answers.append(logits - np.log(np.exp(logits).sum()))
        return answers

    return score


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 70), max_size=5), shuffles=st.integers(1, 3), seed=st.integers(0, 99))
def test_never_a_duplicate_never_a_lost_candidate(sizes: list[int], shuffles: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    relevance = [rng.normal(size=n) for n in sizes]
    for n, values, ranked in zip(sizes, relevance, rank_lists(sizes, model(relevance), shuffles=shuffles), strict=True):
        assert isinstance(ranked, Ranked)
        assert sorted(ranked.order) == list(range(n))
        assert len(ranked.scores) == n
        assert (np.diff(ranked.scores) <= 1e-6).all()
        if n <= 20:
            assert ranked.order == stable_order(values.astype(np.float32))
            assert n == 0 or np.exp(ranked.scores.astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)
        # A window carries its best half upwards, so the best `size - stride` of the whole list end up on top.
        assert ranked.order[:10] == stable_order(values.astype(np.float32))[:10]


@given(n=st.integers(0, 120), shuffles=st.integers(1, 4))
def test_a_constant_scorer_returns_the_retrievers_order(n: int, shuffles: int) -> None:
    [ranked] = rank_lists([n], model([np.zeros(n)]), shuffles=shuffles)
    assert isinstance(ranked, Ranked)
    assert ranked.order == list(range(n))
    assert len(set(ranked.scores.tolist())) <= 1


def test_a_failed_prompt_costs_its_own_list_only() -> None:
    healthy = model([np.arange(3.0), np.arange(30.0), np.arange(3.0)])

    def score(requests: list[Request]) -> list:  # type: ignore[type-arg]
        answers = healthy(requests)
        return [
            OSError("broken picture") if i == 1 else answer for (i, _), answer in zip(requests, answers, strict=True)
        ]

    first, second, third = rank_lists([3, 30, 3], score)
    assert isinstance(second, OSError)
    assert isinstance(first, Ranked)
    assert isinstance(third, Ranked)
    assert first.order == third.order == [2, 1, 0]


def test_shuffles_depend_on_the_lists_seed_not_on_its_neighbours() -> None:
    seen: dict[int, list[list[int]]] = {}

    def score(requests: list[Request]) -> list[np.ndarray]:
        for i, indices in requests:
            seen.setdefault(i, []).append(indices)
        return [np.zeros(len(indices)) for _, indices in requests]

    rank_lists([9], score, shuffles=3, seeds=[7])
    alone = seen.pop(0)
    rank_lists([4, 9], score, shuffles=3, seeds=[1, 7])
    assert seen[1] == alone
    assert alone[0] == list(range(9))
    assert alone[1] != alone[2]


def test_shuffles_remove_a_position_bias() -> None:
    """A model that likes whatever is numbered 1 says nothing about the items: shuffles come close to equal shares."""

    def score(requests: list[Request]) -> list[np.ndarray]:
        return [np.log(np.array([0.9, *[0.1 / 4] * 4])) for _ in requests]

    [biased] = rank_lists([5], score)
    [fair] = rank_lists([5], score, shuffles=400)
    assert isinstance(biased, Ranked)
    assert isinstance(fair, Ranked)
    assert np.ptp(np.exp(biased.scores)) > 0.8
    assert np.ptp(np.exp(fair.scores)) < 0.2


def test_averaging_is_over_probabilities() -> None:
    mean = average_log_probs([np.log([0.5, 0.5]), np.log([0.9, 0.1])])
    np.testing.assert_allclose(np.exp(mean), [0.7, 0.3], rtol=1e-6)


def test_the_prior_weighs_in_every_window() -> None:
    """A popular item at the tail of a long list is carried to its head, past windows that the model has no view on."""
    prior = np.zeros(45)
    prior[44] = 9.0
    [flat] = rank_lists([45], model([np.zeros(45)]), priors=[prior])
    assert isinstance(flat, Ranked)
    assert flat.order == [44, *range(44)]
    opinion = np.array([0.1, 0.2, 0.7])
    [short] = rank_lists([3], lambda _: [np.log(opinion)], priors=[np.log([7.0, 1.0, 2.0])])
    assert isinstance(short, Ranked)
    assert short.order == [2, 0, 1]
    np.testing.assert_allclose(np.exp(short.scores), np.array([1.4, 0.7, 0.2]) / 2.3, rtol=1e-5)


def test_permutations_start_with_the_given_order() -> None:
    orders = permutations(6, 4, seed=3)
    assert orders[0] == [0, 1, 2, 3, 4, 5]
    assert all(sorted(order) == orders[0] for order in orders)
    assert orders == permutations(6, 4, seed=3)


def test_ties_and_nan_keep_their_order() -> None:
    assert stable_order([1.0, 2.0, 1.0, 2.0]) == [1, 3, 0, 2]
    assert stable_order([float("nan"), 1.0, float("-inf")]) == [1, 2, 0]

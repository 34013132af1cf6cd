"""Numbers people will quote: closed forms, an independent library, and the ways in which evaluations usually cheat."""

import math

import ir_measures
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrank.data.lists import Lists
from vlrank.evaluation.metrics import (
    bootstrap_interval,
    evaluate_rankings,
    evaluate_ranks,
    expected_random,
    metric_values,
    ranking_metrics,
)

KS = (1, 5, 10, 20, 50)


def table(lists: dict[int, list[int]]) -> pl.DataFrame:
    return pl.DataFrame(
        {"user_id": list(lists), "item_ids": list(lists.values())},
        schema={"user_id": pl.Int32, "item_ids": pl.List(pl.Int32)},
    )


def test_closed_forms_of_one_target() -> None:
    # Targets at rank 1, at rank 3, and not listed at all.
    got = ranking_metrics({1: [9, 8, 7], 2: [5, 6, 9], 3: [1, 2, 3]}, {1: 9, 2: 9, 3: 9}, ks=(1, 3))
    assert got["recall@1"] == pytest.approx(1 / 3)
    assert got["recall@3"] == got["hit_rate@3"] == pytest.approx(2 / 3)
    assert got["ndcg@3"] == pytest.approx(1 / 3 * (1 + 1 / math.log2(4)))
    assert got["mrr@3"] == got["map@3"] == pytest.approx(1 / 3 * (1 + 1 / 3))
    assert got["mrr@1"] == pytest.approx(1 / 3)


def test_closed_forms_of_several_targets() -> None:
    # Hits at places 1 and 3 of three relevant items; the ideal list within K = 3 has three hits.
    got = ranking_metrics([[4, 9, 5]], [{4, 5, 6}], ks=(2, 3))
    assert got["recall@3"] == pytest.approx(2 / 3)
    assert got["hit_rate@3"] == 1
    assert got["ndcg@3"] == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3) + 1 / 2))
    assert got["map@3"] == pytest.approx((1 / 1 + 2 / 3) / 3)
    # NDCG is normalised by what is achievable: a perfect top 2 scores 1 although a third target does not fit.
    assert ranking_metrics([[4, 5, 9]], [{4, 5, 6}], ks=(2,))["ndcg@2"] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_trec_eval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    qrels, run, lists, targets = {}, {}, {}, {}
    for user in range(200):
        length = int(rng.integers(1, 60))
        items = rng.permutation(200)[:length].tolist()
        relevant = rng.permutation(200)[: int(rng.integers(1, 8))].tolist()
        if rng.random() < 0.7:
            relevant[0] = items[int(rng.integers(length))]
        relevant = list(dict.fromkeys(relevant))
        lists[user], targets[user] = items, relevant
        run[str(user)] = {f"i{item}": float(length - place) for place, item in enumerate(items)}
        qrels[str(user)] = {f"i{item}": 1 for item in relevant}
    oracles = {"recall": "R", "hit_rate": "Success", "ndcg": "nDCG", "mrr": "RR", "map": "AP"}
    got = ranking_metrics(lists, targets, ks=KS)
    for name, oracle in oracles.items():
        for k in KS:
            measure = ir_measures.parse_measure(f"{oracle}@{k}")
            expected = ir_measures.calc_aggregate([measure], qrels, run)[measure]
            assert got[f"{name}@{k}"] == pytest.approx(expected, abs=1e-9), str(measure)
    # The rank-histogram path is another program for the same numbers where there is one target.
    single = {user: relevant[0] for user, relevant in targets.items()}
    fast = evaluate_rankings(table(lists), single, KS, bootstrap=0).means
    slow = ranking_metrics(lists, single, ks=KS)
    assert fast == pytest.approx(slow, abs=1e-12)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=40))
def test_metrics_stay_in_range_and_grow_with_k(ranks: list[int]) -> None:
    got = evaluate_ranks(np.array(ranks), ks=KS, bootstrap=0).means
    for name in ("recall", "ndcg", "mrr", "map"):
        curve = [got[f"{name}@{k}"] for k in KS]
        # Sums of the same numbers in another order differ in the last bit.
        assert np.all(np.diff(curve) >= -1e-12)
        assert 0 <= curve[0] <= curve[-1] <= 1
    assert got["ndcg@1"] == got["recall@1"] == got["mrr@1"] == got["map@1"]


def test_misses_count_and_the_ceiling_is_stated() -> None:
    got = evaluate_rankings(table({1: [5, 6], 2: [7, 8]}), {1: 5, 2: 9, 3: 5}, (1, 2), bootstrap=0)
    assert got.ranks.tolist() == [1, 0, 0]  # listed, listed without the target, no list at all
    assert got.means["recall@2"] == pytest.approx(1 / 3)
    assert got.coverage == pytest.approx(1 / 3)
    assert got.retrieved["recall@1"] == 1
    assert got.per_user("ndcg@2").tolist() == [1, 0, 0]


def test_a_constant_scorer_gets_the_retrievers_numbers() -> None:
    rng = np.random.default_rng(0)
    lists = {user: rng.permutation(300)[: rng.integers(1, 50)].tolist() for user in range(500)}
    targets = {user: items[int(rng.integers(len(items)))] for user, items in lists.items()}
    retriever = Lists.from_dict(lists)
    constant = retriever.sorted_by(np.zeros(len(retriever.items)))
    assert (
        evaluate_rankings(constant, targets, bootstrap=0).means
        == evaluate_rankings(retriever, targets, bootstrap=0).means
    )


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan"), -math.inf]), max_size=8), min_size=1, max_size=6)
)
def test_sorting_is_stable_whatever_the_lengths(scores: list[list[float]]) -> None:
    lists = Lists.from_dict({user: list(range(len(row))) for user, row in enumerate(scores)})
    got = lists.sorted_by(np.array([score for row in scores for score in row], float))
    for user, row in enumerate(scores):
        key = [math.inf if math.isnan(score) else -score for score in row]
        # NaN after -inf: a broken score is worse than a bad one.
        expected = sorted(range(len(row)), key=lambda i, key=key, row=row: (math.isnan(row[i]), key[i], i))
        assert got.items[got.offsets[user] : got.offsets[user + 1]].tolist() == expected


def test_a_duplicate_earns_nothing() -> None:
    assert ranking_metrics([[3, 3, 3]], [[3, 4]], ks=(3,))["recall@3"] == 0.5
    lists = Lists.from_dict({1: [3, 5, 3, 5], 2: [3]})
    assert lists.rank_of(np.array([5, 3])).tolist() == [2, 1]
    assert lists.duplicates().tolist() == [False, False, True, True, False]


def test_pairs_as_rerank_returns_them() -> None:
    assert ranking_metrics({1: [(4, -0.1), (5, -2.0)]}, {1: 5}, ks=(1, 2))["recall@2"] == 1


@pytest.mark.parametrize(
    ("lists", "targets", "message"),
    [
        ({}, {}, "no users"),
        ({1: [2]}, {2: 2}, "no target"),
        ([[1]], [1, 2], "1 ranked lists but 2 targets"),
        ([[1]], {1: 1}, "both"),
        ([[1]], [[]], "empty set"),
    ],
)
def test_what_cannot_be_averaged_is_refused(lists: object, targets: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranking_metrics(lists, targets)  # type: ignore[arg-type]


def test_two_sources_in_one_table_are_refused() -> None:
    both = pl.concat([table({1: [2]}), table({1: [3]})])
    with pytest.raises(ValueError, match="one source"):
        evaluate_rankings(both, {1: 2})


def test_intervals_are_those_of_resampling_users() -> None:
    from scipy.stats import bootstrap

    ranks = np.random.default_rng(1).integers(0, 30, size=400)
    got = evaluate_ranks(ranks, ks=(10,), bootstrap=20_000, seed=3)
    reference = bootstrap(
        (got.per_user("ndcg@10"),), np.mean, method="percentile", n_resamples=20_000, batch=500, rng=4
    )
    assert got.intervals["ndcg@10"] == pytest.approx(tuple(reference.confidence_interval), abs=1.5e-3)
    assert evaluate_ranks(ranks, ks=(10,), seed=3).intervals == evaluate_ranks(ranks, ks=(10,), seed=3).intervals


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    truth, runs, inside = 0.3, 400, 0
    for run in range(runs):
        hits = (rng.random(300) < truth).astype(int)
        low, high = evaluate_ranks(hits, ks=(1,), bootstrap=500, seed=run).intervals["recall@1"]
        inside += low <= truth <= high
    assert 0.91 <= inside / runs <= 0.98


def test_an_interval_of_equal_users_is_a_point() -> None:
    low, high = bootstrap_interval(np.array([0, 5]), np.array([[0.0], [0.7]]), 100, 0)
    assert low == high == pytest.approx(0.7)


def test_expected_random_is_the_mean_over_all_orders() -> None:
    # Three candidates with the target, four without, five with.
    lengths, covered = np.array([3, 4, 5]), np.array([True, False, True])
    got = expected_random(lengths, covered, ks=(1, 2))
    assert got["recall@1"] == pytest.approx((1 / 3 + 0 + 1 / 5) / 3)
    assert got["ndcg@2"] == pytest.approx((1 / 3 + 1 / 5) * (1 + 1 / math.log2(3)) / 3)
    rng = np.random.default_rng(0)
    ranks = np.concatenate([rng.integers(1, 4, 40_000), np.zeros(40_000, int), rng.integers(1, 6, 40_000)])
    assert evaluate_ranks(ranks, ks=(1, 2), bootstrap=0).means == pytest.approx(got, abs=5e-3)


def test_cut_offs_beyond_the_list_are_the_whole_list() -> None:
    got = metric_values(np.zeros((2, 0), bool), np.array([1, 1]), (5,))
    assert all((values == 0).all() for values in got.values())
    assert ranking_metrics([[1, 2]], [2], ks=(50,))["recall@50"] == 1

"""What the summary says about products in 8 bits has to be true of the rankings."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from vlrank.reranking.ranker import Ranking, agreement


def ranking(items: list[int]) -> Ranking:
    return Ranking(items, np.zeros(len(items), dtype=np.float32), 1, 1, 0, 0)


def test_agreement_of_two_rankings() -> None:
    rng = np.random.default_rng(0)
    pairs, taus = [], []
    for n in (2, 7, 20, 50):
        a, b = rng.permutation(n).tolist(), rng.permutation(n).tolist()
        pairs.append((ranking(a), ranking(b)))
        taus.append(kendalltau(np.argsort(a), np.argsort(b)).statistic)
    sums = agreement([*pairs, (ranking([1, 2]), ValueError("not ranked")), (ranking([5]), ranking([5]))])
    assert sums["compared"] == 5
    assert sums["tau_millionths"] / 1e6 == pytest.approx(sum(taus) + 1, abs=1e-5)
    assert sums["in_ten"] == 2 + 7 + 10 + 10 + 1
    same = sum(a.item_ids[0] == b.item_ids[0] for a, b in pairs) + 1
    assert sums["same_first"] == same
    assert sums["common_in_ten"] == sum(len({*a.item_ids[:10]} & {*b.item_ids[:10]}) for a, b in pairs) + 1

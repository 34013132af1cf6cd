"""Standardised scores: what ensembles and fusion compare users by."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlrank.data.lists import Lists, mean_spread


@given(st.lists(st.lists(st.floats(-50, 50, width=32), max_size=6), min_size=1, max_size=8))
def test_standardised_scores_are_those_of_each_list_alone(scores: list[list[float]]) -> None:
    lists = Lists.from_dict({user: range(len(row)) for user, row in enumerate(scores)})
    flat = np.array([value for row in scores for value in row])
    z, spreads = Lists(lists.users, lists.offsets, lists.items, flat).standardised()
    for row, start, spread in zip(scores, lists.offsets, spreads, strict=False):
        own = np.asarray(row, dtype=np.float64)
        if spread == 0:
            assert not len(own) or own.std() <= 1.1e-6 * max(1, np.abs(own).max())
            assert not z[start : start + len(own)].any()
        else:
            np.testing.assert_allclose(spread, own.std(), rtol=1e-6)
            np.testing.assert_allclose(z[start : start + len(own)], (own - own.mean()) / own.std(), atol=1e-6)


def test_a_score_that_is_no_number_counts_in_neither() -> None:
    lists = Lists(np.array([1]), np.array([0, 3]), np.array([4, 5, 6]), np.array([1.0, np.nan, 3.0]))
    z, spreads = lists.standardised()
    np.testing.assert_array_equal(z, [-1, np.nan, 1])
    assert spreads.tolist() == [1]


def test_the_mean_spread_is_that_of_lists_with_an_opinion() -> None:
    assert mean_spread(np.array([0.0, 2.0, 4.0])) == 3
    assert mean_spread(np.zeros(2)) == 1

"""Who is a negative decides what a metric means: every stage must draw the same way."""

import math
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrank.prompting.negatives import draw_negatives, sampled_candidates


@settings(max_examples=100)
@given(
    size=st.integers(2, 300), taken=st.sets(st.integers(1, 300), max_size=60), n=st.integers(0, 40), seed=st.integers(0)
)
def test_drawing_outside(size: int, taken: set[int], n: int, seed: int) -> None:
    items = np.arange(1, size + 1)
    free = set(items.tolist()) - taken
    if len(free) < n:
        return
    drawn = draw_negatives(np.random.default_rng(seed), items, taken, n)
    assert len(drawn) == len(set(drawn)) == n
    assert set(drawn) <= free


def test_rejection_and_listing_draw_alike() -> None:
    # 20 items are listed, 400 are drawn by rejection; both give every free item the same chance.
    for size in (20, 400):
        rng = np.random.default_rng(0)
        counts = Counter(item for _ in range(4000) for item in draw_negatives(rng, np.arange(1, size + 1), {1, 2}, 3))
        expected = 4000 * 3 / (size - 2)
        assert all(abs(counts[i] - expected) < 6 * math.sqrt(expected) for i in range(3, size + 1))
        assert not counts[1]


def test_sampled_candidates_are_the_target_among_what_the_user_does_not_have_yet() -> None:
    items = np.arange(1, 101)

    def sampled(user: int, history: list[int], target: int = 7, items: np.ndarray = items, seed: int = 0) -> list[int]:
        candidates, place = sampled_candidates(user, history, target, items, 19, seed)
        assert candidates[place - 1] == target
        return list(candidates)

    first = sampled(5, [1, 2, 3])
    assert first == sampled(5, [1, 2, 3])
    assert len(set(first)) == 20
    assert not {1, 2, 3} & set(first)
    assert first != sampled(6, [1, 2, 3])
    assert sorted(sampled(1, [], 2, np.arange(1, 4))) == [1, 2, 3]
    large = np.arange(1, 100_001)  # drawn another way
    drawn = [sampled(user, [8], items=large, seed=1) for user in range(50)]
    assert all(len(set(row)) == 20 and 8 not in row for row in drawn)
    places = [sampled(user, []).index(7) for user in range(2000)]
    assert np.bincount(places, minlength=20).min() > 60  # about 100 at each place: the target hides everywhere


def test_draws_never_change() -> None:
    """Finished rankings would be made again, and numbers of one version not compare with the next one's."""
    assert sampled_candidates(3, [5, 9], 2, np.arange(1, 31), 4, seed=0) == ((12, 24, 11, 2, 20), 4)
    assert sampled_candidates(3, [5, 9], 2, np.arange(1, 3001), 4, seed=0) == ((1156, 2377, 1077, 2, 2312), 4)

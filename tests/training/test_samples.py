"""What a user would lose with wrong samples: a metric that looks good because the answer leaks into the question."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrank.data.items import ItemMeta
from vlrank.errors import UserError
from vlrank.prompting.modes import mode_spec
from vlrank.training.samples import (
    TrainingSamples,
    keep_usable,
    stratified_users,
    usable_items,
    validation_samples,
)

ITEMS = np.arange(1, 101)
SEQUENCES = {user: [(user * 7 + step * 13) % 100 + 1 for step in range(2 + user % 6)] for user in range(1, 41)}


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), epoch=st.integers(0, 50), negatives=st.integers(1, 60), data=st.data())
def test_every_sample_is_a_fair_question(seed: int, epoch: int, negatives: int, data: st.DataObject) -> None:
    samples = TrainingSamples(SEQUENCES, ITEMS, negatives=negatives, seed=seed)
    sample = samples.sample(epoch, data.draw(st.integers(0, len(samples) - 1)))
    items = SEQUENCES[sample.user_id]
    target = sample.candidates[sample.label - 1]
    split = len(sample.history)
    assert split >= 1
    assert list(sample.history) == items[:split]
    assert target == items[split]
    others = [item for item in sample.candidates if item != target]
    assert len(others) == negatives
    assert len(set(others)) == negatives, "a negative repeats"
    assert not set(others) & set(items), "a training item of the user as a negative"
    assert samples.sample(epoch, list(samples.users).index(sample.user_id)) == sample, "not a pure function"


def test_validation_and_test_items_occur_as_negatives() -> None:
    # User 1 took 1, 2, 3 (training), then 4 (validation) and 5 (test). If 4 and 5 never were negatives, "never seen as
    # a negative" would point at the answer.
    samples = TrainingSamples({1: [1, 2, 3]}, np.arange(1, 31), negatives=19, seed=0)
    seen = Counter(item for epoch in range(200) for item in samples.sample(epoch, 0).candidates)
    others = [seen[item] for item in range(4, 31)]
    assert seen[4] > 0
    assert seen[5] > 0
    # 19 of 27 items each time: 140.7 expected, standard deviation 6.5.
    assert all(abs(count - 200 * 19 / 27) < 5 * 6.5 for count in others)


def test_target_positions_are_uniform() -> None:
    samples = TrainingSamples(SEQUENCES, ITEMS, negatives=9, seed=3)
    counts = Counter(samples.sample(epoch, i).label for epoch in range(100) for i in range(len(samples)))
    total = sum(counts.values())
    expected = total / 10
    chi_square = sum((counts[label] - expected) ** 2 / expected for label in range(1, 11))
    assert chi_square < 33.7  # 9 degrees of freedom, p = 1e-4
    assert set(counts) == set(range(1, 11))


def test_split_points_are_uniform_and_change_with_the_epoch() -> None:
    samples = TrainingSamples({1: list(range(1, 7))}, ITEMS, seed=0)
    counts = Counter(len(samples.sample(epoch, 0).history) for epoch in range(1000))
    assert set(counts) == {1, 2, 3, 4, 5}
    assert all(abs(count - 200) < 5 * math.sqrt(1000 * 0.2 * 0.8) for count in counts.values())


def test_negatives_and_order_change_with_the_epoch_and_the_seed() -> None:
    samples = TrainingSamples(SEQUENCES, ITEMS, seed=0)
    assert samples.sample(0, 0).candidates != samples.sample(1, 0).candidates
    assert samples.sample(0, 0).candidates != TrainingSamples(SEQUENCES, ITEMS, seed=1).sample(0, 0).candidates
    assert samples.order(0).tolist() != samples.order(1).tolist()
    assert sorted(samples.order(0).tolist()) == list(range(len(samples)))


def test_every_prefix_asks_each_item_once() -> None:
    samples = TrainingSamples({5: [1, 2, 3, 4], 6: [7, 8]}, ITEMS, per_user="every_prefix", negatives=2, seed=0)
    asked = [(samples.sample(0, i).user_id, samples.sample(0, i).history) for i in range(len(samples))]
    assert asked == [(5, (1,)), (5, (1, 2)), (5, (1, 2, 3)), (6, (7,))]


def test_several_samples_of_a_user_have_different_targets() -> None:
    samples = TrainingSamples({1: [1, 2, 3, 4, 5], 2: [9, 8]}, ITEMS, per_user=3, negatives=2, seed=0)
    assert len(samples) == 3 + 1  # user 2 has one split point only
    for epoch in range(20):
        assert len({samples.sample(epoch, i).history for i in range(3)}) == 3


def test_users_with_one_item_are_counted_not_trained_on() -> None:
    samples = TrainingSamples({1: [1], 2: [2, 3]}, ITEMS, negatives=3, seed=0)
    assert (list(samples.users), samples.skipped_users) == ([2], 1)
    with pytest.raises(UserError, match="two training items"):
        TrainingSamples({1: [1]}, ITEMS, seed=0)


def test_too_small_a_catalogue_names_the_user_and_the_key() -> None:
    with pytest.raises(UserError, match="user 1 leaves 3 items to draw 19") as caught:
        TrainingSamples({1: [1, 2]}, np.arange(1, 6), negatives=19, seed=0)
    assert "negatives" in str(caught.value.remedy)


# ---- retrieval ------------------------------------------------------------------------------------------------------


def test_retrieved_negatives_come_first_and_an_inserted_target_is_flagged() -> None:
    pools = {1: [50, 51, 52, 53, 2]}  # 2 is a training item: never a negative
    samples = TrainingSamples({1: [1, 2], 3: [4, 5]}, ITEMS, negatives=4, seed=0, pools=pools)
    own = samples.sample(0, 0)
    assert set(own.candidates) == {50, 51, 52, 53, 2}
    assert own.inserted is False  # the retriever did list the target, 2
    assert samples.sample(0, 1).inserted is False  # no retriever, nothing to give it away
    missed = TrainingSamples({1: [1, 2]}, ITEMS, negatives=4, seed=0, pools={1: [50, 51, 52, 53]}).sample(0, 0)
    assert missed.inserted is True


def test_a_short_list_is_filled_up_with_random_items() -> None:
    sample = TrainingSamples({1: [1, 2]}, ITEMS, negatives=10, seed=0, pools={1: [50, 51]}).sample(0, 0)
    assert {50, 51} < set(sample.candidates)
    assert len(set(sample.candidates)) == 11


def test_the_share_of_random_negatives_moves_over_the_epochs() -> None:
    pools = {1: list(range(40, 80))}
    samples = TrainingSamples({1: [1, 2]}, ITEMS, negatives=20, seed=0, pools=pools, random_share=(1.0, 0.0), epochs=5)
    assert [samples.random_share(epoch) for epoch in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert samples.random_share(9) == 0.0
    hard = [len(set(samples.sample(epoch, 0).candidates) & set(pools[1])) for epoch in (0, 4)]
    assert hard[1] == 20
    assert hard[0] < 20


def test_negatives_by_popularity_follow_the_training_interactions() -> None:
    # Items 1..5 were bought 40 times each, the other 95 never: 41 chances to 1.
    sequences = {user: [1 + user % 5, 1 + (user + 1) % 5] for user in range(100)} | {999: [99, 100]}
    samples = TrainingSamples(sequences, ITEMS, negatives=1, seed=0, sampling="popularity", per_user=1)
    place = list(samples.users).index(999)
    drawn = [next(iter(set(s.candidates) - {100})) for s in (samples.sample(epoch, place) for epoch in range(4000))]
    share = sum(item <= 5 for item in drawn) / len(drawn)
    assert abs(share - 5 * 41 / (5 * 41 + 93)) < 0.04
    assert len(set(drawn)) > 60, "items that nobody bought occur too"


# ---- validation -----------------------------------------------------------------------------------------------------


def test_validation_never_changes_and_ranks_the_target_among_outsiders() -> None:
    histories = {user: (items, 100 - user) for user, items in SEQUENCES.items()}
    first = validation_samples(histories, ITEMS, users=20, seed=4)
    assert first == validation_samples(histories, ITEMS, users=20, seed=4)
    assert first != validation_samples(histories, ITEMS, users=20, seed=5)
    for sample in first:
        target = 100 - sample.user_id
        assert sample.candidates[sample.label - 1] == target
        assert len(set(sample.candidates)) == 20
        assert not (set(sample.candidates) - {target}) & set(SEQUENCES[sample.user_id])


def test_validation_with_a_retriever_counts_what_it_missed() -> None:
    samples = validation_samples(
        {1: ([1], 9), 2: ([1], 8)}, ITEMS, negatives=3, pools={1: [5, 9, 6, 7, 4], 2: [5, 6, 7, 4, 8]}
    )
    assert [sample.label > 0 for sample in samples] == [True, False]  # 8 is fifth, only four are shown
    assert set(samples[0].candidates) == {5, 9, 6, 7}
    assert set(samples[1].candidates) == {5, 6, 7, 4}


def test_stratified_users_come_from_all_quarters_of_history_length() -> None:
    lengths = {user: user for user in range(1, 401)}
    chosen = stratified_users(lengths, 40, seed=0)
    assert len(set(chosen)) == 40
    assert Counter((user - 1) // 100 for user in chosen) == dict.fromkeys(range(4), 10)
    assert stratified_users(lengths, 1000, seed=0) == list(range(1, 401))
    assert len(stratified_users(lengths, 7, seed=0)) == 7


# ---- items without what the mode shows ------------------------------------------------------------------------------


def meta(n: int, captioned: int) -> dict[int, ItemMeta]:
    return {i: {"text": f"item {i}", "caption": "a mug" if i <= captioned else None} for i in range(1, n + 1)}


def test_items_without_a_caption_are_left_out_and_counted() -> None:
    usable = usable_items(mode_spec("caption"), meta(10, 9), "drop")
    assert (usable.item_ids.tolist(), usable.missing, usable.total) == (list(range(1, 10)), 1, 10)
    assert keep_usable({1: [10, 1, 2], 2: [10]}, usable) == {1: [1, 2]}


def test_or_shown_by_their_text_alone() -> None:
    usable = usable_items(mode_spec("caption"), meta(10, 9), "text")
    assert (len(usable.item_ids), usable.missing) == (10, 1)


@pytest.mark.parametrize("policy", ["drop", "text"])
def test_too_many_missing_is_an_error_that_names_the_command(policy: str) -> None:
    with pytest.raises(UserError, match="3 of 10 items have no caption") as caught:
        usable_items(mode_spec("caption"), meta(10, 7), policy)  # type: ignore[arg-type]
    assert "vlrank generate DATASET --what caption" in str(caught.value.remedy)

"""The global batch is the same however many workers share it and however their rows are packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlrank.config import RankingConfig
from vlrank.data.dataset import Dataset
from vlrank.prompting.encoding import Encoder
from vlrank.prompting.modes import mode_spec
from vlrank.training.batches import StepLoader, Steps
from vlrank.training.packing import batches, pack, row_length, share
from vlrank.training.samples import TrainingSamples


@pytest.fixture(scope="module")
def encoder(tiny_text_model: Path) -> Encoder:
    ranking = RankingConfig(max_history=3, max_item_chars=40)
    return Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), ranking)


def make_steps(shop: Dataset, encoder: Encoder, **changes: Any) -> Steps:
    meta = shop.item_meta()
    samples = TrainingSamples(shop.train_sequences(), np.array(sorted(meta)), negatives=5, seed=0)
    form: dict[str, Any] = {"batch_size": 12, "micro_batch_size": 5, "pack_tokens": None, "rank": 0, "world": 1}
    form |= {"vision": False, "pad_id": 0, "pictures": None}
    return Steps(samples, meta, encoder, **(form | changes))


def learned(steps: Steps, number: int) -> list[tuple[int, ...]]:
    """The answers of a step, as sorted multiset of (token before, target) pairs."""
    pairs = []
    for batch in steps[number].micro:
        ids = batch["input_ids"].flatten()
        pairs += list(zip(ids[batch["answer_index"]].tolist(), batch["targets"].tolist(), strict=True))
    return sorted(pairs)


@pytest.mark.parametrize("pack_tokens", [None, 600])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_workers_share_a_step_out_without_losing_or_repeating(
    shop: Dataset, encoder: Encoder, world: int, pack_tokens: int | None
) -> None:
    whole = make_steps(shop, encoder)
    for number in (0, whole.per_epoch - 1, whole.per_epoch + 1):
        parts: list[tuple[int, ...]] = []
        for rank in range(world):
            parts += learned(make_steps(shop, encoder, rank=rank, world=world, pack_tokens=pack_tokens), number)
        assert sorted(parts) == learned(whole, number)


def test_an_epoch_learns_every_sample_once(shop: Dataset, encoder: Encoder) -> None:
    steps = make_steps(shop, encoder)
    assert sum(len(steps.drawn(number)) for number in range(steps.per_epoch)) == len(steps.samples)
    users = [sample.user_id for number in range(steps.per_epoch) for sample in steps.drawn(number)]
    assert sorted(users) == list(steps.samples.users)


def test_a_rank_without_samples_stands_in(shop: Dataset, encoder: Encoder) -> None:
    last = make_steps(shop, encoder, batch_size=79, rank=1, world=2)[1]  # 80 users: the second step has one sample
    assert (last.samples, last.answers) == (0, 0)
    assert len(last.micro) == 1  # something to run, so that the other rank does not wait for ever


def test_a_prompt_that_is_too_long_is_set_aside_with_its_reason(shop: Dataset, tiny_text_model: Path) -> None:
    ranking = RankingConfig(max_prompt_tokens=64)
    short = Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), ranking)
    step = make_steps(shop, short)[0]
    assert step.samples == 0
    assert len(step.bad) == 12
    assert step.bad[0][1] == "PromptTooLong"


def test_packed_rows_hold_their_budget_and_micro_batches_their_size(shop: Dataset, encoder: Encoder) -> None:
    packed = make_steps(shop, encoder, pack_tokens=700)[0]
    assert {tuple(batch["input_ids"].shape) for batch in packed.micro} == {(1, 700)}
    assert packed.tokens + packed.padding == 700 * len(packed.micro)
    padded = make_steps(shop, encoder)[0]
    assert [batch["input_ids"].shape[0] for batch in padded.micro] == [5, 5, 2]


def test_a_step_with_a_longer_prompt_gets_longer_rows(shop: Dataset, encoder: Encoder) -> None:
    usual = make_steps(shop, encoder)
    longest = max(len(row) for number in range(3) for row in map(usual._row, usual.drawn(number)))
    step = make_steps(shop, encoder, pack_tokens=longest - 1)
    shapes = {tuple(batch["input_ids"].shape) for number in range(usual.per_epoch) for batch in step[number].micro}
    assert (1, longest - 1) in shapes
    assert len(shapes) == 2, "a third shape would be compiled again"
    for number in range(3):
        assert learned(step, number) == learned(usual, number)


@pytest.mark.parametrize("batch_size", [4, 8, 32, 64, 200])
@pytest.mark.parametrize("spread", [0.0, 120.0, 400.0])
def test_rows_are_as_long_as_steps_fill_well(batch_size: int, spread: float) -> None:
    # 942 tokens on average, as prompts on Amazon Beauty are; 16,384 for every step left half of 8 prompts' row empty.
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(942, spread, size=(300, batch_size)), 200, 3000).astype(int)
    row = row_length(lengths[:20].flatten().tolist(), batch_size, limit=16384)
    assert row % 128 == 0
    assert row <= 16384  # what the memory plan allows
    rows = sum(len(pack(step.tolist(), max(row, int(step.max())))) for step in lengths)
    padding = 1 - lengths.sum() / (rows * row)
    # Two standard deviations of a step, and half a prompt in each of several rows.
    assert padding < 2.2 * spread / (942 * batch_size**0.5) + 0.11


def test_the_loader_follows_the_epoch_and_can_skip_into_it(shop: Dataset, encoder: Encoder) -> None:
    from accelerate.data_loader import skip_first_batches

    steps = make_steps(shop, encoder)
    loader = StepLoader(steps, workers=0, pin_memory=False)
    loader.set_epoch(1)
    first = [batch["micro"][0]["input_ids"] for batch in loader]
    assert len(first) == steps.per_epoch
    torch.testing.assert_close(first[0], steps[steps.per_epoch].micro[0]["input_ids"])
    skipped = skip_first_batches(loader, 2)  # how the Trainer resumes within an epoch
    skipped.batch_sampler.batch_sampler.set_epoch(1)
    torch.testing.assert_close(next(iter(skipped))["micro"][0]["input_ids"], first[2])


# ---- packing --------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 100), max_size=60), budget=st.integers(100, 300))
def test_packing_keeps_everything_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = pack(lengths, budget)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in chosen) <= budget for chosen in bins)
    # First-fit: no two bins could have been one, except for one that is at most half full.
    assert sum(2 * sum(lengths[i] for i in chosen) <= budget for chosen in bins) <= 1


def test_packing_refuses_what_can_never_fit() -> None:
    with pytest.raises(ValueError, match="101 tokens"):
        pack([50, 101], 100)


@given(lengths=st.lists(st.integers(1, 100), max_size=60), size=st.integers(1, 9))
def test_batches_hold_everything_and_sort_by_length(lengths: list[int], size: int) -> None:
    chosen = batches(lengths, size)
    assert sorted(i for batch in chosen for i in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= size for batch in chosen)
    flat = [lengths[i] for batch in chosen for i in batch]
    assert flat == sorted(flat, reverse=True)


@given(weights=st.lists(st.floats(0, 1000), max_size=50), world=st.integers(1, 8))
def test_shares_are_a_partition_of_equal_sizes(weights: list[float], world: int) -> None:
    shares = [share(weights, rank, world) for rank in range(world)]
    assert sorted(i for own in shares for i in own) == list(range(len(weights)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1

"""Rivals must be as strong as their name says, see no target, and rank the very same lists."""

import numpy as np
import pytest

from vlrank.data.dataset import Dataset
from vlrank.data.lists import Lists
from vlrank.errors import UserError
from vlrank.retrieval import baselines
from vlrank.retrieval.baselines import BASELINES, Evidence


def random_lists(dataset: Dataset, split: str = "test", size: int = 20) -> tuple[Lists, dict[int, int]]:
    rng = np.random.default_rng(0)
    lists, targets = {}, {}
    for user, (history, target) in dataset.histories(split).items():  # type: ignore[arg-type]
        others = np.setdiff1d(np.arange(1, dataset.n_items + 1), [*history, target])
        lists[user] = rng.permutation([target, *rng.choice(others, size - 1, replace=False)]).tolist()
        targets[user] = target
    return Lists.from_dict(lists), targets


@pytest.mark.parametrize("name", [name for name in BASELINES if name not in ("embedding", "pointwise")])
def test_every_rival_permutes_the_very_same_lists(world: Dataset, name: str) -> None:
    lists, _ = random_lists(world)
    ranked = baselines.rank(name, Evidence.of(world, "test"), lists)
    assert (ranked.users == lists.users).all()
    for start, stop in zip(lists.offsets, lists.offsets[1:], strict=False):
        assert sorted(ranked.items[start:stop]) == sorted(lists.items[start:stop])
    again = baselines.rank(name, Evidence.of(world, "test"), lists)
    assert (again.items == ranked.items).all()


def test_identity_is_the_retriever_and_random_is_not(world: Dataset) -> None:
    lists, _ = random_lists(world)
    evidence = Evidence.of(world, "test")
    assert (baselines.rank("identity", evidence, lists).items == lists.items).all()
    assert (baselines.rank("random", evidence, lists).items != lists.items).any()


@pytest.mark.parametrize("name", ["item_knn", "als", "bm25"])
def test_rivals_that_know_the_history_find_the_right_half(world: Dataset, name: str) -> None:
    # Users stay in one half of the shop: whoever reads histories puts items of the user's half on top.
    lists, _ = random_lists(world)
    evidence = Evidence.of(world, "test")
    ranked = baselines.rank(name, evidence, lists)
    own = np.array([evidence.histories[int(user)][0] % 2 for user in ranked.users])
    top = ranked.head(5)
    assert (top.items.reshape(-1, 5) % 2 == own[:, None]).mean() > 0.8


def test_popularity_counts_the_training_part_only(world: Dataset) -> None:
    counts = Evidence.of(world, "test").popularity
    expected = np.zeros(world.n_items + 1, int)
    for items in world.sequences()["item_ids"].to_list():
        for item in items[:-2]:
            expected[item] += 1
    assert counts.tolist() == expected.tolist()


def test_item_knn_is_the_cosine_by_hand() -> None:
    # Items 1 and 2 were had together once; item 1 by two users, item 2 by one: cosine 1 / sqrt(2).
    evidence = Evidence(n_items=3, train={1: [1, 2], 2: [1, 3]}, histories={1: [1]})
    scores = baselines.item_knn(evidence, Lists.from_dict({1: [2, 3, 1]}))
    assert scores.tolist() == pytest.approx([1 / np.sqrt(2), 1 / np.sqrt(2), 1])


def test_bm25_is_that_of_bm25s(world: Dataset) -> None:
    import bm25s

    evidence = Evidence.of(world, "test", max_history=3)
    user = next(iter(evidence.histories))
    everything = Lists.from_dict({user: list(range(1, world.n_items + 1))})
    tokens = bm25s.tokenize(list(evidence.texts), stopwords="en", show_progress=False)
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(tokens, show_progress=False)
    query = " ".join(evidence.texts[item - 1] for item in evidence.histories[user][-3:])
    words = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
    assert baselines.bm25(evidence, everything) == pytest.approx(index.get_scores(words), abs=1e-4)


def test_bm25_without_any_text_keeps_the_retrievers_order() -> None:
    evidence = Evidence(n_items=3, train={}, histories={1: [1]}, texts=["", "", ""])
    assert baselines.rank("bm25", evidence, Lists.from_dict({1: [3, 2]})).items.tolist() == [3, 2]


def test_users_without_history_and_empty_lists_are_ranked(world: Dataset) -> None:
    evidence = Evidence(n_items=60, train=world.train_sequences(), histories={}, texts=[""] * 60)
    for name in ("popularity", "item_knn", "als", "bm25"):
        assert len(baselines.rank(name, evidence, Lists.from_dict({1: [3, 2], 2: []})).items) == 2


@pytest.mark.parametrize("name", ["popularity", "item_knn", "als"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_retrieval_excludes_exactly_the_history(world: Dataset, name: str, split: str) -> None:
    evidence = Evidence.of(world, split)  # type: ignore[arg-type]
    users = np.fromiter(evidence.histories, np.int64)
    lists = baselines.retrieve(name, evidence, users, top_k=60)
    for row, user in enumerate(users):
        listed = lists.items[lists.offsets[row] : lists.offsets[row + 1]].tolist()
        # All items but the history: with room for everything nothing else may be missing.
        assert sorted(listed) == sorted(set(range(1, 61)) - set(evidence.histories[int(user)]))


@pytest.mark.parametrize("name", ["popularity", "item_knn", "als"])
def test_the_top_is_the_head_of_the_full_order(world: Dataset, name: str) -> None:
    # The short list is found by partition; it must be what sorting everything gives, ties (many here) included.
    evidence = Evidence.of(world, "test")
    users = np.fromiter(evidence.histories, np.int64)
    full = baselines.retrieve(name, evidence, users, top_k=60)
    short = baselines.retrieve(name, evidence, users, top_k=7)
    assert (short.items == full.head(7).items).all()
    steps = np.diff(short.scores.reshape(-1, 7), axis=1)  # type: ignore[union-attr]
    assert (steps <= 0).all()


def test_rivals_with_a_model_need_it(world: Dataset) -> None:
    lists, _ = random_lists(world)
    with pytest.raises(UserError, match="baseline needs"):
        baselines.rank("embedding", Evidence.of(world, "test"), lists)
    with pytest.raises(UserError, match="baseline needs"):
        baselines.rank("pointwise", Evidence.of(world, "test"), lists)
    with pytest.raises(UserError, match="unknown baseline 'itemknn'"):
        baselines.rank("itemknn", Evidence.of(world, "test"), lists)

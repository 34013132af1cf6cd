"""Mixed lists: known scores give known orders, and weights are learned from validation users alone."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from vlrank.config import RetrieveConfig
from vlrank.data.dataset import Dataset
from vlrank.data.schemas import CANDIDATES
from vlrank.data.tables import empty_frame
from vlrank.errors import UserError
from vlrank.retrieval.ensemble import Union, best_weights
from vlrank.retrieval.retrieve import dry_run, run


def table(rows: list[tuple[str, int, list[int], list[float]]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=empty_frame(CANDIDATES).schema, orient="row")


@pytest.fixture
def data(world: Dataset, tmp_path: Path) -> Dataset:
    shutil.copytree(world.path, tmp_path / "data")
    return Dataset.open(tmp_path / "data")


def test_scores_are_standardised_and_what_a_list_lacks_counts_as_its_last() -> None:
    a = table([("val", 1, [1, 2], [3.0, 1.0])])  # z: 1, -1
    b = table([("val", 1, [2, 3], [500.0, 100.0])])  # z: 1, -1, whatever the scale
    union = Union.of([a, b], "val")
    assert union.lists.items.tolist() == [1, 2, 3]
    np.testing.assert_allclose(union.scores, [[1, -1], [-1, 1], [-1, -1]])
    mixed = union.mixed(np.array([0.4, 0.6]))
    assert mixed.items.tolist() == [2, 1, 3]
    np.testing.assert_allclose(np.asarray(mixed.scores), [0.2, -0.2, -1.0])


def test_the_mix_is_as_sure_as_its_tables() -> None:
    # User 1's scores lie three times as far apart as user 2's in table a: 1.5 and 0.5 of the mean; alike in b.
    a = table([("val", 1, [1, 2], [6.0, 0.0]), ("test", 2, [1, 2], [2.0, 0.0])])
    b = table([("val", 1, [1, 2], [1.0, 0.0]), ("test", 2, [1, 2], [1.0, 0.0])])
    weights = np.array([0.5, 0.5])
    np.testing.assert_allclose(np.asarray(Union.of([a, b], "val").mixed(weights).scores), [1.25, -1.25])
    np.testing.assert_allclose(np.asarray(Union.of([a, b], "test").mixed(weights).scores), [0.75, -0.75])


def test_a_table_without_a_list_or_without_an_opinion_changes_nothing() -> None:
    a = table([("val", 1, [5, 4], [2.0, 1.0]), ("val", 2, [6, 7], [1.0, 0.5])])
    b = table([("val", 1, [4, 5], [0.3, 0.3]), ("val", 2, [], [])])
    mixed = Union.of([a, b], "val").mixed(np.array([0.1, 0.9]))
    assert mixed.items.tolist() == [5, 4, 6, 7]
    broken = table([("val", 1, [4, 5], [float("nan"), 1.0])])
    assert np.isfinite(Union.of([a, broken], "val").scores).all()


def test_the_weights_are_those_that_find_validation_targets() -> None:
    # `good` puts the target first and `bad` last; where both count the same it is in the middle.
    rng = np.random.default_rng(0)
    good, bad, targets = [], [], {}
    for user in range(1, 41):
        items = rng.permutation(40)[:30] + 1
        targets[user] = int(items[0])
        good.append(("val", user, items.tolist(), np.linspace(1, 0, 30).tolist()))
        bad.append(("val", user, items[::-1].tolist(), np.linspace(9, 0, 30).tolist()))
    weights, gain = best_weights(Union.of([table(good), table(bad)], "val"), targets)
    assert weights[0] > 0.5
    assert gain == pytest.approx(1.0)
    # Rank 1 of 30 with good alone, rank 30 with bad alone: NDCG@10 1 and 0.
    union = Union.of([table(good), table(bad)], "val")
    assert union.ndcg(np.array([1.0, 0.0]), targets) == pytest.approx(1)
    assert union.ndcg(np.array([0.0, 1.0]), targets) == 0
    assert best_weights(union, dict.fromkeys(targets, 99))[0].tolist() == [0.5, 0.5]  # nothing to choose by: even
    # A target that no list holds is a miss of its user.
    assert union.ndcg(np.array([1.0, 0.0]), targets | {100: 1}) == pytest.approx(40 / 41)


def test_the_command_mixes_tables_and_says_how(data: Dataset) -> None:
    for method in ("item_knn", "popularity", "als"):
        run(RetrieveConfig(dataset=data.path, method=method, top_k=20))
    summary = run(RetrieveConfig(dataset=data.path, method="ensemble:item_knn,popularity", top_k=15))
    assert "item_knn" in str(summary.lines["weights"])
    mixed = data.candidates("ensemble-item_knn-popularity")
    assert mixed["item_ids"].list.len().max() == 15
    assert set(mixed["split"]) == {"val", "test"}
    for split in ("val", "test"):
        histories = data.histories(split)  # type: ignore[arg-type]
        rows = mixed.filter(pl.col("split") == split)
        assert len(rows) == 80
        assert not any(
            set(items) & set(histories[user][0]) for user, items in rows.select("user_id", "item_ids").iter_rows()
        )
    three = run(RetrieveConfig(dataset=data.path, method="ensemble:item_knn,popularity,als", name="three"))
    assert three.counts["users"] == 160


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("ensemble:popularity", "two to four different tables"),
        ("ensemble:", "two to four different tables"),
        ("ensemble:popularity,popularity", "two to four different tables"),
        ("ensemble:popularity,sasrec", "no candidates sasrec"),
        ("ensemble:popularity,half", "no lists of the split val"),
    ],
)
def test_what_cannot_be_mixed_is_refused_at_once(data: Dataset, method: str, message: str) -> None:
    run(RetrieveConfig(dataset=data.path, method="popularity", top_k=5))
    data.write_candidates("half", data.candidates("popularity").filter(pl.col("split") == "test"))
    for act in (run, dry_run):
        with pytest.raises(UserError, match=message):
            act(RetrieveConfig(dataset=data.path, method=method))
    assert data.candidate_names() == ["half", "popularity"]


def test_an_ensemble_does_not_replace_its_own_part(data: Dataset) -> None:
    for method in ("item_knn", "popularity"):
        run(RetrieveConfig(dataset=data.path, method=method, top_k=5))
    with pytest.raises(UserError, match="replace one of its own"):
        run(RetrieveConfig(dataset=data.path, method="ensemble:item_knn,popularity", name="popularity"))

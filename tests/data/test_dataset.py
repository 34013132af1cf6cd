"""The dataset folder: what every other stage reads, and that it appears whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrank.data.dataset import Dataset, DatasetWriter, load_item_meta, write_dataset
from vlrank.data.tables import atomic_write_json
from vlrank.errors import UserError


def make_items(n: int, **changes: Any) -> list[dict[str, Any]]:
    row = {"brand": None, "categories": [], "description": None, "image_path": None, "image_url": None}
    return [
        {"item_id": i, "source_id": f"i{i}", "text": f"text {i}", "title": f"title {i}", **row, **changes}
        for i in range(1, n + 1)
    ]


def make_sequences(histories: dict[int, tuple[list[int], list[int]]]) -> list[dict[str, Any]]:
    return [
        {"user_id": user, "source_user": f"u{user}", "item_ids": items, "timestamps": times}
        for user, (items, times) in histories.items()
    ]


HISTORIES = {1: ([1, 2, 3, 4], [10, 20, 30, 40]), 2: ([5, 1], [5, 50]), 3: ([2], [7]), 4: ([3, 4, 5], [1, 2, 3])}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path / "ds", items=make_items(5), sequences=make_sequences(HISTORIES), options={})


def test_leave_one_out_keeps_the_last_two_for_validation_and_test(dataset: Dataset) -> None:
    assert dataset.train_sequences() == {1: [1, 2], 4: [3]}
    # User 2 has two interactions: nothing remains to predict the validation item from. User 3 has one: no history.
    assert dataset.histories("val") == {1: ([1, 2], 3), 4: ([3], 4)}
    assert dataset.histories("test") == {1: ([1, 2, 3], 4), 2: ([5], 1), 4: ([3, 4], 5)}
    assert dataset.count_targets("test") == 3


def test_temporal_split_predicts_the_first_interaction_of_each_period(tmp_path: Path) -> None:
    split = {"method": "temporal", "val_from": 20, "test_from": 40}
    dataset = write_dataset(
        tmp_path / "ds", items=make_items(5), sequences=make_sequences(HISTORIES), options={}, split=split
    )
    assert dataset.train_sequences() == {1: [1], 2: [5], 3: [2], 4: [3, 4, 5]}
    assert dataset.histories("val") == {1: ([1], 2)}  # 30 lies in the period too, but 2 is the first
    assert dataset.histories("test") == {1: ([1, 2, 3], 4), 2: ([5], 1)}


@settings(max_examples=30, deadline=None)
@given(
    times=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=8).map(sorted), min_size=1, max_size=8),
    cuts=st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted),
)
def test_no_history_or_training_item_is_later_than_any_target_of_its_period(
    tmp_path_factory: pytest.TempPathFactory, times: list[list[int]], cuts: list[int]
) -> None:
    """Item ids are numbered so that each interaction is its own item: an id tells its time."""
    ids = iter(range(1, 1000))
    histories = {user: ([next(ids) for _ in row], row) for user, row in enumerate(times, start=1)}
    when = {item: t for items, row in histories.values() for item, t in zip(items, row, strict=True)}
    dataset = write_dataset(
        tmp_path_factory.mktemp("t") / "ds",
        items=make_items(len(when)),
        sequences=make_sequences(histories),
        options={},
        split={"method": "temporal", "val_from": cuts[0], "test_from": cuts[1]},
    )
    trained = [when[item] for items in dataset.train_sequences().values() for item in items]
    assert all(t < cuts[0] for t in trained)
    for split, low, high in (("val", cuts[0], cuts[1]), ("test", cuts[1], 21)):
        for user, (history, target) in dataset.histories(split).items():  # type: ignore[arg-type]
            items = histories[user][0]
            assert low <= when[target] < high
            assert all(when[item] < low for item in history)
            assert items[: len(history) + 1] == [*history, target]


def test_item_meta_has_text_picture_and_the_newest_generated_texts(dataset: Dataset) -> None:
    shard = {"model": "m", "prompt_id": "p", "input_hash": "h"}
    dataset.add_generated("caption", [{"item_id": 1, "text": "old", **shard}, {"item_id": 2, "text": "two", **shard}])
    dataset.add_generated("caption", [{"item_id": 1, "text": "new", **shard}])
    meta = load_item_meta(dataset.path)
    shown = {"text": "text 1", "image_path": None, "caption": "new", "semantic_summary": None}
    assert meta[1] == {**shown, "popularity": 1}
    assert meta[2]["caption"] == "two"
    assert meta[3]["caption"] is None
    assert dataset.generated("semantic_summary") is None


def test_pictures_are_stored_by_content_and_given_as_absolute_paths(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "ds") as writer:
        first, again = writer.add_image(b"picture", "png"), writer.add_image(b"picture", "png")
        items = make_items(2, image_path=first)
        dataset = writer.commit(items=items, sequences=make_sequences({1: ([1, 2], [1, 2])}), options={})
    assert first == again
    meta = dataset.item_meta()
    assert Path(str(meta[1]["image_path"])).is_absolute()
    assert Path(str(meta[1]["image_path"])).read_bytes() == b"picture"


def test_candidates_are_kept_by_name_and_missing_ones_name_the_command(dataset: Dataset) -> None:
    dataset.write_candidates("als", [{"split": "test", "user_id": 1, "item_ids": [5, 4], "scores": [2.0, 1.0]}])
    assert dataset.candidate_names() == ["als"]
    assert dataset.candidates("als")["item_ids"].to_list() == [[5, 4]]
    with pytest.raises(UserError, match=r"no candidates 'pop' \(existing: als\)\n.*vlrank retrieve"):
        dataset.candidates("pop")
    with pytest.raises(UserError, match="plain name"):
        dataset.write_candidates("../als", [])


def test_quarantine_grows_or_is_replaced(dataset: Dataset) -> None:
    row = {"key": 7, "error_type": "Bad", "message": "why"}
    dataset.add_quarantine("stage", [row])
    dataset.add_quarantine("stage", [row | {"key": 8}])
    assert dataset.quarantine("stage")["key"].to_list() == ["7", "8"]
    dataset.add_quarantine("stage", [row | {"key": 9}], replace=True)
    assert dataset.quarantine("stage")["key"].to_list() == ["9"]
    assert dataset.quarantine_stages() == ["stage"]
    assert dataset.quarantine("other").is_empty()


def test_an_error_before_the_commit_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with DatasetWriter(tmp_path / "ds") as writer:
            writer.add_image(b"x", "png")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_tables_is_found_before_the_dataset_appears(tmp_path: Path) -> None:
    bad = {
        "without gaps": (make_items(2)[1:], {1: ([1], [1])}),
        "outside": (make_items(2), {1: ([3], [1])}),
        "as many timestamps": (make_items(2), {1: ([1, 2], [1])}),
        "must not decrease": (make_items(2), {1: ([1, 2], [2, 1])}),
    }
    for message, (items, histories) in bad.items():
        with pytest.raises(ValueError, match=message):
            write_dataset(tmp_path / "ds", items=items, sequences=make_sequences(histories), options={})
    assert list(tmp_path.iterdir()) == []


def test_existing_datasets_are_replaced_only_on_request(dataset: Dataset) -> None:
    arguments: dict[str, Any] = {"items": make_items(5), "sequences": make_sequences({1: ([1], [1])}), "options": {}}
    with pytest.raises(UserError, match="exists already"):
        write_dataset(dataset.path, **arguments)
    assert Dataset.open(dataset.path).n_users == 4
    assert write_dataset(dataset.path, **arguments, overwrite=True).n_users == 1
    assert [path.name for path in dataset.path.parent.iterdir()] == ["ds"]


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    stale = tmp_path / ".ds.building"
    (stale / "images").mkdir(parents=True)
    (stale / "items.parquet").write_text("half")
    arguments: dict[str, Any] = {"items": make_items(1), "sequences": make_sequences({1: ([1], [1])}), "options": {}}
    write_dataset(tmp_path / "ds", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["ds"]
    # Killed between the two renames of an overwrite: the old dataset comes back.
    (tmp_path / "ds").rename(tmp_path / ".ds.replaced")
    with pytest.raises(UserError, match="exists already"):
        write_dataset(tmp_path / "ds", **arguments)
    assert Dataset.open(tmp_path / "ds").n_items == 1


def test_two_writers_of_one_path_are_refused(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "ds"):
        with pytest.raises(UserError, match="another process"), DatasetWriter(tmp_path / "ds"):
            pass
        assert (tmp_path / ".ds.building").exists()


def test_opening_says_what_is_wrong(tmp_path: Path, dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"does not exist\n.*vlrank prepare"):
        Dataset.open(tmp_path / "no")
    with pytest.raises(UserError, match="not a dataset"):
        Dataset.open(tmp_path)
    atomic_write_json(dataset.path / "manifest.json", dataset.manifest | {"schema_version": 99})
    with pytest.raises(UserError, match="schema version 99"):
        Dataset.open(dataset.path)
    atomic_write_json(dataset.path / "manifest.json", dataset.manifest)
    (dataset.path / "items.parquet").unlink()
    with pytest.raises(UserError, match=r"lacks items\.parquet"):
        Dataset.open(dataset.path)


def test_verify_notices_changed_tables(dataset: Dataset) -> None:
    dataset.verify()
    dataset.update_items(pl.DataFrame(dataset.items()).with_columns(text=pl.lit("new")), note="changed")
    dataset.verify()
    assert Dataset.open(dataset.path).manifest["note"] == "changed"
    with (dataset.path / "items.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="differs from"):
        dataset.verify()


def test_a_dataset_travels_to_ray_workers(dataset: Dataset) -> None:
    assert pickle.loads(pickle.dumps(dataset)).histories("val") == dataset.histories("val")

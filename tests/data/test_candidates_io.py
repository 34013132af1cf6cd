"""Other programs' files must come in without running their code, and ours must go out as they expect them."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from vlrank.data.candidates_io import (
    lists_to_long,
    long_to_lists,
    read_llamarec,
    read_pickle,
    write_rankings,
)
from vlrank.data.dataset import Dataset
from vlrank.data.schemas import RANKINGS
from vlrank.errors import UserError
from vlrank.retrieval.importing import read_candidates


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for evil in (Evil(), {"val_probs": [Evil()]}, np.array([Evil()], dtype=object)):
        (tmp_path / "retrieved.pkl").write_bytes(pickle.dumps(evil))
        with pytest.raises(UserError, match=r"posix\.system|nt\.system"):
            read_pickle(tmp_path / "retrieved.pkl")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_and_numbers_are_read(tmp_path: Path, protocol: int) -> None:
    value = {"val_probs": np.arange(6, dtype=np.float32).reshape(2, 3), "val_labels": [1, 2], "x": np.float64(0.5)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    loaded = read_pickle(tmp_path / "a.pkl")
    np.testing.assert_array_equal(loaded["val_probs"], value["val_probs"])
    assert loaded["x"] == 0.5


def test_a_damaged_pickle_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1, 2, 3])[:-3])
    with pytest.raises(UserError, match=r"a\.pkl is refused"):
        read_pickle(tmp_path / "a.pkl")


def test_llamarecs_retrieved_pkl(tmp_path: Path, shop: Dataset) -> None:
    # Two users, three items; column 0 is padding and must never be recommended, whatever its score.
    test = [[9.0, 0.1, 0.3, 0.2], [9.0, 0.5, 0.5, 0.1]]
    (tmp_path / "retrieved.pkl").write_bytes(pickle.dumps({"test_probs": test, "test_labels": [2, 1]}))
    assert [row[:3] for row in read_llamarec(tmp_path / "retrieved.pkl", top_k=2)] == [
        ("test", 1, [2, 3]),
        ("test", 2, [1, 2]),  # equal scores by item id
    ]
    imported = read_candidates(tmp_path / "retrieved.pkl", shop)
    assert imported.table["item_ids"].to_list() == [[2, 3, 1], [1, 2, 3]]
    # More items than the dataset has: made from other data. Nothing unknown comes through.
    wide = np.linspace(1, 0, shop.n_items + 3, dtype=np.float32)[None]
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"test_probs": wide}))
    other = read_candidates(tmp_path / "other.pkl", shop)
    assert max(other.table["item_ids"][0]) <= shop.n_items
    assert {row["error_type"] for row in other.rejected} == {"UnknownItem"}


RANKED = pl.DataFrame(
    {"split": ["test"], "user_id": [3], "item_ids": [[7, 5]], "scores": [[-0.25, -1.5]], "source": ["qwen3vl/caption"]},
    schema_overrides={"user_id": pl.Int32, "item_ids": pl.List(pl.Int32), "scores": pl.List(pl.Float32)},
)


def test_rankings_as_trec_run(tmp_path: Path) -> None:
    write_rankings(RANKED, tmp_path / "out.trec")
    assert (tmp_path / "out.trec").read_text() == ("3 Q0 7 1 -0.25 qwen3vl/caption\n3 Q0 5 2 -1.5 qwen3vl/caption\n")


def test_rankings_as_jsonl_with_the_sources_ids(tmp_path: Path, shop: Dataset) -> None:
    write_rankings(RANKED, tmp_path / "out.jsonl", dataset=shop)
    row = json.loads((tmp_path / "out.jsonl").read_text())
    items = dict(shop.items().select("item_id", "source_id").iter_rows())
    assert row["items"] == [items[7], items[5]]
    assert row["scores"] == [-0.25, -1.5]


def test_written_runs_can_be_read_as_candidates(tmp_path: Path, shop: Dataset) -> None:
    write_rankings(RANKED, tmp_path / "out.trec", dataset=shop)
    back = read_candidates(tmp_path / "out.trec", shop).table
    assert back.select("user_id", "item_ids", "scores").equals(RANKED.select("user_id", "item_ids", "scores"))


def test_rankings_as_parquet_and_unknown_formats(tmp_path: Path) -> None:
    write_rankings(RANKED, tmp_path / "out.parquet")
    assert pl.read_parquet(tmp_path / "out.parquet").columns == RANKINGS.names
    with pytest.raises(UserError, match="xlsx"):
        write_rankings(RANKED, tmp_path / "out.xlsx")


def test_long_frames_both_ways() -> None:
    frame = pl.DataFrame({"user_id": [9, 9, 4], "item_id": [1, 2, 3], "rank": [2, 1, 1]})
    assert long_to_lists(frame) == {9: [2, 1], 4: [3]}
    assert long_to_lists(frame.drop("rank").with_columns(score=pl.Series([0.1, 0.1, 0.5]))) == {9: [1, 2], 4: [3]}
    back = lists_to_long({9: [(2, -0.1), (1, -2.0)]})
    assert back.rows() == [(9, 2, 1, pytest.approx(-0.1)), (9, 1, 2, -2.0)]
    with pytest.raises(UserError, match="rank or score"):
        long_to_lists(frame.drop("rank"))
    with pytest.raises(UserError, match="more than once"):
        long_to_lists(pl.concat([frame, frame]))

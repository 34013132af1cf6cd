"""`vlrank retrieve`: candidates that can be trusted, and files of other programs read for what they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from vlrank.config import RetrieveConfig
from vlrank.data.dataset import Dataset
from vlrank.errors import UserError
from vlrank.retrieval.importing import read_candidates
from vlrank.retrieval.retrieve import dry_run, run


@pytest.fixture
def data(world: Dataset, tmp_path: Path) -> Dataset:
    shutil.copytree(world.path, tmp_path / "data")
    return Dataset.open(tmp_path / "data")


def lists_of(dataset: Dataset, name: str, split: str) -> dict[int, list[int]]:
    table = dataset.candidates(name).filter(pl.col("split") == split)
    return dict(zip(table["user_id"].to_list(), table["item_ids"].to_list(), strict=True))


def test_val_and_test_exclude_their_own_history(data: Dataset) -> None:
    summary = run(RetrieveConfig(dataset=data.path, method="item_knn", top_k=55))
    for split in ("val", "test"):
        lists = lists_of(data, "item_knn", split)
        for user, (history, target) in data.histories(split).items():  # type: ignore[arg-type]
            assert not set(history) & set(lists[user])
            assert target in lists[user]  # nearly the whole catalogue is listed: only the history may be gone
    # The validation item is history in test: excluded there, listed in val.
    user, (_, validated) = next(iter(data.histories("val").items()))
    assert validated in lists_of(data, "item_knn", "val")[user]
    assert validated not in lists_of(data, "item_knn", "test")[user]
    assert summary.counts["users"] == 160
    assert "test Recall" in summary.lines


def test_recall_of_the_candidates_is_over_all_users(data: Dataset) -> None:
    user, (_, target) = next(iter(data.histories("test").items()))
    file = data.path.parent / "one.jsonl"
    file.write_text(json.dumps({"user_id": user, "item_ids": [target]}) + "\n")
    summary = run(RetrieveConfig(dataset=data.path, method=str(file), top_k=1))
    assert summary.lines["test Recall"] == "@1 0.0125"  # one of 80: those without a list are misses
    assert summary.lines["test users"] == "80 (1 with candidates)"


def formats(folder: Path) -> dict[str, Path]:
    """The same two lists in every format; user U001: B005 before B010, user U002: B020."""
    jsonl, trec, text, parquet = (folder / name for name in ("c.jsonl", "c.run", "c.tsv", "c.parquet"))
    jsonl.write_text(
        '{"user": "U001", "items": ["B005", "B010"], "scores": [2.5, 1.0]}\n\n{"user": "U002", "items": ["B020"]}\n'
    )
    trec.write_text("U001 Q0 B010 2 1.0 me\nU001 Q0 B005 1 2.5 me\nU002 Q0 B020 1 0.3 me\n")
    text.write_text("U001\tB005 B010\nU002\tB020\n")
    pl.DataFrame(
        {
            "split": ["test", "test"],
            "user": ["U001", "U002"],
            "candidates": [["B005", "B010"], ["B020"]],
            "scores": [[2.5, 1.0], [0.3]],
        }
    ).write_parquet(parquet)
    return {"jsonl": jsonl, "trec": trec, "text": text, "parquet": parquet}


@pytest.mark.parametrize("name", ["jsonl", "trec", "text", "parquet"])
def test_every_format_is_read_alike(data: Dataset, tmp_path: Path, name: str) -> None:
    got = read_candidates(formats(tmp_path)[name], data, split="test")
    assert got.rejected == []
    rows = got.table.to_dicts()
    assert [(r["split"], r["user_id"], r["item_ids"]) for r in rows] == [("test", 1, [5, 10]), ("test", 2, [20])]
    assert rows[0]["scores"][0] > rows[0]["scores"][1]  # order survives whoever sorts by score later


def test_our_own_ids_are_recognised_and_can_be_forced(data: Dataset, tmp_path: Path) -> None:
    ours = tmp_path / "ours.parquet"
    table = pl.DataFrame({"split": ["val"], "user_id": [3], "item_ids": [[7, 9]]})
    table.write_parquet(ours)
    row = read_candidates(ours, data).table.row(0, named=True)
    assert (row["split"], row["user_id"], row["item_ids"]) == ("val", 3, [7, 9])
    numbers = tmp_path / "numbers.tsv"
    numbers.write_text("3\t7 9\n")
    assert read_candidates(numbers, data).table["item_ids"].to_list() == [[7, 9]]
    with pytest.raises(UserError, match="no list could be matched"):
        read_candidates(numbers, data, ids="source")


def test_one_item_per_line_is_a_list_of_all_of_them(data: Dataset, tmp_path: Path) -> None:
    # Only each user's first item stayed, and the candidates looked as bad as that.
    file = tmp_path / "long.tsv"
    file.write_text("U001\tB005\nU002\tB020\nU001\tB010\nU002\tB021\nU003\t\nU001\tB002\n")
    got = read_candidates(file, data)
    assert got.rejected == []
    lists = dict(got.table.select("user_id", "item_ids").iter_rows())
    assert lists == {1: [5, 10, 2], 2: [20, 21]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.tsv", "U001\tB005 B010\nU001\tB002\nU002\tB020\nU001\tB007\n"),
        (
            "c.jsonl",
            "".join(f'{{"user": "U00{u}", "items": ["B00{i}"]}}\n' for u, i in ((1, 5), (1, 2), (2, 3), (1, 7))),
        ),
    ],
)
def test_of_several_lists_of_a_user_the_first_counts_and_the_others_are_told(
    data: Dataset, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    got = read_candidates(tmp_path / name, data)
    assert got.table["item_ids"].list.first().to_list()[0] == 5
    assert [(row["key"], row["error_type"]) for row in got.rejected] == [("U001", "DuplicateUser")] * 2


def test_what_does_not_belong_is_counted_not_lost(data: Dataset, tmp_path: Path) -> None:
    history, _ = data.histories("test")[1]
    seen = f"B{history[0]:03d}"
    fresh = next(f"B{i:03d}" for i in range(1, 61) if i not in history)
    file = tmp_path / "mixed.tsv"
    file.write_text(f"U001\t{seen} {fresh} NOPE {fresh}\nGHOST\t{fresh}\n")
    summary = run(RetrieveConfig(dataset=data.path, method=str(file), name="mixed", top_k=10))
    assert lists_of(data, "mixed", "test") == {1: [int(fresh[1:])]}
    assert (summary.lines["duplicates removed"], summary.lines["history items removed"]) == (1, 1)
    kinds = data.quarantine("retrieve-mixed")["error_type"].to_list()
    assert sorted(kinds) == ["UnknownItem", "UnknownUser"]
    # Shops where people buy again: the history stays when asked.
    run(RetrieveConfig(dataset=data.path, method=str(file), name="mixed", top_k=10, exclude_history=False))
    assert lists_of(data, "mixed", "test")[1] == [history[0], int(fresh[1:])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no lists"),
        ("U001 B005\n", "line 1: no tab"),
        ('{"user": "U001"}\n', "a user and a list of items are needed"),
        ('{"user": "U001", "items": ["B005"]}\n{"user"\n', "line 2: not JSON"),
        ('{"user": "U001", "items": "B005"}\n', "expected a list"),
        ("U001 Q0 B005 first 2.0 me\n", "line 1: not a TREC run line"),
        ("X\tB005\n", "no list could be matched"),
    ],
)
def test_unreadable_files_say_where_and_leave_nothing(
    data: Dataset, tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "bad.txt"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        run(RetrieveConfig(dataset=data.path, method=str(file), name="bad"))
    assert data.candidate_names() == []


def test_an_unknown_method_is_no_file_either(data: Dataset) -> None:
    with pytest.raises(UserError, match="neither popularity, item_knn, als, sasrec, bsarec, ensemble:A,B nor a file"):
        run(RetrieveConfig(dataset=data.path, method="itemknn"))


def test_a_dry_run_writes_nothing(data: Dataset) -> None:
    lines: dict[str, Any] = dict(dry_run(RetrieveConfig(dataset=data.path, method="als")).lines)
    assert lines["users"] == "val 80, test 80"
    assert data.candidate_names() == []


def test_an_imported_file_may_be_called_anything(data: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "als [1]=50% é.parquet"
    pl.DataFrame({"user_id": [1], "item_ids": [[7, 9]]}).write_parquet(file)
    run(RetrieveConfig(dataset=data.path, method=str(file)))
    assert data.candidate_names() == ["als_1_50_é"]
    with pytest.raises(UserError, match="plain name"):
        run(RetrieveConfig(dataset=data.path, method="als", name="a/b"))

"""Lists with one item a line, as RecTools, WarpRec, Elliot and RecBole write them, are read whole and in order."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlrank.config import ListsConfig, RetrieveConfig
from vlrank.data.dataset import Dataset
from vlrank.errors import UserError
from vlrank.retrieval import exporting, retrieve
from vlrank.retrieval.importing import read_candidates


@pytest.fixture
def data(world: Dataset, tmp_path: Path) -> Dataset:
    shutil.copytree(world.path, tmp_path / "data")
    return Dataset.open(tmp_path / "data")


TRUTH = {user: [f"B{(7 * user + 11 * place) % 60 + 1:03d}" for place in range(6)] for user in (1, 2, 3)}
LINES = [
    (f"U{user:03d}", item, 5.0 - 0.25 * place, place + 1)
    for user, items in TRUTH.items()
    for place, item in enumerate(items)
]
EXPECTED = {user: [int(item[1:]) for item in items] for user, items in TRUTH.items()}
SHUFFLED = random.Random(0).sample(LINES, len(LINES))


def text(
    columns: str, delimiter: str = "\t", header: str = "", lines: list[tuple[str, str, float, int]] = SHUFFLED
) -> str:
    """Lines with the columns ``u``, ``i``, ``s`` and ``r`` in that order."""
    places = ["uisr".index(column) for column in columns]
    body = [delimiter.join(str(line[place]) for place in places) for line in lines]
    return "\n".join([*([header] if header else []), *body]) + "\n"


FILES = {
    "elliot.tsv": text("uis"),
    "warprec.tsv": text("uis", header="user_id\titem_id\trating"),
    "recbole.inter": text("uis", header="user_id:token\titem_id:token\tscore:float"),
    "rectools.csv": text("uisr", ",", "user_id,item_id,score,rank"),
    "index.csv": "".join(
        f"{n},{line}\n" for n, line in enumerate(text("uisr", ",", "userId,itemId,score,rank").splitlines())
    ),
    "rank.tsv": text("uir"),
    "rank_and_score.tsv": text("uirs"),
    "no_header.csv": text("uisr", ","),
    "unknown_names.csv": text("uis", ",", "visitor,thing,how much"),
    "spaces.csv": text("uis", ", ", "user_id, item_id, score"),
    "own_names.csv": text("uir", ",", "userID,itemID,topK place"),
    "semicolons.txt": text("uisr", ";", "uid;iid;pred;position"),
    "other_order.csv": text("rsiu", ",", "rank,prediction,item,user"),
    "in_order.tsv": text("ui", header="user\titem", lines=LINES),
    "filtered.tsv": text("uisr", lines=[(user, item, score, 3 * rank) for user, item, score, rank in SHUFFLED]),
    "long.jsonl": "".join(f'{{"user": "{u}", "item": "{i}", "score": {s}}}\n' for u, i, s, _ in SHUFFLED),
    "kaggle.csv": "customer_id,prediction\n" + "".join(f"U{u:03d},{' '.join(i)}\n" for u, i in TRUTH.items()),
    "python.csv": "user,items\n" + "".join(f'U{u:03d},"{i}"\n' for u, i in TRUTH.items()),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", ["plain", "gzip", "bom", "crlf"])
def test_one_item_a_line(world: Dataset, tmp_path: Path, name: str, way: str) -> None:
    content = FILES[name].replace("\n", "\r\n" if way == "crlf" else "\n").encode()
    content = b"\xef\xbb\xbf" + content if way == "bom" else content
    path = tmp_path / (f"{name}.gz" if way == "gzip" else name)
    path.write_bytes(gzip.compress(content) if way == "gzip" else content)
    got = read_candidates(path, world)
    assert dict(got.table.select("user_id", "item_ids").iter_rows()) == EXPECTED
    assert got.rejected == []


@pytest.mark.parametrize("ids", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_one_item_a_row_in_parquet(world: Dataset, tmp_path: Path, ids: pa.DataType) -> None:
    users, items, scores, ranks = zip(*SHUFFLED, strict=True)
    columns = {
        "userId": pa.array(users).cast(ids),
        "itemId": pa.array(items).cast(ids),
        "score": scores,
        "weight": ranks,
    }
    pq.write_table(pa.table(columns), tmp_path / "recs[1].parquet")
    got = read_candidates(tmp_path / "recs[1].parquet", world).table
    assert dict(got.select("user_id", "item_ids").iter_rows()) == EXPECTED
    assert got["scores"][0].to_list() == [5.0, 4.75, 4.5, 4.25, 4.0, 3.75]


def test_ids_with_blanks_are_whole_and_ranks_are_not_called_scores(data: Dataset, tmp_path: Path) -> None:
    table = data.items().with_columns(source_id=pl.col("source_id").str.replace("B", "SKU "))
    data.update_items(table)
    dataset = Dataset.open(data.path)
    for name, columns, header in (("plain.txt", "ui", ""), ("rank.tsv", "uir", "user\titem\trank")):
        (tmp_path / name).write_text(text(columns, header=header, lines=LINES).replace("\tB", "\tSKU "))
        got = read_candidates(tmp_path / name, dataset)
        assert dict(got.table.select("user_id", "item_ids").iter_rows()) == EXPECTED
        assert "order" not in got.notes
        assert "one item a line" in got.notes["read as"]


def test_lists_of_numbers_stay_lists(world: Dataset, tmp_path: Path) -> None:
    (tmp_path / "lists.tsv").write_text("1\t7\t9\n2\t3\t4\n")
    assert read_candidates(tmp_path / "lists.tsv", world, ids="vlrank").table["item_ids"].to_list() == [[7, 9], [3, 4]]


def test_a_reading_that_leaves_most_lists_unused_is_refused_with_what_was_understood(
    world: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "titles.tsv"
    path.write_text("".join(f"{user}\t{item}\tTea\n" for user, item, *_ in SHUFFLED))
    message = r"was read as lists of items \(user<TAB>items\), and 15 of its 18 lists name a user again"
    with pytest.raises(UserError, match=message):
        read_candidates(path, world)
    (tmp_path / "what.csv").write_text("".join(f"{user},{item},Tea\n" for user, item, *_ in SHUFFLED))
    with pytest.raises(UserError, match="not told by names") as told:
        read_candidates(tmp_path / "what.csv", world)
    assert "header line" in str(told.value)


def _lists(form: str) -> str:
    return "".join(f"U{user:03d}{form.format(*items)}\n" for user, items in TRUTH.items())


VARIANTS = {
    "blanks.txt": text("uis", " "),
    "blanks_named.txt": text("uis", " ", "user item score"),
    "decimal_commas.csv": text("uis", ";").replace(".", ","),
    "decimal_commas_named.csv": text("uis", ";", "user;item;score").replace(".", ","),
    "trailing.csv": text("uis", ",").replace("\n", ",\n"),
    "trailing_named.csv": text("uis", ",", "user,item,score").replace("\n", ",\n"),
    "trailing.tsv": text("uis").replace("\n", "\t\n"),
    "trailing_lists.tsv": _lists("\t{} {} {} {} {} {}\t"),
    "blank_lists.txt": _lists(" {} {} {} {} {} {}"),
    "mymedialite.txt": _lists("\t[{5}:0.5,{4}:1,{0}:5,{1}:4.5,{2}:4,{3}:3]"),
    "pairs.csv": text("ui", ",", lines=LINES),
    "spark.jsonl": "".join(
        json.dumps({"user": f"U{user:03d}", "recommendations": [{"item": item} for item in items]}) + "\n"
        for user, items in TRUTH.items()
    ),
    "distances.csv": "user,item,distance\n"
    + "".join(f"U{user:03d},{item},{place}.5\n" for user, items in TRUTH.items() for place, item in enumerate(items)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_separators_and_layouts_give_the_same_lists(world: Dataset, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(VARIANTS[name])
    got = read_candidates(tmp_path / name, world)
    assert dict(zip(got.table["user_id"], got.table["item_ids"].to_list(), strict=True)) == EXPECTED
    assert not got.rejected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user,item,score,score\nU001,B001,1,1\n", "column name twice: user, item, score, score"),
        ("user,item,score\nU001,B001,high\n", "column score of .* holds 'high', expected numbers"),
        ("user,item,score\nU001,[B001],1\n", "none of its items is known .*B001"),
        ("user,item,split\nU001,B001,train\n", "split 'train' is neither val nor test"),
        ("user,item,score,rank\n" + "".join(f"U00{n % 2 + 1},B00{n},{n},{n}\n" for n in range(1, 7)), "in all 2 lists"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused_with_their_cause(
    world: Dataset, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "lists.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_candidates(tmp_path / "lists.csv", world)


def test_whole_numbers_written_as_floats_and_other_names_of_splits_are_understood(
    world: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "lists.csv").write_text("split,user_id,item_id,score\nValidation,1.0,5.0,2\ntest,1.0,7.0,1\n")
    got = read_candidates(tmp_path / "lists.csv", world, ids="vlrank").table
    assert got.select("split", "user_id", "item_ids").rows() == [("test", 1, [7]), ("val", 1, [5])]


# ---- TREC runs -----------------------------------------------------------------------------------------------------

RUN = "".join(
    f"U001 Q0 B{item:03d} {rank} {1 - rank / 10:.2f} t\n" for rank, item in enumerate((5, 10, 15, 20), start=1)
)


NO_NUMBER = {"scores": "1 of 4 are no numbers: their items come last"}
CONTRADICTION = {"ranks": "contradict the scores in 1 of 1 lists: the scores count"}


@pytest.mark.parametrize(
    ("content", "items", "notes"),
    [
        (RUN, [5, 10, 15, 20], {}),
        ("\ufeff" + RUN, [5, 10, 15, 20], {}),
        (RUN.replace(" ", "\t"), [5, 10, 15, 20], {}),
        (RUN.replace("0.90", "nan"), [10, 15, 20, 5], NO_NUMBER),
        (RUN.replace("0.70", "inf"), [15, 5, 10, 20], CONTRADICTION),
        (RUN.replace("0.60", "-inf"), [5, 10, 15, 20], {}),
        (re.sub(r" 0\.\d\d ", " 0.5 ", RUN), [5, 10, 15, 20], {}),
        (re.sub(r" (\d) 0", lambda rank: f" {5 - int(rank[1])} 0", RUN), [5, 10, 15, 20], CONTRADICTION),
    ],
)
def test_trec_runs(world: Dataset, tmp_path: Path, content: str, items: list[int], notes: dict[str, str]) -> None:
    (tmp_path / "r.trec").write_text(content, encoding="utf-8")
    got = read_candidates(tmp_path / "r.trec", world)
    assert got.table["item_ids"].to_list() == [items]
    assert got.table["scores"][0].is_finite().all()
    assert got.table["scores"][0].is_sorted(descending=True)
    assert got.notes == {"read as": "4 lines of a TREC run"} | notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RUN.replace(" t\n", "\n"), "line 1: .* 5 columns, expected 6"),
        (RUN.replace("0.70 t", "0.70 t x"), "line 3: .* 7 columns, expected 6"),
        (RUN.replace("0.80", "high"), "line 2: .* could not convert string to float: 'high'"),
    ],
)
def test_lines_of_a_trec_run_that_are_none_are_named(
    world: Dataset, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "r.trec").write_text(content)
    with pytest.raises(UserError, match=message):
        read_candidates(tmp_path / "r.trec", world)


# ---- and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.tsv", "out [v2].csv", "out.parquet", "out.trec", "out.jsonl"])
def test_exported_lists_are_those_that_were_imported(data: Dataset, tmp_path: Path, name: str) -> None:
    (tmp_path / "in.csv").write_text(FILES["rectools.csv"])
    config = {"dataset": data.path, "method": str(tmp_path / "in.csv"), "name": "other", "exclude_history": False}
    summary = retrieve.run(RetrieveConfig.model_validate(config))
    assert summary.lines["read as"] == "18 lines of one item a line (user_id, item_id, score, rank)"
    exporting.run(ListsConfig(dataset=data.path, lists="other", out=tmp_path / name))
    back = read_candidates(tmp_path / name, data)
    assert back.table.equals(data.candidates("other"))
    if name == "out.tsv":
        lines = (tmp_path / name).read_text().splitlines()
        assert lines[:2] == ["user_id\titem_id\tscore\trank", f"U001\t{TRUTH[1][0]}\t5.0\t1"]
    if name == "out.parquet":
        assert pl.read_parquet(tmp_path / name).columns == ["user_id", "item_id", "score", "rank"]


def test_exports_that_cannot_be_are_named(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'als' is neither candidates of"):
        exporting.run(ListsConfig(dataset=data.path, lists="als", out=tmp_path / "o.tsv"))
    with pytest.raises(UserError, match=r"cannot be written as '\.xlsx'"):
        exporting.run(ListsConfig(dataset=data.path, lists="als", out=tmp_path / "o.xlsx"))

"""Every raw format gives the same interactions and items, and every bad row is put aside by its line."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrank.config import ColumnsConfig
from vlrank.data import sources
from vlrank.data.metadata import Item, _image, items
from vlrank.data.rawfiles import Rejects
from vlrank.data.sources import RawOptions, interactions
from vlrank.errors import UserError

SECONDS = 1_500_000_000
EXPECTED = [("u1", "i1", SECONDS * 1000, 5.0), ("u2", "i1", SECONDS * 1000 + 1000, 2.0)]


def read(
    path: Path, columns: dict[str, Any] | None = None, **options: Any
) -> tuple[list[tuple[str, str, int, float]], list[dict[str, str]]]:
    bad: list[dict[str, str]] = []
    rejects = Rejects(bad.extend)
    rows = []
    for batch in interactions(path, RawOptions(ColumnsConfig(**(columns or {})), **options), rejects):
        rows += list(
            zip(
                batch.user.to_pylist(),
                batch.item.to_pylist(),
                batch.time_ms.tolist(),
                batch.rating.tolist(),
                strict=True,
            )
        )
    rejects.flush()
    return rows, bad


def read_items(
    path: Path, wanted: set[str], columns: dict[str, Any] | None = None
) -> tuple[list[Item], list[dict[str, str]]]:
    bad: list[dict[str, str]] = []
    rejects = Rejects(bad.extend)
    found = [item for _, item in items(path, wanted, RawOptions(ColumnsConfig(**(columns or {}))), rejects, 600)]
    rejects.flush()
    return found, bad


def write_lines(path: Path, rows: list[Any]) -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_amazon_2014_and_2018_reviews(tmp_path: Path) -> None:
    rows = [
        {
            "reviewerID": "u1",
            "asin": "i1",
            "overall": 5.0,
            "unixReviewTime": SECONDS,
            "reviewText": "é",
            "style": {"a": "b"},
        },
        {"reviewerID": "u2", "asin": "i1", "overall": 2, "unixReviewTime": SECONDS + 1},
    ]
    assert read(write_lines(tmp_path / "r.json.gz", rows)) == (EXPECTED, [])
    literals = [repr(row) for row in rows]
    assert read(write_lines(tmp_path / "literal.json", literals)) == (EXPECTED, [])


def test_amazon_2023_reviews_use_the_parent_and_milliseconds(tmp_path: Path) -> None:
    rows = [
        {"user_id": "u1", "parent_asin": "i1", "asin": "variant", "rating": 5.0, "timestamp": SECONDS * 1000},
        {"user_id": "u2", "parent_asin": "i1", "asin": "other", "rating": 2.0, "timestamp": SECONDS * 1000 + 1000},
    ]
    assert read(write_lines(tmp_path / "r.jsonl.gz", rows)) == (EXPECTED, [])


def test_recbole_atomic_files(tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    path = write_lines(tmp_path / "d.inter", [header, f"u1\ti1\t5.0\t{SECONDS}.0", f"u2\ti1\t2\t{SECONDS + 1}"])
    assert read(path) == (EXPECTED, [])
    path = write_lines(
        tmp_path / "d.item", ["item_id:token\ttitle:token_seq\tclass:token_seq", 'i1\tA "quoted" title\tHome|Garden']
    )
    found, bad = read_items(path, {"i1"})
    assert (found[0].title, found[0].categories, bad) == ('A "quoted" title', ("Home", "Garden"), [])


def test_csv_with_any_column_names(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.csv", ["when;who;what;stars", f"{SECONDS};u1;i1;5", f"{SECONDS + 1};u2;i1;2.0"])
    names = {"user": "who", "item": "what", "timestamp": "when", "rating": "stars", "delimiter": ";"}
    assert read(path, names) == (EXPECTED, [])
    with pytest.raises(UserError, match=r"no user column .*its columns are when;who;what;stars\n.*columns\.user=NAME"):
        read(path)
    with pytest.raises(UserError, match=r"no rating column \(score\)"):
        read(path, names | {"rating": "score"})


def test_csv_without_a_header_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "ratings_Beauty.csv", [f"u1,i1,5.0,{SECONDS}", f"u2,i1,2.0,{SECONDS + 1}"])
    assert read(path, {"names": ("user", "item", "rating", "timestamp")}) == (EXPECTED, [])


def test_csv_quotes_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(
        b"\xef\xbb\xbf"
        + f'"user","item","rating","timestamp"\r\n"u1","i1",5,{SECONDS}\r\nu2,i1,2,{SECONDS + 1}\r\n'.encode()
    )
    assert read(tmp_path / "r.csv") == (EXPECTED, [])


def test_csv_with_dates(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "r.csv", ["user,item,date", "u1,i1,2017-07-14", "u2,i1,2017-07-14T02:40:01Z", "u3,i1,soon"]
    )
    rows, bad = read(path)
    midnight = int(dt.datetime(2017, 7, 14, tzinfo=dt.UTC).timestamp() * 1000)
    assert [row[2] for row in rows] == [midnight, midnight + (2 * 3600 + 40 * 60 + 1) * 1000]
    assert bad[0]["key"] == f"{path}:4"
    assert "neither a number nor an ISO date" in bad[0]["message"]


@pytest.mark.parametrize("kind", ["numbers", "dates", "categories", "integers"])
def test_parquet_of_any_types(tmp_path: Path, kind: str) -> None:
    table = pl.DataFrame(
        {"user": ["u1", "u2"], "item": ["i1", "i1"], "timestamp": [SECONDS, SECONDS + 1], "rating": [5, 2]}
    )
    if kind == "dates":
        table = table.with_columns(pl.from_epoch("timestamp", time_unit="s"))
    if kind == "categories":
        table = table.with_columns(pl.col("user", "item").cast(pl.Categorical))
    if kind == "integers":
        table = table.with_columns(user=pl.Series([1, 2]), item=pl.Series([1, 1]))
    table.write_parquet(tmp_path / "r.parquet")
    expected = EXPECTED if kind != "integers" else [(row[0][1:], row[1][1:], *row[2:]) for row in EXPECTED]
    assert read(tmp_path / "r.parquet") == (expected, [])


def test_parquet_rows_with_missing_values_are_put_aside(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {"user": ["u1", None, "u2", ""], "item": ["i1"] * 4, "timestamp": [SECONDS, 1, SECONDS + 1, 1]}
    )
    table.write_parquet(tmp_path / "r.parquet")
    rows, bad = read(tmp_path / "r.parquet")
    assert [row[0] for row in rows] == ["u1", "u2"]
    assert [row["key"] for row in bad] == [f"{tmp_path / 'r.parquet'}:2", f"{tmp_path / 'r.parquet'}:4"]


def test_bad_lines_among_good_ones_are_named_by_line_and_reason(tmp_path: Path) -> None:
    good = {"user": "u", "item": "i", "timestamp": 1}
    lines = [
        good,
        "{not json",
        "",
        good | {"user": ""},
        good | {"item": None},
        good | {"item": ["i"]},
        good | {"timestamp": "yesterday"},
        good | {"timestamp": 1e300},
        good | {"rating": "five"},
        good | {"rating": "N/A"},
        '{"user": NaN, "item": "i", "timestamp": 1}',
        "[]",
        {"user": 7, "item": 8.0, "timestamp": "1"},
        '{"user": "\\ud800", "item": "i", "timestamp": 1}',
        '{"user": "u", "item": "i", "timestamp": NaN}',
    ]
    path = write_lines(tmp_path / "r.jsonl", lines)
    rows, bad = read(path)
    assert [row[:3] for row in rows] == [("u", "i", 1000), ("u", "i", 1000), ("7", "8", 1000), ("?", "i", 1000)]
    reasons = {int(row["key"].rsplit(":", 1)[1]): row["message"] for row in bad}
    assert sorted(reasons) == [2, 4, 5, 6, 7, 8, 9, 11, 12, 15]
    assert "no user id" in reasons[4]
    assert "the item id is a list" in reasons[6]
    assert "is not a number" in reasons[9]


def test_bad_csv_lines_are_named_and_the_rest_kept(tmp_path: Path) -> None:
    good = "u1,i1,1"
    lines = ["user,item,timestamp", good, "u1,i1", "u1,i1,1,9", ",i1,1", 'u1,"i1,1', good, "u1,i1,x", "u2,caf\u00e9,2"]
    path = tmp_path / "r.csv"
    path.write_bytes("\n".join(lines).encode("cp1252"))
    rows, bad = read(path)
    assert [row[1] for row in rows] == ["i1", "i1", "café"]
    assert [row["key"] for row in bad] == [f"{path}:{n}" for n in (3, 4, 5, 6, 8)]


texts = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=6)
json_row = st.fixed_dictionaries(
    {
        "user": texts | st.integers(),
        "item": texts | st.none(),
        "timestamp": st.integers(-10, 2**62) | st.floats() | texts,
    },
    optional={"rating": st.floats(0, 5) | st.integers(0, 5) | texts, "extra": st.lists(texts, max_size=2)},
)


@settings(max_examples=50)
@given(st.lists(json_row, max_size=12), st.sampled_from(["r.jsonl", "r.csv"]))
def test_the_fast_readers_agree_with_reading_line_by_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], name: str
) -> None:
    path = tmp_path_factory.mktemp("r") / name
    if name.endswith(".csv"):
        cells = [[str(row.get(key, "")) for key in ("user", "item", "timestamp", "rating")] for row in rows]
        write_lines(path, ["user,item,timestamp,rating", *(",".join(line) for line in cells)])
    else:
        write_lines(path, [{"user": "first", "item": "line", "timestamp": 1, "rating": 1.0}, *rows])
    fast, fast_bad = read(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_fast_json", lambda *_: None)
        patch.setattr(sources, "_fast_delimited", lambda *_: None)
        slow, slow_bad = read(path)
    np.testing.assert_equal(fast, slow)
    assert fast_bad == slow_bad


@pytest.mark.parametrize(
    ("value", "unit"), [(SECONDS, "s"), (SECONDS * 10**3, "ms"), (SECONDS * 10**6, "us"), (SECONDS * 10**9, "ns")]
)
def test_the_unit_of_times_is_told_by_size_or_given(tmp_path: Path, value: int, unit: str) -> None:
    path = write_lines(tmp_path / "r.csv", ["user,item,timestamp", f"u,i,{value}"])
    assert read(path)[0][0][2] == SECONDS * 1000
    assert read(path, timestamp_unit=unit)[0][0][2] == SECONDS * 1000
    assert read(write_lines(path, ["user,item,timestamp", "u,i,5000"]), timestamp_unit="ms")[0][0][2] == 5000


@given(st.floats() | st.integers(-(10**20), 10**20), st.sampled_from(["auto", "s", "ms", "us", "ns"]))
def test_one_time_is_read_as_many_are(value: float, unit: sources.TimestampUnit) -> None:
    many = sources._times(np.array([value], np.float64), unit)
    if many is None:
        with pytest.raises(ValueError, match="is not a time"):
            sources._time(value, unit)
    else:
        assert sources._time(value, unit) == many[0]


# ---- metadata -------------------------------------------------------------------------------------------------------


def test_metadata_of_the_three_amazon_releases(tmp_path: Path) -> None:
    of_2014 = {
        "asin": "i1", "title": "Tea &amp; Milk", "brand": "B", "categories": [["Food", "Tea"], ["Food", "Drinks"]],
        "description": "Good.", "imUrl": "http://e.com/a.jpg", "price": 1.0, "related": {"also_bought": ["i2"]},
    }  # fmt: skip
    of_2018 = {
        "asin": "i1", "title": "Tea &amp; Milk", "brand": "B", "category": ["Food", "Tea", "Drinks"],
        "description": ["Good.", ""], "imageURL": ["http://e.com/small.jpg"], "imageURLHighRes": ["http://e.com/a.jpg"],
        "also_buy": [], "details": {"ASIN: ": "i9"},
    }  # fmt: skip
    of_2023 = {
        "parent_asin": "i1", "title": "Tea &amp; Milk", "store": "B", "categories": ["Food", "Tea", "Drinks"],
        "description": ["Good."], "main_category": "Grocery",
        "images": [{"variant": "PT01", "large": "http://e.com/b.jpg"},
                   {"variant": "MAIN", "thumb": "t", "large": "l", "hi_res": "http://e.com/a.jpg"}],
    }  # fmt: skip
    expected = Item("i1", "Tea & Milk", "B", ("Food", "Tea", "Drinks"), "Good.", "http://e.com/a.jpg")
    for line in (repr(of_2014), json.dumps(of_2018), json.dumps(of_2023)):
        other = line.replace("i1", "i7")
        assert read_items(write_lines(tmp_path / "meta.json", [other, line]), {"i1"}) == ([expected], [])


def test_magazine_like_metadata_comes_out_clean_or_in_quarantine(tmp_path: Path) -> None:
    span = '<span class="a-size-medium a-color-secondary a-text-normal">'
    rows = [
        {"asin": "a", "title": f"{span}Time</span>", "brand": ["Time", "Inc"], "category": "", "description": ""},
        {
            "asin": "b",
            "title": ["Two", "parts"],
            "category": [["X", "<b>Y</b>"], "X"],
            "description": [["deep", ["er"]]],
        },
        {"asin": "c", "title": {"text": "a dictionary"}},
        {"asin": "d", "title": ""},
        {"asin": "e", "title": "var aPageStart = (new Date()).getTime();\nvar ue=..."},
        {"asin": "f", "title": 1984, "brand": "\n\n", "imageURL": [None, ""], "imageURLHighRes": []},
        {"asin": "g", "title": "G", "description": True},
        {"title": "nobody's"},
    ]
    found, bad = read_items(write_lines(tmp_path / "meta_Magazine.json", rows), set("abcdefg"))
    by_id = {item.source_id: item for item in found}
    assert by_id["a"] == Item("a", "Time", "Time Inc", (), None, None)
    assert by_id["b"] == Item("b", "Two parts", None, ("X", "Y"), "deep er", None)
    assert (by_id["d"].title, by_id["e"].title) == ("", "")
    assert by_id["f"] == Item("f", "1984", None, (), None, None)
    assert [row["message"].split(";")[0] for row in bad] == [
        "title is a dict, expected text",
        "description is a bool, expected text",
        "no item id",
    ]


def test_rows_that_nobody_needs_are_not_even_parsed(tmp_path: Path) -> None:
    lines = [
        '{"asin": "other", "title": broken}',
        '{"asin": "esc\\u0061ped", "title": "T"}',
        '{"asin": "i1", "title": broken}',
    ]
    found, bad = read_items(write_lines(tmp_path / "m.json", lines), {"i1", "escaped"})
    assert [item.source_id for item in found] == ["escaped"]
    assert [row["key"] for row in bad] == [f"{tmp_path / 'm.json'}:3"]


def test_an_id_in_a_description_does_not_hide_the_row(tmp_path: Path) -> None:
    line = repr({"title": "T", "description": 'see "asin": "x9"', "asin": "i1"})
    assert len(read_items(write_lines(tmp_path / "m.json", [line]), {"i1"})[0]) == 1


def test_csv_metadata_may_have_values_over_several_lines(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "m.csv",
        ["item,title,description,image", 'i1,"T, 1","two\nlines",pics/1.jpg', "i2,T", "i3,T3,,http://e.com/3.png"],
    )
    found, bad = read_items(path, {"i1", "i2", "i3"})
    assert found[0] == Item("i1", "T, 1", None, (), "two lines", str(tmp_path / "pics/1.jpg"))
    assert found[1].image == "http://e.com/3.png"
    assert bad[0]["message"].startswith("2 columns, expected 4")


def test_parquet_metadata(tmp_path: Path) -> None:
    table = pl.DataFrame({"item": [1, 2], "title": ["A", "B"], "categories": [["x"], None]})
    table.write_parquet(tmp_path / "m.parquet")
    assert read_items(tmp_path / "m.parquet", {"2"})[0] == [Item("2", "B", None, (), None, None)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ([], None),
        ("", None),
        (7, None),
        ("//e.com/a.jpg", "https://e.com/a.jpg"),
        ([None, "http://e.com/a.jpg"], "http://e.com/a.jpg"),
        ({"hi_res": [None, "h"], "large": ["http://e.com/l.jpg"], "variant": ["MAIN"]}, "/pictures/h"),
        ([{"large": "http://e.com/l.jpg", "hi_res": None, "variant": "PT01"}], "http://e.com/l.jpg"),
        ("../a b.png", "/pictures/../a b.png"),
    ],
)
def test_the_best_picture_of_a_row(value: Any, expected: str | None) -> None:
    assert _image(value, Path("/pictures")) == expected


MOMENT = dt.datetime.fromtimestamp(SECONDS, dt.UTC)


@pytest.mark.parametrize(
    ("role", "values"),
    [
        ("timestamp", pa.array([str(SECONDS), str(SECONDS + 1)], pa.large_string())),
        ("timestamp", pa.array([f"{SECONDS}.0", "1.500000001e9"]).cast(pa.string_view())),
        ("timestamp", pa.array([MOMENT.isoformat(), "2017-07-14 04:40:01+02:00"])),
        ("timestamp", pa.array(["2017-07-14 02:40:00 UTC", "2017/07/14 02:40:01"])),
        ("timestamp", pa.array([SECONDS, SECONDS + 1], pa.decimal128(20, 2))),
        ("timestamp", pa.array([SECONDS * 10**9, (SECONDS + 1) * 10**9], pa.timestamp("ns", "Europe/Berlin"))),
        ("timestamp", pa.array([str(SECONDS), str(SECONDS + 1)]).dictionary_encode()),
        ("timestamp", pa.array([SECONDS, SECONDS + 1], pa.uint64())),
        ("rating", pa.array(["5.0", "2"], pa.large_string())),
        ("rating", pa.array([decimal.Decimal("5.0"), decimal.Decimal("2.0")])),
        ("rating", pa.array(["5", "2"]).dictionary_encode()),
        ("user", pa.array([b"u1", b"u2"])),
        ("user", pa.array(["u1", "u2"]).cast(pa.large_string()).dictionary_encode()),
        ("item", pa.array(["i1", "i1"], pa.string_view())),
    ],
)
def test_parquet_columns_of_any_type_are_read_as_in_csv(tmp_path: Path, role: str, values: pa.Array) -> None:
    columns = {
        "user": ["u1", "u2"], "item": ["i1", "i1"], "timestamp": [SECONDS, SECONDS + 1], "rating": [5.0, 2.0]
    }  # fmt: skip
    table = pa.table({**columns, role: values})
    pq.write_table(table, tmp_path / "r.parquet", store_schema=True)
    assert read(tmp_path / "r.parquet") == (EXPECTED, [])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_what_cannot_be_read_in_a_parquet_column_costs_its_row(tmp_path: Path, kind: pa.DataType) -> None:
    times = pa.array(["2017-07-14", None, "soon", "", "2017-07-14T02:40:00Z", str(SECONDS)]).cast(kind)
    ratings = pa.array(["5", "5", "5", "5", "N/A", "five"]).cast(kind)
    pq.write_table(
        pa.table({"user": ["u"] * 6, "item": ["i"] * 6, "timestamp": times, "rating": ratings}), tmp_path / "r.parquet"
    )
    rows, bad = read(tmp_path / "r.parquet")
    assert [row[2] for row in rows] == [SECONDS * 1000 - 9_600_000, SECONDS * 1000]
    assert [(row["key"].rsplit(":", 1)[1], row["message"].split(";")[0]) for row in bad] == [
        ("2", "no timestamp"),
        ("3", "timestamp 'soon' is neither a number nor an ISO date"),
        ("4", "no timestamp"),
        ("6", "rating 'five' is not a number"),
    ]


def test_ids_that_pandas_made_floats_are_integers_again(tmp_path: Path) -> None:
    table = pa.table({"user": [1.0, float("nan"), 3.0], "item": pa.array([1e17, None, 7.0]), "timestamp": [1, 2, 3]})
    pq.write_table(table, tmp_path / "r.parquet")
    rows, bad = read(tmp_path / "r.parquet")
    assert [row[:2] for row in rows] == [("1", "100000000000000000"), ("3", "7")]
    assert [row["message"].split(";")[0] for row in bad] == ["no user id"]


@pytest.mark.parametrize(
    ("role", "values"),
    [
        ("user", pa.array([["u1"], ["u2"]])),
        ("timestamp", pa.array([{"seconds": 1}, {"seconds": 2}])),
        ("timestamp", pa.array([dt.time(1), dt.time(2)])),
        ("rating", pa.array([[5], [2]])),
    ],
)
def test_a_parquet_column_that_cannot_be_meant_is_named_with_an_example(
    tmp_path: Path, role: str, values: pa.Array
) -> None:
    table = pa.table({"user": ["u1", "u2"], "item": ["i", "i"], "timestamp": [1, 2]} | {role: values})
    pq.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(UserError, match=rf"column {role} of .*r\.parquet holds .*, such as .*, expected the {role}"):
        read(tmp_path / "r.parquet")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    times = np.random.default_rng(0).integers(1, 2**40, 20_000)
    table = pa.table({"user": [f"u{n}" for n in times], "item": ["i"] * len(times), "timestamp": times})
    pq.write_table(table, tmp_path / "r.parquet", compression="zstd")
    content = bytearray((tmp_path / "r.parquet").read_bytes())
    content[100:2000] = b"\xff" * 1900
    (tmp_path / "r.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.parquet is damaged"):
        read(tmp_path / "r.parquet")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("semicolons.csv", "user;item;timestamp;rating\nu1;i1;{0};5,0\nu2;i1;{1};2,0\n"),
        ("tabs.csv", "user\titem\ttimestamp\trating\nu1\ti1\t{0}\t5\nu2\ti1\t{1}\t2\n"),
        ("commas.tsv", "user,item,timestamp,rating\nu1,i1,{0},5\nu2,i1,{1},2\n"),
        ("unnamed.csv", "user,item,timestamp,rating,,\nu1,i1,{0},5,,\nu2,i1,{1},2,,\n"),
        ("blanks.csv", "user, item, timestamp, rating\nu1, i1, {0}, 5\nu2 , i1, {1}, 2\n"),
    ],
)
def test_spreadsheets_that_delimit_in_their_own_way(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text.format(SECONDS, SECONDS + 1))
    assert read(tmp_path / name) == (EXPECTED, [])


def test_missing_ids_are_no_user_and_whole_floats_are_integers(tmp_path: Path) -> None:
    lines = [f"{user},45.0,{SECONDS}" for user in ("123.0", "nan", "None", "NULL", "<NA>", "NA", "\\N", "007")]
    rows, bad = read(write_lines(tmp_path / "r.csv", ["user,item,timestamp", *lines]))
    assert [row[:2] for row in rows] == [("123", "45"), ("007", "45")]
    assert len(bad) == 6
    assert all("no user id" in row["message"] for row in bad)
    fast = read(write_lines(tmp_path / "fast.csv", ["user,item,timestamp", lines[0], lines[-1]]))
    assert ([row[:3] for row in fast[0]], fast[1]) == ([row[:3] for row in rows], [])
    for file in ("m.csv", "m.jsonl"):
        (tmp_path / file).write_text(
            "item,title\n45.0,Tea\n" if file == "m.csv" else '{"item": "45.0", "title": "Tea"}\n'
        )
        assert [item.title for item in read_items(tmp_path / file, {"45"})[0]] == ["Tea"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_days_before_months_are_refused_because_nobody_can_tell_them(tmp_path: Path, ending: str) -> None:
    table = pl.DataFrame({"user": ["u", "v"], "item": ["i", "i"], "timestamp": ["03/02/2016", "04/02/2016"]})
    getattr(table, f"write_{ending}")(tmp_path / f"r.{ending}")
    rows, bad = read(tmp_path / f"r.{ending}")
    assert rows == []
    assert ["neither a number nor an ISO date" in row["message"] for row in bad] == [True, True]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"PK\x03\x04", "a ZIP archive"),
        (b"\x28\xb5\x2f\xfd", "Zstandard"),
        ("user,item".encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8 '/.*my file.csv' > NEW"),
    ],
)
def test_what_is_no_text_is_called_by_its_name(tmp_path: Path, start: bytes, message: str) -> None:
    (tmp_path / "my file.csv").write_bytes(start)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "my file.csv")


def test_bytes_that_are_no_text_name_their_column(tmp_path: Path) -> None:
    table = pa.table({"user": ["u"], "item": [b"\xff"], "timestamp": [SECONDS]})
    pq.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(UserError, match=r"column item of .* holds binary"):
        read(tmp_path / "r.parquet")

"""Delimited files with quotes: nothing is lost to a line break in a text, nothing but its line to a stray quote."""

from __future__ import annotations

import csv
import gzip
import io
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_sources import read, read_items
from vlrank.data import rawfiles, sources
from vlrank.errors import UserError

HEADER = ["user_id", "parent_asin", "rating", "timestamp", "text"]
ROWS = [
    ["U0", "I0", "5.0", "1600000000000", 'good\nproduct, "really"'],
    ["U0", "I1", "5.0", "1600000001000", "fine"],
    ["U0", "I2", "5.0", "1600000002000", "\n\n\ttab,\r\ncomma\n"],
    ["U1", "I3", "5.0", "1600000003000", ""],
    ["U1", "I4", "5.0", "1600000004000", '"'],
]
EXPECTED = [(row[0], row[1], int(row[3]), 5.0) for row in ROWS]


def as_text(rows: list[list[str]], delimiter: str = ",", lineterminator: str = "\n", quoting: int = 0) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator=lineterminator, quoting=quoting).writerows(rows)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".txt", ";")])
def test_line_breaks_delimiters_and_quotes_inside_of_values(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: bool,
    pack: type[bytes],
    lineterminator: str,
    suffix: str,
    delimiter: str,
) -> None:
    if not fast:
        monkeypatch.setattr(sources, "_fast_delimited", lambda *_: None)
    path = tmp_path / f"r{suffix}"
    for quoting, mark in product((csv.QUOTE_MINIMAL, csv.QUOTE_ALL), (b"", b"\xef\xbb\xbf")):
        path.write_bytes(pack(mark + as_text([HEADER, *ROWS], delimiter, lineterminator, quoting).encode()))
        assert read(path, {"delimiter": delimiter}) == (EXPECTED, [])
        path.write_bytes(pack(mark + as_text(ROWS, delimiter, lineterminator, quoting).encode()))
        columns = {"delimiter": delimiter, "names": ("user", "item", "rating", "timestamp", "text")}
        assert read(path, columns) == (EXPECTED, [])


cells = st.text(st.sampled_from('ab",;\t\n\r é'), max_size=8)


@settings(max_examples=60)
@given(st.lists(st.tuples(cells, st.booleans()), max_size=8), st.integers(1, 40), st.booleans(), st.booleans())
def test_whatever_a_csv_writer_writes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, bool]], block: int, fast: bool, text_first: bool
) -> None:
    rows = [[f"u{n}", "i", "5", str(1_600_000_000 + n)] for n in range(len(texts))]
    given_rows = [[text, *row] if text_first else [*row, text] for row, (text, _) in zip(rows, texts, strict=True)]
    names = ["user", "item", "rating", "timestamp"]
    path = tmp_path_factory.mktemp("r") / "r.csv"
    header = as_text([["text", *names] if text_first else [*names, "text"]])
    body = (
        as_text([row], lineterminator="\r\n" if crlf else "\n")
        for row, (_, crlf) in zip(given_rows, texts, strict=True)
    )
    path.write_bytes((header + "".join(body)).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rawfiles, "_BLOCK_BYTES", block)
        if not fast:
            patch.setattr(sources, "_fast_delimited", lambda *_: None)
        found, bad = read(path)
    assert ([row[0] for row in found], bad) == ([row[0] for row in rows], [])


def test_a_quote_that_never_closes_costs_its_line_alone(tmp_path: Path) -> None:
    lines = [
        "text,user,item,timestamp",
        '"5 inch,u1,i1,1',
        "ok,u2,i2,2",
        '"two\nlines",u3,i3,3',
        '"open,u4,i4,4',
        "ok,u5,i5,5",
    ]
    path = tmp_path / "r.csv"
    path.write_text("\n".join(lines))
    rows, bad = read(path)
    assert [row[0] for row in rows] == ["u2", "u3", "u5"]
    assert [row["key"] for row in bad] == [f"{path}:2", f"{path}:6"]


def test_quotes_of_two_rows_that_would_swallow_the_rows_between_are_plain_characters(tmp_path: Path) -> None:
    lines = [
        "user\ttext\titem\ttimestamp",
        'u1\t"Awesome\ti1\t1',
        "u2\tfine\ti2\t2",
        'u3\tso "great"\ti3\t3',
        'u4\ti said "wow"\ti4\t4',
    ]
    path = tmp_path / "r.tsv"
    path.write_text("\n".join(lines))
    rows, bad = read(path)
    assert ([row[:2] for row in rows], bad) == ([("u1", "i1"), ("u2", "i2"), ("u3", "i3"), ("u4", "i4")], [])


def test_quotes_that_are_escaped_by_backslashes(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(
        'text,user,item,timestamp\n"say \\"hi\\", you",u1,i1,1\nok,u2,i2,2\n'
        '"two \\"\nlines\\"",u3,i3,3\n"C:\\",u4,i4,4\n'
    )
    rows, bad = read(path)
    assert ([row[0] for row in rows], bad) == (["u1", "u2", "u3", "u4"], [])


def test_rows_after_many_lines_of_text_keep_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    text = "long " * 200 + "\n"
    path.write_text(f'user,item,timestamp,text\nu1,i1,1,"{text * 50}"\nu2,i2,soon,x\nu3,i3,3,"{text * 3}"\nu4,,4,y\n')
    rows, bad = read(path, max_line_bytes=100_000)
    assert [row[0] for row in rows] == ["u1", "u3"]
    assert [row["key"] for row in bad] == [f"{path}:53", f"{path}:58"]


def test_a_value_that_is_longer_than_a_line_may_be_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rawfiles, "_BLOCK_BYTES", 256)
    path = tmp_path / "r.csv"
    good = [f"x,u{n},i,1" for n in range(200)]
    path.write_text("\n".join(["text,user,item,timestamp", '"never closed,u,i,1', *good]))
    rows, bad = read(path, max_line_bytes=512)
    assert (len(rows), [row["key"] for row in bad]) == (200, [f"{path}:2"])


def test_metadata_is_read_by_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(
        b"item,title,description\r\n"
        b'I0,"A ""B"", C","one\r\ntwo"\r\n'
        b'I1,"5 inch,screen\r\n'
        b'I2,5" screen,x\r\n'
        b'I3,"T",""\r\n'
    )
    found, bad = read_items(path, {"I0", "I1", "I2", "I3"})
    assert [(item.source_id, item.title, item.description) for item in found] == [
        ("I0", 'A "B", C', "one two"),
        ("I2", '5" screen', "x"),
        ("I3", "T", None),
    ]
    assert [row["key"] for row in bad] == [f"{path}:4"]


def test_lines_that_end_in_carriage_returns_alone_are_named(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"user,item,timestamp\ru,i,1\r")
    with pytest.raises(UserError, match="carriage returns"):
        read(tmp_path / "r.csv")

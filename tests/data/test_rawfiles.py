"""Raw files come damaged; what can be read is read, what cannot is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vlrank.data import rawfiles
from vlrank.data.rawfiles import Rejects, decode, open_raw, parse_record, records
from vlrank.errors import UserError


@pytest.fixture
def bad() -> list[dict[str, str]]:
    return []


@pytest.fixture
def rejects(bad: list[dict[str, str]]) -> Rejects:
    return Rejects(bad.extend)


def lines_of(path: Path, rejects: Rejects, **options: object) -> list[tuple[int, bytes]]:
    found = list(records(path, rejects, **{"max_line_bytes": 1 << 20, **options}))  # type: ignore[arg-type]
    rejects.flush()
    return found


def test_a_line_is_json_or_a_python_literal() -> None:
    assert parse_record(b'{"asin": "B1", "price": null}') == {"asin": "B1", "price": None}
    assert parse_record(b"{'asin': 'B1', 'related': {'also': ['x']}, 'ok': True, 'price': 1.5}")["ok"] is True
    assert parse_record(b'\xef\xbb\xbf{"asin": "first line with a byte order mark"}')


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[1, 2]",
        b'"text"',
        b"{'a': __import__('os').system('touch /tmp/vlrank-was-here')}",
        b"{'a': open('/etc/passwd').read()}",
        b"{'a': 9**9**9}",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"a": "cut off',
        b"{'a': 'x\x00y'",
    ],
)
def test_anything_else_is_a_bad_line_and_nothing_is_run(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the message is the parser's)
        parse_record(line)
    assert not Path("/tmp/vlrank-was-here").exists()


def test_lines_of_other_encodings_are_kept() -> None:
    assert decode("café".encode()) == "café"
    assert decode("café “x”".encode("cp1252")) == "café “x”"
    assert decode(b"\x81 undefined in cp1252") == "\x81 undefined in cp1252"


@given(st.binary(max_size=50))
def test_decoding_never_fails(line: bytes) -> None:
    assert isinstance(decode(line), str)


@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=40), st.integers(1, 64))
def test_blocks_of_any_size_give_the_same_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block: int
) -> None:
    content = b"\n".join(lines)
    utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff")) or 0 in content[:2]
    assume(not utf_16 and not content.startswith((*rawfiles._MAGIC, *rawfiles._FOREIGN)))
    path = tmp_path_factory.mktemp("f") / "f.json"
    path.write_bytes(content)
    before = rawfiles._BLOCK_BYTES
    rawfiles._BLOCK_BYTES = block
    try:
        found = lines_of(path, Rejects(lambda _: None))
    finally:
        rawfiles._BLOCK_BYTES = before
    assert found == [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_compression_is_told_by_content(tmp_path: Path, rejects: Rejects, pack: object) -> None:
    (tmp_path / "f.json").write_bytes(pack(b"a\nb\n"))  # type: ignore[operator]
    assert lines_of(tmp_path / "f.json", rejects) == [(1, b"a"), (2, b"b")]


def test_a_cut_off_gzip_file_stops_the_run_or_keeps_its_complete_lines(
    tmp_path: Path, rejects: Rejects, bad: list[dict[str, str]]
) -> None:
    path = tmp_path / "f.json.gz"
    lines = [json.dumps({"n": n, "noise": str(hash((n, 1)))}).encode() for n in range(5_000)]
    path.write_bytes(gzip.compress(b"\n".join(lines))[:20_000])
    with pytest.raises(UserError, match=r"f\.json\.gz is cut off"):
        lines_of(path, rejects)
    found = lines_of(path, rejects, allow_truncated=True)
    assert 100 < len(found) < 5_000
    assert [line for _, line in found] == lines[: len(found)]  # the unfinished last line is not among them
    assert bad[-1]["error_type"] == "TruncatedFile"


def test_damage_in_the_middle_is_named(tmp_path: Path, rejects: Rejects) -> None:
    data = bytearray(gzip.compress(b"\n".join(str(hash((n, 2))).encode() for n in range(5_000))))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "f.json.gz").write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        lines_of(tmp_path / "f.json.gz", rejects)


def test_lines_of_ten_megabytes_are_read_and_longer_ones_than_allowed_put_aside(
    tmp_path: Path, rejects: Rejects, bad: list[dict[str, str]]
) -> None:
    long = b'{"asin": "B1", "description": "' + b"x" * 10_000_000 + b'"}'
    path = tmp_path / "f.json"
    path.write_bytes(b"first\n" + long + b"\n" + long * 3 + b"\nlast")
    found = lines_of(path, rejects, max_line_bytes=16 << 20)
    assert [(n, len(line)) for n, line in found] == [(1, 5), (2, len(long)), (4, 4)]
    assert bad == [
        {
            "key": f"{path}:3",
            "error_type": "LineTooLong",
            "message": f"{3 * len(long)} bytes, at most {16 << 20} are read",
        }
    ]


def test_files_that_are_not_what_they_say(tmp_path: Path, rejects: Rejects) -> None:
    (tmp_path / "utf16.json").write_text("x", encoding="utf-16")
    (tmp_path / "page.json.gz").write_text("<html>Not found</html>")
    for name, message in {
        "utf16.json": "UTF-16",
        "page.json.gz": r"not \.gz data",
        "no.json": "does not exist",
    }.items():
        with pytest.raises(UserError, match=message), open_raw(tmp_path / name, rejects):
            pass

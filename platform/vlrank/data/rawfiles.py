"""Raw files as they come: compressed or not, cut off, with broken lines and mixed encodings.

Reading never evaluates anything: a line is JSON or, in the Amazon 2014 metadata, a Python literal read by
`ast.literal_eval`, which accepts constants and containers only.
"""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import json
import lzma
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vlrank.errors import UserError

_COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}
_FOREIGN = {
    b"PK\x03\x04": "a ZIP archive or a workbook",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard",
    b"PAR1": "a Parquet file",
}
_BLOCK_BYTES = 8 << 20
_EXCERPT_CHARS = 160
MAX_LITERAL_BYTES = 16 << 20
"""Python literals are parsed into a syntax tree of many times their size: longer ones are put aside."""


@dataclass(slots=True)
class Rejects:
    """Collects bad rows for the quarantine, and hands them on in portions so that memory stays bounded.

    Attributes:
        sink: Gets rows of ``key``, ``error_type``, ``message``.
        counts: Bad rows by error type.
        first: The first bad row and its reason, for a message.
    """

    sink: Callable[[list[dict[str, str]]], None]
    counts: dict[str, int] = field(default_factory=dict)
    first: str | None = None
    _rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, key: str, error_type: str, message: str) -> None:
        """Put one row aside."""
        self.first = self.first or printable(f"{key}: {message}")
        self._rows.append({"key": key, "error_type": error_type, "message": printable(message)})
        self.counts[error_type] = self.counts.get(error_type, 0) + 1
        if len(self._rows) >= 50_000:
            self.flush()

    def flush(self) -> None:
        """Hand on what is collected."""
        if self._rows:
            self.sink(self._rows)
            self._rows = []

    @property
    def total(self) -> int:
        """All bad rows so far."""
        return sum(self.counts.values())


def printable(text: str) -> str:
    """Text that any UTF-8 table can hold: lone surrogates become "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def excerpt(line: bytes | str) -> str:
    """The start of a raw line, for messages."""
    text = line[: _EXCERPT_CHARS * 4].decode("utf-8", "replace") if isinstance(line, bytes) else line
    return text[:_EXCERPT_CHARS] + ("…" if len(line) > _EXCERPT_CHARS else "")


class _CutOff(io.RawIOBase):
    """A compressed stream that ends where the file was cut off, and remembers it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.cut_off = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.cut_off:
            return 0
        try:
            data = self._stream.read1(len(buffer))  # type: ignore[attr-defined]
        except EOFError:  # "Compressed file ended before the end-of-stream marker was reached"
            self.cut_off = True
            return 0
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def open_raw(path: Path, rejects: Rejects, *, allow_truncated: bool = False) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file; the first bytes tell the compression.

    Args:
        path: The file.
        rejects: Gets a row when the file is cut off and ``allow_truncated`` is on.
        allow_truncated: Keep the complete lines of a file that was cut off instead of stopping.

    Raises:
        UserError: missing, damaged, cut off, or UTF-16.
    """
    try:
        with path.open("rb") as head:
            start = head.read(6)
    except FileNotFoundError:
        raise UserError(f"input file {path} does not exist", "Check the path.") from None
    except OSError as error:
        raise UserError(f"input file {path} cannot be read: {error.strerror}") from None
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in (start[:1] + start[1:2]):
        kind = "UTF-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "UTF-16LE" if start[0] else "UTF-16BE"
        name = shlex.quote(str(path))
        raise UserError(
            f"input file {path} is UTF-16, expected UTF-8", f"Convert it: `iconv -f {kind} -t UTF-8 {name} > NEW`."
        )
    if foreign := next((kind for magic, kind in _FOREIGN.items() if start.startswith(magic)), None):
        raise UserError(
            f"input file {path} is {foreign}, whatever its name says", "Rename, unpack or export it as text."
        )
    compression = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    if compression is None and path.suffix in _COMPRESSIONS:
        raise UserError(f"input file {path} is not {path.suffix} data", "Download it again, or rename it.")
    if compression is None:
        with path.open("rb") as plain:
            yield plain
        return
    source = _CutOff(_COMPRESSIONS[compression](path))
    with io.BufferedReader(source, _BLOCK_BYTES) as stream:
        try:
            yield stream
        except (OSError, lzma.LZMAError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
            if getattr(error, "errno", None) is not None:  # the disk's trouble, not the file's
                raise
            raise UserError(f"input file {path} is damaged: {error}", "Download it again.") from error
        if source.cut_off:
            if not allow_truncated:
                raise UserError(
                    f"input file {path} is cut off: its compressed data ends too early",
                    "Download it again, or keep what it holds with allow_truncated=true.",
                )
            rejects.add(str(path), "TruncatedFile", "the compressed data ends too early; its complete lines were kept")


def line_blocks(stream: IO[bytes], max_line_bytes: int) -> Iterator[tuple[int, list[bytes | int]]]:
    """Lines in blocks of some megabytes.

    Yields:
        (number of the first line, from 1; lines without their end). A line longer than ``max_line_bytes`` stands as its
        length in bytes instead of its content, which is never held in memory. The unfinished last line of a file that
        was cut off is left out: "12" may have been "1234".
    """
    number, carry, skipped = 1, bytearray(), 0
    while block := stream.read(_BLOCK_BYTES):
        lines: list[bytes | int] = []
        start = 0
        end = block.find(b"\n")
        if end < 0:
            carry, skipped = _carry(carry, skipped, block, max_line_bytes)
            continue
        head, skipped_head = _carry(carry, skipped, block[:end], max_line_bytes)
        lines.append(skipped_head if skipped_head else bytes(head))
        start = end + 1
        *complete, rest = block[start:].split(b"\n")
        lines += [line if len(line) <= max_line_bytes else len(line) for line in complete]
        carry, skipped = _carry(bytearray(), 0, rest, max_line_bytes)
        yield number, lines
        number += len(lines)
    if (carry or skipped) and not getattr(getattr(stream, "raw", None), "cut_off", False):
        yield number, [skipped if skipped else bytes(carry)]


def _carry(carry: bytearray, skipped: int, more: bytes, limit: int) -> tuple[bytearray, int]:
    """Append to an unfinished line, or only count once it is too long."""
    if skipped or len(carry) + len(more) > limit:
        return bytearray(), skipped + len(carry) + len(more)
    carry += more
    return carry, 0


def decode(line: bytes) -> str:
    """UTF-8 or, for lines of another hand in the same file, Windows-1252 with Latin-1 for its gaps: never fails."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        try:
            return line.decode("cp1252")
        except UnicodeDecodeError:
            return line.decode("latin-1")


def parse_record(line: bytes) -> Mapping[str, Any]:
    """One JSON object, or one Python dictionary literal.

    Raises:
        ValueError: neither, or something else than a dictionary.
    """
    text = decode(line).strip().removeprefix("\ufeff")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.startswith("{") or len(line) > MAX_LITERAL_BYTES:
            raise ValueError(f"not JSON: {error}") from None
        try:
            record = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"neither JSON ({error}) nor a Python literal") from None
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, expected an object with fields")
    return record


def refuse_array(path: Path, lines: Sequence[bytes | int]) -> None:
    """Refuse a file whose objects are the elements of one array: it has to be in memory whole to be read.

    Raises:
        UserError: the first lines open an array of objects.
    """
    head = b"".join(line for line in lines[:2] if isinstance(line, bytes)).removeprefix(b"\xef\xbb\xbf")
    if re.match(rb"\s*\[\s*(\{|$)", head):
        name = shlex.quote(str(path))
        raise UserError(
            f"input file {path} is one JSON array, expected one object per line",
            f"Convert it: `jq -c '.[]' {name} > NEW.jsonl`.",
        )


def records(
    path: Path, rejects: Rejects, *, max_line_bytes: int, allow_truncated: bool = False
) -> Iterator[tuple[int, Any]]:
    """(line number, line) of a file of JSON or literal lines; empty lines are skipped, too long ones put aside.

    Raises:
        UserError: missing or damaged file, or one array instead of lines.
    """
    with open_raw(path, rejects, allow_truncated=allow_truncated) as stream:
        for number, lines in line_blocks(stream, max_line_bytes):
            if number == 1:
                refuse_array(path, lines)
            for offset, line in enumerate(lines):
                if isinstance(line, int):
                    rejects.add(
                        f"{path}:{number + offset}", "LineTooLong", f"{line} bytes, at most {max_line_bytes} are read"
                    )
                elif line.strip():
                    yield number + offset, line


def estimate_rows(path: Path) -> int:
    """About how many rows a raw file has: exact for Parquet and for files of one block, else from the first block.

    Raises:
        UserError: missing or unreadable.
    """
    if path.suffix in (".parquet", ".pq"):
        import pyarrow.parquet as pq

        try:
            return int(pq.ParquetFile(path).metadata.num_rows)
        except (OSError, ValueError) as error:
            raise UserError(f"input file {path} is not a readable Parquet file: {error}") from None
    with path.open("rb") if path.is_file() else open_raw(path, Rejects(lambda _: None)) as raw:
        head = raw.read(1 << 20)
    size = path.stat().st_size
    with open_raw(path, Rejects(lambda _: None), allow_truncated=True) as stream:
        first = stream.read(_BLOCK_BYTES)
        rest = stream.read(1)
    if not rest:
        return first.count(b"\n") + (not first.endswith(b"\n") and bool(first))
    ratio = 1.0 if head == first[: len(head)] else 4.0  # text of reviews shrinks to about a quarter
    return int(first.count(b"\n") / len(first) * size * ratio)

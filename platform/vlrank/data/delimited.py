"""Delimited text as records: a quoted value may hold delimiters, quotes and line ends (RFC 4180).

Real files break the rules: an inch mark opens a value, a TSV writer never quotes. A quote that never closes, or that
would swallow rows which are whole by themselves, costs its own line and no other.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vlrank.data.rawfiles import decode

_BACKSLASH: dict[str, Any] = {
    "strict": True,
    "escapechar": "\\",
    "doublequote": False,
}  # as Spark and MySQL write quotes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a delimited file is written.

    Attributes:
        header: The columns' names as written, in order.
        delimiter: One character.
        quoting: Whether quotes mean anything; RecBole's atomic files have none.
        header_lines: How many lines the header takes at the start of the file.
    """

    header: tuple[str, ...]
    delimiter: str
    quoting: bool
    header_lines: int = 0

    def split(self, record: bytes) -> list[str]:
        """The values of one record.

        A record that breaks the rules of quoting is read as well as it can be: with quotes that end early or, in tab
        separated files, with quotes as plain characters.

        Raises:
            ValueError: not as many values as the header has names.
        """
        text, problem = _text(record), ""
        for options in self._readings(text):
            try:
                values = next(csv.reader([text], delimiter=self.delimiter, **options), [])
            except csv.Error as error:
                problem = problem or str(error)
                continue
            if len(values) == len(self.header):
                return values
            problem = problem or f"{len(values)} columns, expected {len(self.header)}"
        raise ValueError(problem)

    def _readings(self, text: str) -> Iterator[dict[str, Any]]:
        if self.quoting:
            yield {"strict": True}
        if self.quoting and '\\"' in text:
            yield _BACKSLASH
        if self.quoting and '"' in text:
            yield {"strict": False}
        if not self.quoting or ('"' in text and self.delimiter == "\t"):
            yield {"quoting": csv.QUOTE_NONE}


def read_dialect(lines: Sequence[bytes | int], delimiter: str, *, quoting: bool, names: Sequence[str] = ()) -> Dialect:
    """The dialect of a file that begins with these lines; without ``names`` the first record is the header.

    ``header`` is empty when the file is.
    """
    if names:
        return Dialect(tuple(names), delimiter, quoting)
    reader = csv.reader(_texts(lines), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE)
    header = next(reader, [])
    return Dialect(tuple(header), delimiter, quoting, reader.line_num)


@dataclass(frozen=True, slots=True)
class Records:
    """A block of records.

    Attributes:
        numbers: The line in which each record begins, from 1.
        records: Each as it is in the file, with line ends inside of quotes; the length in bytes of what is too long.
        text: All records, one after the other, when every one keeps to the rules; else None.
    """

    numbers: Sequence[int]
    records: Sequence[bytes | int]
    text: bytes | None


def record_blocks(
    blocks: Iterable[tuple[int, list[bytes | int]]],
    dialect: Dialect,
    is_row: Callable[[bytes], bool],
    max_record_bytes: int,
) -> Iterator[Records]:
    """Join the lines that quoted values run over.

    Args:
        blocks: As `vlrank.data.rawfiles.line_blocks` yields them, without the header.
        dialect: How the file is written.
        is_row: Whether a line is a whole row by itself, which continued text is not.
        max_record_bytes: A quoted value that is still open after this many bytes counts as never closed.
    """
    csv.field_size_limit(max_record_bytes)
    pending: list[bytes | int] = []
    number = 1
    for first_number, block in blocks:
        text = _joined(block)
        if not dialect.quoting or (not pending and text is not None and b'"' not in text):
            yield Records(range(first_number, first_number + len(block)), block, text)
            continue
        number, lines = first_number - len(pending), pending + block
        records, end = _join(number, lines, dialect, is_row, max_record_bytes)
        number, pending = number + end, lines[end:]
        yield records
    if pending:
        yield _join(number, pending, dialect, is_row, 0)[0]


def _joined(lines: Sequence[bytes | int]) -> bytes | None:
    try:
        return b"\n".join(lines)  # type: ignore[arg-type]
    except TypeError:  # a line that was too long stands as its length
        return None


def _join(
    number: int, lines: Sequence[bytes | int], dialect: Dialect, is_row: Callable[[bytes], bool], max_open_bytes: int
) -> tuple[Records, int]:
    """The records of some lines, and how many lines they take: an open one at the end is left, up to so many bytes."""
    numbers: list[int] = []
    records: list[bytes | int] = []
    regular, start = True, 0
    while start < len(lines):
        reader = csv.reader(_texts(islice(lines, start, None)), delimiter=dialect.delimiter, strict=True)
        begin, still_open = start, False
        try:
            for values in reader:
                end = start + reader.line_num
                record = _joined(lines[begin:end]) or b""
                misread = len(values) != len(dialect.header) and b'\\"' in record
                if misread or _swallows_rows(lines[begin:end], is_row):
                    break
                numbers.append(number + begin)
                records.append(record)
                begin = end
        except csv.Error as error:
            still_open = start + reader.line_num == len(lines) and "unexpected end of data" in str(error)
        start = begin
        if escaped := _escaped(lines, begin, dialect, is_row):
            numbers.append(number + begin)
            records.append(_joined(escaped) or b"")
            regular, start = False, begin + len(escaped)
            continue
        if still_open and len(_joined(lines[begin:]) or b"") <= max_open_bytes:
            break
        if begin < len(lines):  # a stray quote, or a line that is too long: a record begins in the next line
            numbers.append(number + begin)
            records.append(lines[begin])
            regular, start = False, begin + 1
    return Records(numbers, records, _joined(records) if regular else None), start


def _escaped(
    lines: Sequence[bytes | int], begin: int, dialect: Dialect, is_row: Callable[[bytes], bool]
) -> list[bytes | int]:
    """The lines of the record that begins there, if it is one whose quotes are escaped by backslashes."""
    reader = csv.reader(_texts(islice(lines, begin, None)), delimiter=dialect.delimiter, **_BACKSLASH)
    try:
        width = len(next(reader, []))
    except csv.Error:
        return []
    record = list(lines[begin : begin + reader.line_num])
    escaped = width == len(dialect.header) and b'\\"' in (_joined(record) or b"")
    return record if escaped and not _swallows_rows(record, is_row) else []


def _texts(lines: Iterable[bytes | int]) -> Iterator[str]:
    for line in lines:
        if isinstance(line, int):
            return
        yield _text(line) + "\n"


def _text(line: bytes) -> str:
    """A line or record; for the csv module a carriage return within would end it, even outside of quotes."""
    return decode(line).rstrip("\r").replace("\r", " ")


def _swallows_rows(lines: Sequence[Any], is_row: Callable[[bytes], bool]) -> bool:
    """Whether a value that a quote opened ran over whole rows: the quote was a plain character then."""
    if len(lines) < 2:
        return False
    first, *between, last = lines
    return any(map(is_row, between)) or (is_row(last) and is_row(first))

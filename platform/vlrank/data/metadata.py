"""Item metadata from raw files: one pass, only the rows that interactions need, every field cleaned or the row put
aside.

`vlrank.data.sources` lists the fields of the public data sets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlrank.data.cells import parse_cell
from vlrank.data.columns import open_parquet, parquet_column, read_batches
from vlrank.data.delimited import record_blocks
from vlrank.data.rawfiles import Rejects, decode, excerpt, line_blocks, open_raw, parse_record, printable, records
from vlrank.data.sources import (
    RawOptions,
    find_roles,
    first_value,
    identifier,
    kind_of,
    plain_id,
    plain_ids,
    plain_name,
    read_header,
)
from vlrank.data.text import MAX_RAW_CHARS, clean_brand, clean_categories, clean_description, clean_title

_PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
_ROLES = ("item", "title", "brand", "categories", "description", "image")


@dataclass(frozen=True, slots=True)
class Item:
    """One clean item; ``image`` is a URL or the absolute path of a picture."""

    source_id: str
    title: str
    brand: str | None
    categories: tuple[str, ...]
    description: str | None
    image: str | None

    @property
    def has_text(self) -> bool:
        """Whether anything can be shown of the item."""
        return bool(self.title or self.brand or self.categories or self.description)


def items(
    path: Path, wanted: Set[str], options: RawOptions, rejects: Rejects, max_chars: int
) -> Iterator[tuple[str, Item]]:
    """(key for the quarantine, item) for the rows whose id is wanted, in file order, titles possibly empty.

    Rows that nobody wants are passed over, as far as possible without parsing them.

    Raises:
        UserError: missing or damaged file, no item column.
    """
    names = {role: options.names(role) for role in _ROLES}
    root = options.image_root or path.parent
    for number, record in _item_records(path, wanted, options, rejects):
        key = f"{path}:{number}"
        try:
            source_id = identifier(first_value(record, names["item"]), "item")
            if source_id in wanted:
                yield key, _clean_item(source_id, record, names, root, max_chars)
        except ValueError as error:
            rejects.add(key, "BadMetadata", f"{error}; the row: {excerpt(str(record)[:1000])}")


def _item_records(
    path: Path, wanted: Set[str], options: RawOptions, rejects: Rejects
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    kind = kind_of(path)
    if kind == "json":
        yield from _json_items(path, wanted, options, rejects)
    elif kind == "delimited":
        yield from _delimited_items(path, wanted, options, rejects)
    else:
        yield from _parquet_items(path, wanted, options)


def _json_items(
    path: Path, wanted: Set[str], options: RawOptions, rejects: Rejects
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    names = b"|".join(re.escape(name).encode() for name in options.names("item"))
    shown_ids = re.compile(rb"[\"'](?:" + names + rb")[\"']\s*:\s*[\"']([^\"']*)[\"']")
    lines = records(path, rejects, max_line_bytes=options.max_line_bytes, allow_truncated=options.allow_truncated)
    for number, line in lines:
        # Parsing is what costs. A line is passed over when it shows ids and none is wanted; ids with escapes, or none
        # that the pattern finds, leave the decision to the parser.
        shown = shown_ids.findall(line)
        if shown and not any(b"\\" in value or plain_id(decode(value)) in wanted for value in shown):
            continue
        try:
            yield number, parse_record(line)
        except ValueError as error:
            rejects.add(f"{path}:{number}", "BadMetadata", f"{error}; the line: {excerpt(line)}")


def _delimited_items(
    path: Path, wanted: Set[str], options: RawOptions, rejects: Rejects
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a delimited file; keys are the line in which a row begins."""
    with open_raw(path, rejects, allow_truncated=options.allow_truncated) as stream:
        blocks = line_blocks(stream, options.max_line_bytes)
        dialect, roles, blocks = read_header(path, blocks, options, {"item"}, _ROLES)
        names, id_place = [plain_name(column) for column in dialect.header], dialect.header.index(roles["item"])

        def is_row(line: bytes) -> bool:
            try:
                return identifier(dialect.split(line)[id_place], "item") in wanted
            except ValueError:
                return False

        for found in record_blocks(blocks, dialect, is_row, options.max_line_bytes):
            for number, record in zip(found.numbers, found.records, strict=True):
                if isinstance(record, int):
                    rejects.add(f"{path}:{number}", "LineTooLong", f"{record} bytes")
                elif record.strip():
                    try:
                        yield number, dict(zip(names, dialect.split(record), strict=True))
                    except ValueError as error:
                        rejects.add(f"{path}:{number}", "BadMetadata", f"{error}; the row: {excerpt(record)}")


def _parquet_items(path: Path, wanted: Set[str], options: RawOptions) -> Iterator[tuple[int, Mapping[str, Any]]]:
    file = open_parquet(path)
    schema = file.schema_arrow
    id_column = find_roles(path, schema.names, options, {"item"}, _ROLES)["item"]
    known = {name for role in _ROLES for name in options.names(role)}
    names = {name: plain_name(name) for name in schema.names if plain_name(name) in known}
    number = 1
    for batch in read_batches(path, file, 65_536, list(names)):
        ids = plain_ids(parquet_column(path, "item", id_column, batch.column(id_column))).to_pylist()
        mine = [row for row, source_id in enumerate(ids) if source_id in wanted]
        rows = batch.take(pa.array(mine, pa.int64())).to_pylist(maps_as_pydicts="lossy")
        for row, record in zip(mine, rows, strict=True):
            yield (
                number + row,
                {names[name]: value for name, value in record.items()} | {names[id_column]: ids[row]},
            )
        number += len(batch)


def _clean_item(
    source_id: str, record: Mapping[str, Any], names: Mapping[str, Sequence[str]], image_root: Path, max_chars: int
) -> Item:
    raw = {role: _first_cell(record, names[role]) for role in _ROLES[1:]}
    return Item(
        source_id,
        clean_title(" ".join(_strings(raw["title"], "title")), max_chars),
        clean_brand(" ".join(_strings(raw["brand"], "brand"))) or None,
        tuple(clean_categories(_category_names(raw["categories"]))),
        # Longer than in the composed text, for readers of the table; still cut.
        clean_description(" ".join(_strings(raw["description"], "description")), 4 * max_chars) or None,
        _image(raw["image"], image_root),
    )


def _first_cell(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What the first of these columns that is there and not empty means."""
    cells = (parse_cell(record[name]) for name in names if name in record)
    return next((value for value in cells if value is not None), None)


def _strings(value: Any, field: str) -> list[str]:
    """A text field as a list of strings: strings, numbers and (nested) lists of them.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [value[:MAX_RAW_CHARS]]
    if isinstance(value, list | tuple):
        return [text for part in value[:1000] for text in _strings(part, field)]
    if isinstance(value, int | float | Decimal | date) and not isinstance(value, bool):
        return [] if isinstance(value, float) and not math.isfinite(value) else [str(value)]
    if isinstance(value, bytes):
        return [decode(value[:MAX_RAW_CHARS])]
    raise ValueError(f"{field} is a {type(value).__name__}, expected text")


def _category_names(value: Any) -> list[str]:
    names = _strings(value, "categories")
    return [part for name in names for part in re.split(r"[|>]", name)] if isinstance(value, str) else names


def _image(value: Any, root: Path) -> str | None:
    """The best picture of a row: a URL, or the absolute path of a file below ``root``.

    Amazon 2023 lists pictures as dictionaries of sizes (and, in its Parquet form, as a dictionary of lists), the
    product photo first or marked MAIN.
    """
    if isinstance(value, Mapping):
        lists = [value.get(size) for size in ("hi_res", "large", "thumb", "url", "path")]
        value = [url for found in lists if found for url in (found if isinstance(found, list) else [found]) if url]
    if isinstance(value, list | tuple):
        pictures = [part for part in value if part]
        main = [part for part in pictures if isinstance(part, Mapping) and part.get("variant") == "MAIN"]
        return _image((main or pictures)[0], root) if pictures else None
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return None
    text = printable(value.strip())
    if text[0] in "[{(" and Path(text).suffix.lower() not in _PICTURE_SUFFIXES:  # a list that was cut off, no path
        found = re.search(r"https?://[^\s'\"()\[\]{}]+", text)
        return found[0] if found else None
    if text.startswith("//"):
        return f"https:{text}"  # web pages leave the scheme to the browser
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", text):
        return text  # a URL; the picture stage says what it thinks of other schemes than http(s)
    return str((root / text).absolute())

"""The picture stage of a dataset: what is known, what is missing, and committing it shard by shard.

While pictures come they lie beside the dataset in ``.NAME.pictures``, so that an interrupted run loses one shard at
most and leaves no half dataset. A source that succeeded is never fetched again, one that failed only on request.
For a dataset in a bucket that place is in the bucket, too, and taking a picture is a copy that the server makes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from vlrank.config import PrepareConfig
from vlrank.console import progress
from vlrank.data import schemas
from vlrank.data.dataset import store_image
from vlrank.data.images import Fetched, fetch_pictures
from vlrank.data.tables import atomic_path, disk_errors, next_file, read_parquet, write_parquet_atomic
from vlrank.errors import UserError
from vlrank.storage import BucketPath, Location, listing, remove_tree, several


@dataclass(frozen=True, slots=True)
class Known:
    """What became of one source.

    Attributes:
        root: Folder that ``image_path`` is relative to.
        image_path: ``images/ab/<sha256>.jpg``; None after a failure.
        error_type: None after a success.
        message: The reason of a failure.
    """

    root: Location
    image_path: str | None
    error_type: str | None
    message: str | None


def work_folder(target: Location) -> Location:
    """Where fetched pictures are kept until the dataset links or copies them."""
    return target.with_name(f".{target.name}.pictures")


def fetch(target: Location, sources: Sequence[str], config: PrepareConfig) -> dict[str, Known]:
    """The outcome of every source, after fetching untried ones (and, with ``retry_failed``, failed ones).

    Args:
        target: The dataset folder, existing or not.
        sources: URLs and paths; repetitions are fetched once.
        config: Limits, workers and ``retry_failed``.

    Raises:
        UserError: no space left, or none of the pictures exists.
    """
    work = work_folder(target)
    known = _known(target, target / "pictures.parquet", schemas.PICTURES) if target.exists() else {}
    for shard in listing(work / "fetched", "[!.]*.parquet"):
        known |= _known(work, shard, schemas.FETCHED)
    wanted = dict.fromkeys(sources)
    pending = [source for source in wanted if _is_pending(known.get(source), config.retry_failed)]
    if pending:
        failed = 0
        with progress("pictures", len(pending)) as bar:
            for shard_rows in fetch_pictures(pending, config.pictures, config.ray):
                known |= _commit(work, shard_rows)
                failed += sum(row.data is None for row in shard_rows)
                bar.advance(len(shard_rows), note=f"{failed} failed" if failed else None)
    if known and all(fate.error_type == "FileNotFound" for fate in known.values()):
        remove_tree(work)  # these are no failures to remember: the next run looks for them again
        raise UserError(
            f"no picture that the metadata names exists: {next(iter(known))}"
            + (f" and {len(known) - 1:,} more" if len(known) > 1 else ""),
            "Give the folder that the names are relative to: --image_root FOLDER.",
        )
    return {source: known[source] for source in wanted if source in known}


def _known(root: Location, table: Location, schema: Any) -> dict[str, Known]:
    if not table.exists():
        return {}
    tried = read_parquet(table, schema).filter(pl.col("image_path").is_not_null() | pl.col("error_type").is_not_null())
    rows = tried.select("source", "image_path", "error_type", "message").iter_rows()
    present = _present(root)
    # A picture that somebody deleted counts as never fetched.
    return {source: Known(root, path, *rest) for source, path, *rest in rows if path is None or present(path)}


def _present(root: Location) -> Callable[[str], bool]:
    """Whether each picture exists below ``root``; a bucket is listed once."""
    if isinstance(root, BucketPath):
        there = {str(file.relative_to(root)) for file in (root / "images").files()}
        return there.__contains__
    return lambda path: (root / path).is_file()


def _is_pending(known: Known | None, retry_failed: bool) -> bool:
    if known is None:
        return not retry_failed
    return retry_failed and known.image_path is None


def _commit(work: Location, rows: Sequence[Fetched]) -> dict[str, Known]:
    """Store a shard: first its pictures, then the table that says they are there."""

    def store(row: Fetched) -> str | None:
        return None if row.data is None or row.suffix is None else store_image(work, row.data, row.suffix, sync=False)

    with disk_errors(work):
        paths = several(store, rows, at_once=isinstance(work, BucketPath))
        known = {
            row.source: Known(work, path, row.error_type, row.message) for row, path in zip(rows, paths, strict=True)
        }
        if isinstance(work, Path):
            os.sync()
    table = [
        {"source": source, "image_path": fate.image_path, "error_type": fate.error_type, "message": fate.message}
        for source, fate in known.items()
    ]
    write_parquet_atomic(table, next_file(work / "fetched"), schemas.FETCHED)
    return known


def adopt(found: Iterable[Known], folder: Location) -> None:
    """Bring the pictures into a dataset folder: as hard links where the file system has them, else as copies."""
    if isinstance(folder, BucketPath):
        present = _present(folder)
        missing = {fate.image_path: fate.root for fate in found if fate.image_path and not present(fate.image_path)}

        def copy(name: str) -> None:
            source = missing[name] / name
            assert isinstance(source, BucketPath)  # pictures fetched for a bucket are stored in the bucket
            source.copy_to(folder / name)

        list(several(copy, list(missing), at_once=True))
        return
    with disk_errors(folder):
        for fate in found:
            if fate.image_path is None or (folder / fate.image_path).exists():
                continue
            assert isinstance(fate.root, Path)
            place = folder / fate.image_path
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(fate.root / fate.image_path, place)
            except OSError:
                with atomic_path(place) as temporary:
                    shutil.copyfile(fate.root / fate.image_path, temporary)


def pictures_table(wanted: pl.DataFrame, found: Mapping[str, Known]) -> pl.DataFrame:
    """``wanted`` (item_id, source) with what became of each source (`schemas.PICTURES`)."""
    fates = [found.get(source) for source in wanted["source"].to_list()]
    return wanted.select("item_id", "source").with_columns(
        pl.Series("image_path", [fate and fate.image_path for fate in fates], pl.String),
        pl.Series("error_type", [fate and fate.error_type for fate in fates], pl.String),
        pl.Series("message", [fate and fate.message for fate in fates], pl.String),
    )


def place_in_items(items: pl.DataFrame, pictures: pl.DataFrame) -> pl.DataFrame:
    """The items table with the ``image_path`` of each item that has a picture."""
    paths = pictures.select("item_id", "image_path")
    return items.drop("image_path", strict=False).join(paths, on="item_id", how="left", maintain_order="left")


def rejects(pictures: pl.DataFrame) -> Iterator[dict[str, str]]:
    """The failures as quarantine rows."""
    failed = pictures.filter(pl.col("error_type").is_not_null())
    for item_id, source, error_type, message in failed.select("item_id", "source", "error_type", "message").iter_rows():
        place = "" if source in message else f" ({source})"
        yield {"key": str(item_id), "error_type": error_type, "message": f"{message}{place}"}


def counts(pictures: pl.DataFrame, *, asked: bool) -> dict[str, int | bool]:
    """For the manifest: how many items have a source, a picture, a failure."""
    return {
        "asked": asked,
        "sources": len(pictures),
        "stored": len(pictures) - pictures["image_path"].null_count(),
        "failed": len(pictures) - pictures["error_type"].null_count(),
    }

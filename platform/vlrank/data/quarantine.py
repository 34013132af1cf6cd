"""Rows that a stage could not use, put aside with their reason: ``DATASET/quarantine/STAGE/*.parquet``.

`write_quarantine` is for stages that know all their bad rows at once. Bulk stages (`vlrank.bulk`) commit bad rows shard
by shard, together with the good ones, and take folder and columns from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import polars as pl

from vlrank.data import schemas
from vlrank.data.tables import empty_frame, next_file, read_parquet, write_parquet_atomic
from vlrank.storage import Location, each, listing


def quarantine_folder(folder: Location, stage: str) -> Location:
    """Where a stage's bad rows are, below the dataset folder."""
    return folder / "quarantine" / stage


def bulk_rows(bad: pl.DataFrame, key: str, stage: str) -> pl.DataFrame:
    """Bad rows of a bulk stage as they are put aside: `schemas.BULK_QUARANTINE`.

    Args:
        bad: Columns ``key``, ``error_type``, ``error`` and ``input_hash``.
        key: The column that identifies a row.
        stage: Name of the stage.
    """
    return bad.select(
        pl.col(key).cast(pl.String).alias("key"),
        pl.lit(stage).alias("stage"),
        pl.col("error_type").fill_null("Error"),
        pl.col("error").fill_null("").alias("message"),
        "input_hash",
    ).select(schemas.BULK_QUARANTINE.names)


def write_quarantine(folder: Location, stage: str, rows: Iterable[Mapping[str, Any]], *, replace: bool = False) -> None:
    """Put rows aside with their reason.

    Args:
        folder: The dataset folder.
        stage: Name of the stage, a plain file name.
        rows: Mappings with ``key``, ``error_type`` and ``message``.
        replace: The rows are all that is wrong now; drop those of earlier runs.
    """
    table = [
        {"key": str(r["key"]), "stage": stage, "error_type": str(r["error_type"]), "message": str(r["message"])}
        for r in rows
    ]
    old = listing(quarantine_folder(folder, stage), "[!.]*.parquet") if replace else []
    if table:
        write_parquet_atomic(table, next_file(quarantine_folder(folder, stage)), schemas.QUARANTINE)
    for file in old:
        file.unlink()


def read_quarantine(folder: Location, stage: str) -> pl.DataFrame:
    """The rows that a stage put aside (`schemas.QUARANTINE`), oldest first; empty when there are none."""
    files = listing(quarantine_folder(folder, stage), "[!.]*.parquet")
    return pl.concat([empty_frame(schemas.QUARANTINE), *each(partial(read_parquet, schema=schemas.QUARANTINE), files)])


def by_error(table: pl.DataFrame) -> str:
    """Rows by kind of error, the most frequent first: ``3 Quality.empty, 1 PictureBroken``."""
    by_type = table.group_by("error_type").len().sort(["len", "error_type"], descending=[True, False])
    return ", ".join(f"{n:,} {error_type}" for error_type, n in by_type.iter_rows())

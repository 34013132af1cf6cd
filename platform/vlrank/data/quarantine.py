"""Rows that a stage could not use, put aside with their reason: ``DATASET/quarantine/STAGE/*.parquet``.

Every stage but the bulk ones writes them here. Bulk stages commit bad rows together with good ones, shard by shard (see
`vlrank.bulk`), in the same place and with the same columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import polars as pl

from vlrank.data import schemas
from vlrank.data.tables import empty_frame, next_file, read_parquet, write_parquet_atomic
from vlrank.storage import Location, each, listing


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
    old = listing(folder / "quarantine" / stage, "[!.]*.parquet") if replace else []
    if table:
        write_parquet_atomic(table, next_file(folder / "quarantine" / stage), schemas.QUARANTINE)
    for file in old:
        file.unlink()


def read_quarantine(folder: Location, stage: str) -> pl.DataFrame:
    """The rows that a stage put aside (`schemas.QUARANTINE`), oldest first; empty when there are none."""
    files = listing(folder / "quarantine" / stage, "[!.]*.parquet")
    return pl.concat([empty_frame(schemas.QUARANTINE), *each(partial(read_parquet, schema=schemas.QUARANTINE), files)])

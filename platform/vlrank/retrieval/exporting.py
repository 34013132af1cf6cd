"""``vlrank lists``: candidates or rankings for other programs, with the ids of the raw data."""

from __future__ import annotations

import shlex

import polars as pl
import pyarrow as pa

from vlrank.config import ListsConfig
from vlrank.console import Summary
from vlrank.data.candidates_io import check_output, long_table, write_rankings
from vlrank.data.dataset import Dataset
from vlrank.data.tables import write_parquet_atomic
from vlrank.errors import UserError
from vlrank.retrieval.importing import read_candidates
from vlrank.storage import fetch, location

_LONG = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("score", pa.float32()), ("rank", pa.int64())])


def run(config: ListsConfig) -> Summary:
    """Write one split of some lists.

    Raises:
        UserError: no such lists, none of the split, or an output that cannot hold them.
    """
    dataset = Dataset.open(config.dataset)
    check_output(config.out, dataset)
    table = _lists(config, dataset).filter(pl.col("split") == config.split).sort("user_id")
    if table.is_empty():
        raise UserError(f"{config.lists} holds no lists of the split {config.split}", "Choose another with split=val.")
    if config.out.suffix.lower() == ".parquet":
        write_parquet_atomic(long_table(table, dataset), config.out, _LONG)
    else:
        write_rankings(table.with_columns(source=pl.lit(location(config.lists).stem)), config.out, dataset=dataset)
    items = int(table["item_ids"].list.len().sum())
    lines = {"lists": f"{len(table):,} of {config.split} users, {items:,} items", "ids": "those of the raw data"}
    return Summary(f"lists: {config.lists}", lines, config.out, {"users": len(table), "items": items})


def _lists(config: ListsConfig, dataset: Dataset) -> pl.DataFrame:
    if config.lists in dataset.candidate_names():
        return dataset.candidates(config.lists)
    path = location(config.lists)
    if not path.is_file():
        known = ", ".join(dataset.candidate_names()) or "none"
        raise UserError(
            f"{config.lists!r} is neither candidates of {dataset.path} (which are {known}) nor a file",
            f"Example: vlrank lists {shlex.quote(str(dataset.path))} --lists als --out als.tsv",
        )
    return read_candidates(fetch(path), dataset, split=config.split).table

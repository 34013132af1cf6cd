"""A dataset whose items have summaries, for tests of what ranks with them."""

import shutil
from pathlib import Path

import polars as pl

from vlrank.data.dataset import Dataset


def with_summaries(dataset: Dataset, path: Path) -> Dataset:
    """A copy at ``path`` in which item i has the summary "summary i"."""
    shutil.copytree(dataset.path, path)
    copy = Dataset.open(path)
    rows = [
        {"item_id": i, "text": f"summary {i}", "model": "m", "prompt_id": "p", "input_hash": str(i)}
        for i in range(1, copy.n_items + 1)
    ]
    copy.add_generated("semantic_summary", pl.DataFrame(rows, schema_overrides={"item_id": pl.Int32}))
    return Dataset.open(path)

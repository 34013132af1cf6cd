"""A small world with two tastes, and Amazon Beauty as a dataset."""

import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from vlrank.data.dataset import Dataset, write_dataset


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """80 users, 60 items in two halves (odd: tea, even: tools); everyone stays in one half."""
    rng = np.random.default_rng(7)
    names = {0: ("steel hammer", "Tools"), 1: ("green tea", "Tea")}
    items = [
        {
            "item_id": item,
            "source_id": f"B{item:03d}",
            "text": f"{names[item % 2][0]} {item}",
            "title": f"{names[item % 2][0]} {item}",
            "brand": "Acme",
            "categories": [names[item % 2][1], "All"],
            "description": "",
            "image_path": None,
            "image_url": None,
        }
        for item in range(1, 61)
    ]
    sequences = []
    for user in range(1, 81):
        half = np.arange(2 - user % 2, 61, 2)
        weights = 1 / np.arange(1, len(half) + 1)
        history = rng.choice(half, size=int(rng.integers(4, 12)), replace=False, p=weights / weights.sum()).tolist()
        start = int(rng.integers(0, 1000))
        sequences.append(
            {
                "user_id": user,
                "source_user": f"U{user:03d}",
                "item_ids": history,
                "timestamps": [start + 10 * step for step in range(len(history))],
            }
        )
    return write_dataset(tmp_path_factory.mktemp("world") / "data", items=items, sequences=sequences, options={})


@pytest.fixture(scope="session")
def beauty(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Amazon Beauty 2014 (5-core) as a dataset; skipped without the research data."""
    folder = shared_data / "beauty2014"
    with gzip.open(folder / "items.jsonl.gz", "rt", encoding="utf-8") as lines:
        raw = [json.loads(line) for line in lines]
    known = {row["asin"]: row for row in raw}
    clicks = pl.read_csv(folder / "interactions.csv.gz").sort("user", "pos")
    asins = sorted(clicks["asin"].unique())
    ids = {asin: number for number, asin in enumerate(asins, start=1)}
    items = []
    for asin, item_id in ids.items():
        row = known.get(asin, {})
        title, categories = row.get("title") or "", row.get("categories") or [[]]
        items.append(
            {
                "item_id": item_id,
                "source_id": asin,
                "text": " ".join(filter(None, [row.get("brand"), title])) or asin,
                "title": title,
                "brand": row.get("brand"),
                "categories": categories[0],
                "description": None,
                "image_path": None,
                "image_url": None,
            }
        )
    grouped = (
        clicks.with_columns(item=pl.col("asin").replace_strict(ids, return_dtype=pl.Int32))
        .group_by("user", maintain_order=True)
        .agg("item", "unixReviewTime")
        .sort("user")
    )
    sequences = [
        {"user_id": number, "source_user": user, "item_ids": item_ids, "timestamps": times}
        for number, (user, item_ids, times) in enumerate(grouped.iter_rows(), start=1)
    ]
    path = tmp_path_factory.mktemp("beauty") / "data"
    return write_dataset(path, items=items, sequences=sequences, options={})

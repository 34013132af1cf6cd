"""A small world with two tastes, and Amazon Beauty as a dataset."""

from pathlib import Path

import numpy as np
import pytest

from vlrank.config import PrepareConfig
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
    """Amazon Beauty 2014 (5-core), prepared whole; skipped without the research data."""
    from vlrank.data.prepare import run

    folder, out = shared_data / "beauty2014", tmp_path_factory.mktemp("beauty") / "data"
    reviews, meta = (folder / "interactions.csv.gz",), (folder / "items.jsonl.gz",)
    run(PrepareConfig(reviews=reviews, meta=meta, out=out, min_uc=1, min_sc=1, keep_untitled=True))
    return Dataset.open(out)

"""A shop whose items have captions and summaries, and settings that train a tiny model in seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlrank.config import RayConfig, TrainConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.runtime import ray_session


@pytest.fixture(scope="session")
def told_shop(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The small shop with a caption and a summary of every item."""
    path = tmp_path_factory.mktemp("told") / "shop"
    shutil.copytree(shop.path, path)
    dataset = Dataset.open(path)
    for what in ("caption", "semantic_summary"):
        rows = [
            {"item_id": i, "text": f"{what} of {meta['text'][:20]}", "model": "m", "prompt_id": "p", "input_hash": "h"}
            for i, meta in dataset.item_meta().items()
        ]
        dataset.add_generated(what, rows)  # type: ignore[arg-type]
    return dataset


@pytest.fixture
def settings(
    told_shop: Dataset, tiny_text_model: Path, tiny_vision_model: Path, tmp_path: Path
) -> Callable[..., TrainConfig]:
    """A config of a short run; keyword arguments change it."""

    def make(mode: str = "caption", **changes: Any) -> TrainConfig:
        values = {
            "dataset": told_shop.path,
            "out": tmp_path / "run",
            "mode": mode,
            "model": str(tiny_text_model if mode == "semantic_summary_small" else tiny_vision_model),
            "epochs": 2,
            "batch_size": 16,
            "lr": 1e-3,
            "val_users": 24,
            "ranking": {"max_history": 4, "max_item_chars": 80},
        }
        return load_config(TrainConfig, **{**values, **changes})

    return make


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One Ray for a module."""
    with ray_session(RayConfig(num_cpus=4)):
        yield

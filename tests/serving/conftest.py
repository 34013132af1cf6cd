"""A dataset with summaries, and runs as training leaves them."""

import shutil
from pathlib import Path

import pytest

from tests.summaries import with_summaries
from vlrank.data.dataset import Dataset
from vlrank.data.tables import atomic_write_json

SUMMARIES = "semantic_summary_small"


@pytest.fixture(scope="session")
def dataset(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The shop with a summary of every item."""
    return with_summaries(shop, tmp_path_factory.mktemp("serving") / "shop")


def run_folder(folder: Path, model: Path, mode: str, **ranking: object) -> Path:
    """A run folder with one checkpoint that says what it was trained for."""
    checkpoint = folder / "qwen3vl_rerank" / "checkpoint-3"
    shutil.copytree(model, checkpoint)
    family = "vision" if mode == "raw_image" else "text"
    settings = {"top_k": 50, "max_history": 5, "max_item_chars": 60, **ranking}
    atomic_write_json(checkpoint / "vlrank.json", {"mode": mode, "family": family, "ranking": settings})
    atomic_write_json(folder / "best.json", {"checkpoint": "qwen3vl_rerank/checkpoint-3"})
    return folder


@pytest.fixture(scope="session")
def run(tiny_text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Averages over two orders of the candidates, which a user's number decides."""
    return run_folder(tmp_path_factory.mktemp("runs") / "first", tiny_text_model, SUMMARIES, permutations=2)

"""Real raw files through every stage by the command line, on small slices and tiny models, in one Ray cluster.

What a user would lose: the commands of the README in a row, each taking what the one before left behind.
"""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from vlrank.cli import cli
from vlrank.config import RayConfig
from vlrank.console import Summary
from vlrank.data.dataset import Dataset
from vlrank.demo.base_models import make_demo_models
from vlrank.runtime import ray_session

pytestmark = [pytest.mark.stack, pytest.mark.shared_data]

TINY_TRAINING = (
    "epochs=1",
    "val_users=16",
    "negatives=5",
    "metric=recall@1",
    "ranking.max_history=3",
    "ranking.max_item_chars=60",
    "lr=1e-3",
)
ENGINE = ("engine.name=transformers", "engine.batch_size=16")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_session(RayConfig(address="local", num_cpus=8)):
        yield


def vlrank(*arguments: object) -> Summary:
    summary = cli.main([str(argument) for argument in arguments], standalone_mode=False)
    assert isinstance(summary, Summary)
    return summary


def rank_and_evaluate(dataset: Path, run: Path, folder: Path, *, users: int) -> dict[str, object]:
    rankings = folder / "rankings.parquet"
    vlrank("rerank", dataset, "--model", run, "--out", rankings, "--limit", users, "ray.address=local", *ENGINE)
    table = pl.read_parquet(rankings)
    assert table["user_id"].n_unique() == len(table) <= users
    assert table["item_ids"].list.len().max() == 20
    vlrank("evaluate", dataset, "--rankings", rankings, "--out", folder / "report", "--bootstrap", 200)
    assert (folder / "report" / "report.html").stat().st_size > 100_000
    metrics: dict[str, object] = json.loads((folder / "report" / "metrics.json").read_text())
    return metrics


def test_gift_cards_from_raw_amazon_files_to_a_report(shared_data: Path, tmp_path: Path) -> None:
    raw = shared_data / "gift_cards2018"
    model = that_always_answers(make_demo_models(tmp_path / "models")["text"])
    dataset, run = tmp_path / "gift_cards", tmp_path / "run"
    vlrank(
        *("prepare", "--reviews", raw / "Gift_Cards_5.json.gz", "--meta", raw / "meta_Gift_Cards.json.gz"),
        *("--out", dataset, "--min_rating", 3, "--min_uc", 5, "--min_sc", 5),
    )
    generated = vlrank(
        *("generate", dataset, "--what", "semantic_summary", "--model", model),
        *("--max_tokens", 8, "--no_quality", *ENGINE),
    )
    items = Dataset.open(dataset).n_items
    assert generated.counts["done"] == items > 50
    assert all(row["semantic_summary"] for row in Dataset.open(dataset).item_meta().values())
    vlrank(
        *("train", dataset, "--mode", "semantic_summary_small", "--model", model),
        *("--out", run, "--batch_size", 32, *TINY_TRAINING),
    )
    metrics = rank_and_evaluate(dataset, run, tmp_path, users=40)
    assert "semantic_summary_small" in json.dumps(metrics)


def that_always_answers(folder: Path) -> Path:
    """Tiny models often say nothing of things they have never seen; without an end token's logit they go on."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    weights = load_file(folder / "model.safetensors")
    # Input and output share the matrix: a zero row has logit 0, and one of the other thousand is always above it.
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(folder).all_special_ids] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_hm_photos_through_captions_and_raw_image(shared_data: Path, tiny_vision_model: Path, tmp_path: Path) -> None:
    reviews, meta = slice_of_hm(shared_data / "hm", tmp_path, users=60)
    dataset, run = tmp_path / "hm", tmp_path / "run"
    vlrank(
        *("prepare", "--reviews", reviews, "--meta", meta, "--out", dataset, "--min_uc", 5, "--min_sc", 1),
        *("--use_image", "--image_root", shared_data / "hm"),
    )
    prepared = Dataset.open(dataset)
    assert prepared.items()["image_path"].null_count() == 0
    captions = vlrank(
        *("generate", dataset, "--what", "caption", "--model", tiny_vision_model, "--limit", 24),
        *("--max_tokens", 8, "--image_side", 64, "--no_quality", *ENGINE),
    )
    assert captions.counts["done"] == 24
    vlrank(
        *("train", dataset, "--mode", "raw_image", "--model", tiny_vision_model, "--out", run, "--batch_size", 16),
        *(*TINY_TRAINING, "ranking.max_image_pixels=1024"),
    )
    rank_and_evaluate(dataset, run, tmp_path, users=20)


def slice_of_hm(folder: Path, target: Path, *, users: int) -> tuple[Path, Path]:
    """The purchases of the first users and the products in them."""
    with (folder / "interactions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = sorted({row["user"] for row in rows})[:users]
    kept = [row for row in rows if row["user"] in set(chosen)]
    products = {row["asin"] for row in kept}
    reviews, meta = target / "interactions.csv", target / "items.jsonl.gz"
    with reviews.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["user", "asin", "unixReviewTime"])
        writer.writeheader()
        writer.writerows(kept)
    lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    with gzip.open(meta, "wt", encoding="utf-8") as out:
        out.writelines(line for line in lines if json.loads(line)["asin"] in products)
    return reviews, meta

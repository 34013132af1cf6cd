"""Do pixels carry signal? ``raw_image`` trained on H&M purchases, beside the same model with pictures swapped.

    python bench/hm_pixels.py --data HM --out bench/results/hm_pixels.json [--model QWEN3_VL_FOLDER] [KEY=VALUE ...]

``HM`` holds ``interactions.csv``, ``items.jsonl`` and ``images/``. In the second dataset every item shows another
item's picture (one seeded permutation): a model can still learn which pictures sell, and nothing else from them.
Both are trained alike (KEY=VALUE changes any setting of ``vlrank train``) for every seed, and rank the same lists: each
test user's target and 19 items at random. The paired difference is over users, with the mean over seeds of each.
Without ``--model`` the demo's tiny vision model is trained, from pictures of 32 x 32 pixels.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from generate import machine

METRICS = ("recall@1", "recall@5", "ndcg@10")


def main() -> None:
    """Prepare, train, rank, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of vlrank train")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlrank-hm-") as name:
        folder = Path(name)
        datasets = make_datasets(options.data, folder)
        model = options.model or demo_model(folder)
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in datasets}
        for seed in range(options.seeds):
            for kind, dataset in datasets.items():
                runs[kind].append(train_and_rank(dataset, model, folder / f"{kind}-{seed}", seed, options.settings))
                facts = {key: value for key, value in runs[kind][-1].items() if key != "ranks"}
                print(json.dumps({"pictures": kind} | facts), file=sys.stderr, flush=True)
        report = {
            "command": " ".join(["python", "bench/hm_pixels.py", *public(sys.argv[1:])]),
            "machine": machine(),
            "model": "demo" if options.model is None else options.model.name,
            "runs": {kind: [{k: v for k, v in run.items() if k != "ranks"} for run in of] for kind, of in runs.items()},
            "own_minus_swapped": compare(runs),
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["own_minus_swapped"]))


def public(arguments: list[str]) -> list[str]:
    """Without the machine's own folders."""
    return [Path(argument).name if argument.startswith("/") else argument for argument in arguments]


def make_datasets(data: Path, folder: Path) -> dict[str, Path]:
    """H&M with every item's own picture, and with another item's."""
    import polars as pl

    from vlrank.config import PrepareConfig, load_config
    from vlrank.data.dataset import Dataset
    from vlrank.data.prepare import run

    own, swapped = folder / "own", folder / "swapped"
    values = {"reviews": [data / "interactions.csv"], "meta": [data / "items.jsonl"], "out": own}
    run(load_config(PrepareConfig, **values, min_uc=5, min_sc=3, use_image=True, pictures={"workers": 0}))
    shutil.copytree(own, swapped)
    dataset = Dataset.open(swapped)
    items = dataset.items()
    ring = np.random.default_rng(0).permutation(items.height)
    order = np.empty_like(ring)
    order[ring] = np.roll(ring, 1)  # one cycle through all items: none keeps its own
    dataset.update_items(items.with_columns(pl.Series("image_path", items["image_path"].to_list())[order.tolist()]))
    return {"own": own, "swapped": swapped}


def demo_model(folder: Path) -> Path:
    """The demo's base model."""
    from vlrank.demo.base_models import make_demo_models

    return make_demo_models(folder / "models")["vision"]


def train_and_rank(dataset: Path, model: Path, out: Path, seed: int, settings: list[str]) -> dict[str, Any]:
    """One run, and the rank of every test user's target."""
    import polars as pl
    import yaml

    from vlrank.config import RerankConfig, TrainConfig, load_config, merge
    from vlrank.data.dataset import Dataset
    from vlrank.reranking import pipeline
    from vlrank.training import run as training

    values: dict[str, Any] = {
        "method": "full",
        "train_vision": True,
        "epochs": 6,
        "batch_size": 16,
        "lr": 1e-3,
        "samples_per_user": 4,
        "negative_sampling": "popularity",
        "metric": "ndcg@10",
        "patience": 6,
        "warmup_ratio": 0.1,
        "ranking": {"max_history": 6, "max_item_chars": 40, "top_k": 20, "max_image_pixels": 1024},
    }
    for setting in settings:
        key, _, value = setting.partition("=")
        for part in reversed(key.split(".")[1:]):
            value = {part: yaml.safe_load(value) if isinstance(value, str) else value}  # type: ignore[assignment]
        given = yaml.safe_load(value) if isinstance(value, str) else value
        values = merge(values, {key.split(".")[0]: given})
    fixed = {"dataset": dataset, "model": str(model), "mode": "raw_image", "out": out, "seed": seed}
    began = time.monotonic()
    summary = training.run(load_config(TrainConfig, **values, **fixed))
    trained = time.monotonic() - began
    ranking = out.with_suffix(".parquet")
    engine = {"name": "transformers"}
    pipeline.run(load_config(RerankConfig, dataset=dataset, model=str(out), out=ranking, engine=engine))
    targets = {user: target for user, (_, target) in Dataset.open(dataset).histories("test").items()}
    rows = pl.read_parquet(ranking).select("user_id", "item_ids").sort("user_id").iter_rows()
    ranks = [list(items).index(targets[user]) + 1 for user, items in rows]
    history = training.read_history(out)
    return {
        "seed": seed,
        "settings": values,
        "steps": summary.counts["steps"],
        "train_seconds": round(trained, 1),
        "validation": [{key: line[key] for key in ("epoch", "loss", "ndcg@10")} for line in history],
        "users": len(ranks),
        **dict(zip(METRICS, measured(ranks).mean(axis=0).round(4).tolist(), strict=True)),
        "ranks": ranks,
    }


def measured(ranks: list[int]) -> np.ndarray:
    """`METRICS` of every user, float64 [users, 3]."""
    from vlrank.evaluation.metrics import rank_values

    by_rank = rank_values((1, 5, 10))
    return np.stack([by_rank[name][np.minimum(ranks, 11)] for name in METRICS], axis=1)


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean paired differences over users, with 95% bootstrap intervals."""
    from vlrank.evaluation.metrics import bootstrap_interval

    own, swapped = (np.mean([measured(run["ranks"]) for run in runs[kind]], axis=0) for kind in ("own", "swapped"))
    low, high = bootstrap_interval(np.ones(len(own), int), own - swapped, 2000, seed=0)
    return {
        name: {
            "own": round(float(own[:, i].mean()), 4),
            "swapped": round(float(swapped[:, i].mean()), 4),
            "difference": round(float((own - swapped)[:, i].mean()), 4),
            "interval": [round(float(low[i]), 4), round(float(high[i]), 4)],
        }
        for i, name in enumerate(METRICS)
    }


if __name__ == "__main__":
    main()

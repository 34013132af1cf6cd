"""Do pixels carry signal? ``raw_image`` trained on H&M purchases, beside the same model with pictures swapped.

    python bench/hm_pixels.py --data HM --out bench/results/hm_pixels.json --lessons 1000 3500 [KEY=VALUE ...]
    python bench/hm_pixels.py --data HM --out bench/results/hm_pixels.json --model QWEN3_VL_FOLDER [KEY=VALUE ...]

``HM`` holds ``interactions.csv``, ``items.jsonl`` and ``images/``. In the second dataset every item shows another
item's picture (one seeded permutation): a model can still learn which pictures sell, and nothing else from them.
Both are trained alike (KEY=VALUE changes any setting of ``vlrank train``) for every seed, and rank the same lists: each
test user's target and 19 items at random, ``--lists`` times. The paired difference is over users, each with the mean
over its lists and seeds.

Every item's text is its colour and kind (``black vest top``), or for a seeded half of the catalogue only ``photo``:
what these are only pixels tell. Every list is ranked twice, the second time with the halves exchanged, so that no user
counts for whether its target had a text. A history is told in words, so a model must know what words look like.
``--lessons`` teaches a small Qwen3-VL that from scratch (photo_lessons.py: so many steps without and with pictures of
32 x 32 pixels); ``--model`` takes one that knows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from generate import machine
from photo_lessons import UNTITLED, line, taught_model, words

METRICS = ("recall@1", "recall@5", "ndcg@10")
RANKING = {"max_history": 24, "max_item_chars": 40, "top_k": 20, "max_image_pixels": 1024}


def main() -> None:
    """Prepare, train, rank, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--model", type=Path, help="folder of a Qwen3-VL, which reads the same texts")
    base.add_argument("--lessons", type=int, nargs=2, metavar="STEPS", help="without and with pictures")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side, one core each")
    parser.add_argument("--lists", type=int, default=3, help="lists of candidates per user")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of vlrank train")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlrank-hm-") as name:
        folder = Path(name)
        datasets = make_datasets(options.data, folder)
        model = options.model or lessons_model(options.data, folder / "model", options.lessons)
        untrained = {
            kind: ranks_of(data, model, folder / f"{kind}.parquet", options.lists) for kind, data in datasets.items()
        }
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in datasets}
        with ProcessPoolExecutor(options.parallel, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = {
                (kind, seed): pool.submit(
                    train_and_rank, dataset, model, folder / f"{kind}-{seed}", seed, options.lists, options.settings
                )
                for seed in range(options.seeds)
                for kind, dataset in datasets.items()
            }
            for (kind, _), run in waiting.items():
                runs[kind].append(run.result())
                facts = {key: value for key, value in runs[kind][-1].items() if key != "ranks"}
                print(json.dumps({"pictures": kind} | facts), file=sys.stderr, flush=True)
        report = {
            "command": " ".join(["python", "bench/hm_pixels.py", *public(sys.argv[1:])]),
            "machine": machine(),
            "model": options.model.name if options.model else "lessons",
            "runs": {kind: [{k: v for k, v in run.items() if k != "ranks"} for run in of] for kind, of in runs.items()},
            "own_minus_swapped_before_training": compare({kind: [ranks] for kind, ranks in untrained.items()}),
            "own_minus_swapped": compare({kind: [run["ranks"] for run in of] for kind, of in runs.items()}),
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
    dataset = Dataset.open(own)
    items = dataset.items()
    rng = np.random.default_rng(0)
    untitled = rng.random(items.height) < 0.5
    names = zip(items["title"].to_list(), items["categories"].to_list(), strict=True)
    titles = [line(*words(*name)) for name in names]
    texts, exchanged = (
        [UNTITLED if hide else title for hide, title in zip(hidden, titles, strict=True)]
        for hidden in (untitled, ~untitled)
    )
    dataset.update_items(items := items.with_columns(pl.Series("text", texts)))
    shutil.copytree(own, swapped)
    ring = rng.permutation(items.height)
    order = np.empty_like(ring)
    order[ring] = np.roll(ring, 1)  # one cycle through all items: none keeps its own
    pictures = pl.Series("image_path", items["image_path"].to_list())[order.tolist()]
    Dataset.open(swapped).update_items(items.with_columns(pictures))
    for folder in (own, swapped):
        shutil.copytree(folder, exchanged_halves(folder))
        other = Dataset.open(exchanged_halves(folder))
        other.update_items(other.items().with_columns(pl.Series("text", exchanged)))
    return {"own": own, "swapped": swapped}


def exchanged_halves(dataset: Path) -> Path:
    """The same dataset, where the other half of the catalogue has a text."""
    return dataset.with_name(f"{dataset.name}-exchanged")


def lessons_model(data: Path, folder: Path, steps: tuple[int, int]) -> Path:
    """A small Qwen3-VL that has seen the shop's photos."""
    rows = map(json.loads, (data / "items.jsonl").read_text(encoding="utf-8").splitlines())
    products = [(row["title"], row["categories"][0], data / row["image"]) for row in rows]
    return taught_model(folder, products, steps, seed=0)


def train_and_rank(dataset: Path, model: Path, out: Path, seed: int, lists: int, settings: list[str]) -> dict[str, Any]:
    """One run, and the ranks of every test user's target."""
    import yaml

    from vlrank.config import TrainConfig, load_config, merge
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
        "ranking": RANKING,
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
    ranks = ranks_of(dataset, out, out.with_suffix(".parquet"), lists)
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


def ranks_of(dataset: Path, model: Path, out: Path, lists: int) -> np.ndarray:
    """Each test user's target's rank in every list, then in each with halves exchanged: int64 [users, 2 * lists]."""
    import polars as pl

    from vlrank.config import RerankConfig, load_config
    from vlrank.data.dataset import Dataset
    from vlrank.reranking import pipeline

    targets = {user: target for user, (_, target) in Dataset.open(dataset).histories("test").items()}
    columns = []
    for shown, seed in itertools.product((dataset, exchanged_halves(dataset)), range(lists)):
        ranking = out.with_stem(f"{out.stem}-{shown.name}-{seed}")
        config = load_config(
            RerankConfig,
            dataset=shown,
            model=str(model),
            out=ranking,
            seed=seed,
            **({} if (model / "best.json").exists() else {"as_mode": "raw_image", "ranking": RANKING}),
            engine={"name": "transformers"},
        )
        pipeline.run(config)
        rows = pl.read_parquet(ranking).select("user_id", "item_ids").sort("user_id").iter_rows()
        columns.append([list(items).index(targets[user]) + 1 for user, items in rows])
    return np.array(columns).T


def measured(ranks: np.ndarray) -> np.ndarray:
    """`METRICS` of every user, float64 [users, 3]: means over the user's lists."""
    from vlrank.evaluation.metrics import rank_values

    by_rank = rank_values((1, 5, 10))
    return np.stack([by_rank[name][np.minimum(ranks, 11)].mean(axis=1) for name in METRICS], axis=1)


def compare(runs: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Mean paired differences over users, with 95% bootstrap intervals."""
    from vlrank.evaluation.metrics import bootstrap_interval

    own, swapped = (np.mean([measured(ranks) for ranks in runs[kind]], axis=0) for kind in ("own", "swapped"))
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

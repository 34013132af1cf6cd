"""ASHA against full-length random search on the embedded shop, and what starting a trial costs.

    python bench/tune.py --out bench/results/tune.json --seeds 5 --trials 8 --epochs 9

Every trial of every seed is trained to its end, once. ASHA, Ray's own, is then replayed on these curves with
``--concurrent`` trials side by side: one that ASHA stops is the beginning of the same trial at full length, as seed
and config are the same. So both searches are compared on identical trials, and the comparison costs one of them.

Start-up per trial is the time to the first evaluation, less an epoch's usual time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlrank.config import TuneConfig, load_config
from vlrank.data.shop import make_products, make_shop
from vlrank.tuning.run import run
from vlrank.tuning.trials import Sweep, Trial

MODE = "semantic_summary_small"


def make_data(folder: Path, items: int, users: int) -> tuple[Path, Path]:
    """A shop with the summaries that a perfect eye would write, and the demo's small text model."""
    from vlrank.demo.base_models import make_demo_models
    from vlrank.demo.pretrain import summary

    shop = make_shop(folder / "shop", n_items=items, n_users=users)
    told = {product.source_id: summary(product.style, product.colour, product.kind) for product in make_products(items)}
    rows = [
        {"item_id": item, "text": told[source], "model": "shop", "prompt_id": "shop", "input_hash": ""}
        for item, source in shop.items().select("item_id", "source_id").iter_rows()
    ]
    shop.add_generated("semantic_summary", rows)
    return shop.path, make_demo_models(folder / "models")["text"]


def expected_best(values: list[float], trials: float) -> float:
    """Expected best of ``trials`` of the values, drawn without replacement (Dodge et al. 2019, equation 6)."""
    n, drawn = len(values), max(1, min(len(values), round(trials)))
    ordered = sorted(values)
    return sum(value * math.comb(i, drawn - 1) for i, value in enumerate(ordered)) / math.comb(n, drawn)


def replay(curves: list[Trial], epochs: int, grace: int, factor: int, concurrent: int, folder: Path) -> dict[str, Any]:
    """What ASHA would have made of these trials: epochs used and the best value found."""
    from types import SimpleNamespace

    from vlrank.tuning.search import AshaPerMode

    sweep = Sweep(folder / "replay.jsonl")
    for trial in curves:
        sweep.add(Trial(trial.mode, trial.trial_id, trial.config, trial.metric))
    asha = AshaPerMode(sweep, {MODE: epochs}, grace, factor)
    waiting, running, used = list(curves), [], 0
    ended: dict[str, float] = {}
    while waiting or running:
        while waiting and len(running) < concurrent:
            trial = waiting.pop(0)
            handle = SimpleNamespace(config={"trial_id": trial.trial_id}, trial_id=trial.trial_id)
            asha.on_trial_add(None, handle)
            running.append((trial, handle, iter(trial.epochs)))
        for entry in list(running):
            trial, handle, rest = entry
            evaluation = next(rest, None)
            if evaluation is None:
                running.remove(entry)
                ended[trial.trial_id] = trial.value
                continue
            used += 1
            result = {"epoch": evaluation["epoch"], trial.metric: evaluation["metric"]}
            if asha.on_trial_result(None, handle, result) == "STOP":
                running.remove(entry)
    return {"epochs": used, "best": max(ended.values()), "finished": len(ended)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--items", type=int, default=144)
    parser.add_argument("--users", type=int, default=240)
    parser.add_argument("--concurrent", type=int, default=2)
    parser.add_argument("--reduction_factor", type=int, default=3)
    arguments = parser.parse_args()
    rows, start_ups = [], []
    with tempfile.TemporaryDirectory(prefix="bench-tune-") as name:
        folder = Path(name)
        dataset, model = make_data(folder, arguments.items, arguments.users)
        for seed in range(arguments.seeds):
            config = load_config(
                TuneConfig,
                dataset=dataset,
                out=folder / f"sweep-{seed}",
                modes=MODE,
                trials=arguments.trials,
                scheduler="none",
                # So small a model wants larger rates than those that configs/tune is made for.
                space={"lr": {"loguniform": [1e-4, 1e-2]}, "batch_size": {"choice": [8, 16, 32]}},
                train={
                    "model": str(model),
                    "backend": "transformers",
                    "load_in_4bit": False,
                    "negatives": 9,
                    "epochs": arguments.epochs,
                    "patience": arguments.epochs,
                    "metric": "ndcg@10",
                    "seed": seed,
                    "ranking": {"max_history": 6, "max_item_chars": 50, "top_k": 20},
                },
                max_concurrent_trials=arguments.concurrent,
                seed=seed,
            )
            run(config)
            trials = [trial for trial in Sweep(config.out / "trials.jsonl") if trial.status == "completed"]
            asha = replay(trials, arguments.epochs, 1, arguments.reduction_factor, arguments.concurrent, folder)
            values = [trial.value for trial in trials]
            used = sum(len(trial.epochs) for trial in trials)
            curves = {
                trial.trial_id: trial.config | {"ndcg@10": [round(entry["metric"], 4) for entry in trial.epochs]}
                for trial in trials
            }
            rows.append(
                {
                    "seed": seed,
                    "random": {"epochs": used, "best": max(values)},
                    "random_in_the_epochs_of_asha": expected_best(values, asha["epochs"] / arguments.epochs),
                    "asha": asha,
                    "share": asha["epochs"] / used,
                    "curves": curves,
                }
            )
            for trial in trials:
                times = [entry["seconds"] for entry in trial.epochs]
                start_ups.append(times[0] - statistics.median(b - a for a, b in pairwise(times)))
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "curves"}), flush=True)
            # After each seed: a run that is cut short has measured something.
            result = {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "options": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
                "seeds": rows,
                "share_of_epochs": statistics.fmean(row["share"] for row in rows),
                "best": {
                    "asha": statistics.fmean(row["asha"]["best"] for row in rows),
                    "random": statistics.fmean(row["random"]["best"] for row in rows),
                    "random_in_the_epochs_of_asha": statistics.fmean(
                        row["random_in_the_epochs_of_asha"] for row in rows
                    ),
                },
                "at_least_as_good": sum(row["asha"]["best"] >= row["random"]["best"] for row in rows),
                "start_up_seconds": {"median": statistics.median(start_ups), "max": max(start_ups)},
            }
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "seeds"}))


if __name__ == "__main__":
    main()

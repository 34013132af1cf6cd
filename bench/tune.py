"""ASHA against full-length random search on the embedded shop, and what starting a trial costs.

    python bench/tune.py --out bench/results/tune.json --seeds 5 --trials 16 --epochs 9 --reduction_factor 2

Every trial of every seed is trained to its end, once. ASHA is then replayed on these curves with ``--concurrent``
trials side by side, vlrank's and Ray Tune's: one that stops early is the beginning of the same trial at full length, as
seed and config are the same. So all searches are compared on identical trials. ``--curves`` takes them from an earlier
result instead of training.

The best of many noisy values is luck in part, and full-length search draws more of them. ``--confirm N`` trains what
the searches chose again, on N seeds that had no part in the choice.

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

from ray.tune.schedulers import ASHAScheduler

from vlrank.config import TuneConfig, load_config
from vlrank.demo.shop import make_products, make_shop
from vlrank.tuning.asha import Asha
from vlrank.tuning.run import run
from vlrank.tuning.trials import Sweep, Trial

MODE = "semantic_summary_small"
FRESH_SEED = 1000
SEARCHES = ("random", "asha", "asha_of_ray")


def make_data(folder: Path, items: int, users: int) -> tuple[Path, Path]:
    """A shop with the summaries that a perfect vision model would write, and the demo's small text model."""
    from pretrain import summary
    from vlrank.demo.base_models import make_demo_models

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


def replay(
    curves: list[Trial], epochs: int, factor: int, concurrent: int, folder: Path, *, ours: bool
) -> dict[str, Any]:
    """What ASHA would have made of these trials: epochs used and the best value found.

    Args:
        curves: The trials, with all their epochs.
        epochs: Of the longest.
        factor: Reduction factor.
        concurrent: Trials side by side.
        folder: Folder for a sweep file that is not read again.
        ours: `vlrank.tuning.asha.Asha`, or Ray Tune's ``ASHAScheduler``.
    """
    sweep = Sweep(folder / "replay.jsonl")
    for trial in curves:
        sweep.add(Trial(trial.mode, trial.trial_id, trial.config, trial.metric))
    asha = Asha(sweep, {MODE: epochs}, lambda trial: epochs, 1, factor)
    rays = ASHAScheduler(
        "epoch", "metric", "max", max_t=epochs - 1, grace_period=1, reduction_factor=factor, stop_last_trials=False
    )
    whole = {trial.trial_id: trial.epochs for trial in curves}
    running: list[Trial] = []
    while True:
        while len(running) < concurrent:
            fresh = (one for one in sweep if one.status == "pending")
            trial = (asha.promote([one.trial_id for one in running]) if ours else None) or next(fresh, None)
            if trial is None:
                break
            if trial.status == "pending":
                rays.on_trial_add(None, trial)
            trial.status = "running"
            running.append(trial)
        if not running:
            return {"epochs": sum(len(one.epochs) for one in sweep)} | winner(list(sweep))
        for trial in list(running):
            trial.epochs.append(whole[trial.trial_id][len(trial.epochs)])
            on = asha.trains_on(trial) if ours else rays.on_trial_result(None, trial, trial.epochs[-1]) != "STOP"
            if not on or len(trial.epochs) == epochs:
                trial.status = "completed" if on else "paused" if ours else "stopped"
                running.remove(trial)


def winner(trials: list[Trial]) -> dict[str, Any]:
    """The best value and whose it is."""
    best = max(trials, key=lambda trial: trial.value)
    return {"best": best.value, "trial": best.trial_id}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--items", type=int, default=144)
    parser.add_argument("--users", type=int, default=240)
    parser.add_argument("--samples_per_user", type=int, default=1)
    parser.add_argument("--concurrent", type=int, default=2, help="trials side by side in the replays")
    parser.add_argument("--train_concurrent", type=int, help="trials trained side by side; default as many")
    parser.add_argument("--gpus_per_trial", type=float, default=0, help="a fraction; default CPUs alone")
    parser.add_argument("--reduction_factor", type=int, default=2)
    parser.add_argument("--confirm", type=int, default=0, help="fresh seeds for what was chosen")
    parser.add_argument("--curves", type=Path, help="an earlier result of this benchmark with the same options")
    arguments = parser.parse_args()
    if arguments.curves:
        again(arguments)
        return
    rows, start_ups = [], []
    with tempfile.TemporaryDirectory(prefix="bench-tune-") as name:
        folder = Path(name)
        dataset, model = make_data(folder, arguments.items, arguments.users)
        for seed in range(arguments.seeds):
            # So small a model wants larger rates than those that configs/tune is made for.
            space = {"lr": {"loguniform": [1e-4, 1e-2]}, "batch_size": {"choice": [8, 16, 32]}}
            config = sweep(arguments, dataset, model, folder / f"sweep-{seed}", space, seed)
            run(config)
            trials = [trial for trial in Sweep(config.out / "trials.jsonl") if trial.status == "completed"]
            rows.append(compare(seed, trials, arguments, folder))
            for trial in trials:
                times = [entry["seconds"] for entry in trial.epochs]
                start_ups.append(times[0] - statistics.median(b - a for a, b in pairwise(times)))
            # After each seed: a run that is cut short has measured something.
            start_up = {"median": statistics.median(start_ups), "max": max(start_ups)}
            write(rows, arguments, {"start_up_seconds": start_up})
        if arguments.confirm:
            confirm(rows, arguments, dataset, model, folder)
            write(rows, arguments, {"start_up_seconds": start_up})


def sweep(
    arguments: argparse.Namespace, dataset: Path, model: Path, out: Path, space: dict[str, Any], seed: int
) -> TuneConfig:
    """Trials of the benchmark: random ones, or a grid where nothing in ``space`` is continuous."""
    # Many trials share a GPU and the host's cores; compiling so small a model would take longer than training it.
    shared = {"gpus_per_worker": arguments.gpus_per_trial, "compile": False, "loader_workers": 1}
    return load_config(
        TuneConfig,
        dataset=dataset,
        out=out,
        modes=MODE,
        trials=arguments.trials,
        search="grid" if "seed" in space else "random",
        scheduler="none",
        space=space,
        train={
            "model": str(model),
            "backend": "transformers",
            "load_in_4bit": False,
            "negatives": 9,
            "samples_per_user": arguments.samples_per_user,
            "epochs": arguments.epochs,
            "patience": arguments.epochs,
            "metric": "ndcg@10",
            "seed": seed,
            "ranking": {"max_history": 6, "max_item_chars": 50, "top_k": 20},
        }
        | (shared if arguments.gpus_per_trial else {}),
        max_concurrent_trials=arguments.train_concurrent or arguments.concurrent,
        seed=seed,
    )


def confirm(
    rows: list[dict[str, Any]], arguments: argparse.Namespace, dataset: Path, model: Path, folder: Path
) -> None:
    """Adds to the rows how the chosen settings do on fresh seeds; equal choices are equal."""
    for row in rows:
        chosen_trials = {row[name]["trial"] for name in SEARCHES}
        for trial_id in chosen_trials if len(chosen_trials) > 1 else ():
            chosen = {key: row["curves"][trial_id][key] for key in ("lr", "batch_size")}
            seeds = {"seed": {"choice": [FRESH_SEED + number for number in range(arguments.confirm)]}}
            out = folder / f"confirm-{row['seed']}-{trial_id}"
            run(sweep(arguments, dataset, model, out, chosen | seeds, FRESH_SEED))
            values = [trial.value for trial in Sweep(out / "trials.jsonl")]
            for name in SEARCHES:
                if row[name]["trial"] == trial_id:
                    row[name]["confirmed"] = [round(value, 4) for value in values]
        print(json.dumps({name: row[name] for name in SEARCHES}), flush=True)


def compare(seed: int, trials: list[Trial], arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One seed's searches on the same trials."""
    values = [trial.value for trial in trials]
    used = sum(len(trial.epochs) for trial in trials)
    row: dict[str, Any] = {"seed": seed, "random": {"epochs": used} | winner(trials)}
    for name in ("asha", "asha_of_ray"):
        found = replay(
            trials,
            arguments.epochs,
            arguments.reduction_factor,
            arguments.concurrent,
            folder,
            ours=name == "asha",
        )
        rival = expected_best(values, found["epochs"] / arguments.epochs)
        row[name] = found | {"share": found["epochs"] / used, "random_in_as_many_epochs": rival}
    print(json.dumps(row), flush=True)
    row["curves"] = {
        trial.trial_id: trial.config | {trial.metric: [round(entry["metric"], 4) for entry in trial.epochs]}
        for trial in trials
    }
    return row


def again(arguments: argparse.Namespace) -> None:
    """The comparison on curves that an earlier run has kept."""
    before = json.loads(arguments.curves.read_text(encoding="utf-8"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-tune-") as folder:
        for row in before["seeds"]:
            trials = [
                Trial(
                    MODE,
                    trial_id,
                    {key: kept[key] for key in ("lr", "batch_size")},
                    "ndcg@10",
                    epochs=[{"epoch": epoch, "metric": value} for epoch, value in enumerate(kept["ndcg@10"], 1)],
                )
                for trial_id, kept in row["curves"].items()
            ]
            rows.append(compare(row["seed"], trials, arguments, Path(folder)))
        if arguments.confirm:
            dataset, model = make_data(Path(folder), arguments.items, arguments.users)
            confirm(rows, arguments, dataset, model, Path(folder))
    write(rows, arguments, {"start_up_seconds": before["start_up_seconds"]})


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace, more: dict[str, Any]) -> None:
    """The result so far, and its means on standard output."""

    def mean(*path: str) -> float:
        return statistics.fmean(row[path[0]][path[1]] for row in rows)

    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "options": {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "curves")},
        "best_of_random": mean("random", "best"),
    }
    for name in ("asha", "asha_of_ray"):
        equal = sum(row[name]["best"] >= row["random"]["best"] for row in rows)
        result[name] = {"at_least_as_good_as_random": f"{equal} of {len(rows)} seeds"}
        result[name] |= {key: mean(name, key) for key in ("share", "best", "random_in_as_many_epochs")}
    decided = [row for row in rows if "confirmed" in row["random"]]
    if decided:
        result["confirmed, where choices differ"] = {
            name: statistics.fmean(value for row in decided for value in row[name]["confirmed"]) for name in SEARCHES
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result | more | {"seeds": rows}, indent=2) + "\n")
    print(json.dumps(result | more))


if __name__ == "__main__":
    main()

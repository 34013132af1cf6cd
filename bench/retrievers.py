"""How good the sequential retrievers are, and how long they take: ``vlrank retrieve`` as a whole, method by method.

    python bench/retrievers.py --data data/beauty --methods sasrec bsarec ensemble:sasrec,bsarec --out retrievers.json

``--data`` is a dataset of ``vlrank prepare``. Amazon Beauty 2014 as in the papers (22,363 users, 12,101 items) takes
``min_uc=1 min_sc=1 keep_untitled=true`` on the public 5-core. A method may carry settings and then has candidates of
its own name: ``bsarec,lr=0.001,seed=1`` is ``--method bsarec sequential.lr=0.001 seed=1``.

The command runs in a process of its own and is ended after ``--limit_s``; called again, it goes on from its last epoch.
Recall and NDCG are over all users of a split, the whole catalogue ranked but for the history; misses count. The file is
written after each method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import safe_open

from vlrank.data.dataset import Dataset
from vlrank.data.lists import Lists
from vlrank.version import __version__

_WAIT_S = 30  # for the command to end after SIGTERM


def command(data: Path, variant: str, top_k: int, further: list[str]) -> tuple[str, list[str]]:
    """(name of the candidates, the command line) of a method with settings."""
    if variant.startswith("ensemble:"):
        method, settings = variant, []
    else:
        method, *settings = variant.split(",")
    name = re.sub(r"[^\w.-]+", "-", variant).strip("-")
    keys = [key if key.startswith("seed=") else f"sequential.{key}" for key in [*settings, *further]]
    line = ["-m", "vlrank", "retrieve", str(data), "--method", method, "--name", name, "--top_k", str(top_k), *keys]
    return name, line


def timed(line: list[str], limit_s: float) -> tuple[int | None, float, str]:
    """(exit code, seconds, last lines of the output) of a Python command; None where the limit ended it."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "COLUMNS": "200"},  # no line of the summary is wrapped
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        code = None
        process.terminate()
        try:
            output, _ = process.communicate(timeout=_WAIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    return code, time.perf_counter() - begun, "\n".join(output.strip().splitlines()[-25:])


def quality(dataset: Dataset, name: str) -> dict[str, dict[str, float]]:
    """Recall@10, 20, 50 and NDCG@10 of candidates, by split."""
    table, found = dataset.candidates(name), {}
    for split in ("val", "test"):
        histories = dataset.histories(split)  # type: ignore[arg-type]
        users = np.fromiter(histories, np.int64, len(histories))
        targets = np.fromiter((target for _, target in histories.values()), np.int64, len(histories))
        ranks = Lists.from_frame(table.filter(pl.col("split") == split)).for_users(users).rank_of(targets)
        hits = {f"recall@{k}": float(((ranks > 0) & (ranks <= k)).mean()) for k in (10, 20, 50)}
        gains = np.where((ranks > 0) & (ranks <= 10), 1 / np.log2(1 + np.maximum(ranks, 1)), 0.0)
        found[split] = {"users": len(users), "ndcg@10": float(gains.mean()), **hits}
    return found


def facts(output: str) -> list[str]:
    """The lines of the command's summary, without its frame."""
    return [line.strip("│ ") for line in output.splitlines() if line.startswith("│")]


def epochs(data: Path, name: str) -> list[dict[str, Any]]:
    """Loss, validation NDCG@10 and seconds of each epoch; empty for what has none."""
    path = data / "retrievers" / name / "model.safetensors"
    if not path.is_file():
        return []
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["history"])


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import ray
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = {"vlrank": __version__, "torch": torch.__version__, "ray": ray.__version__}
    return {"device": device, "python": platform.python_version(), **versions}


def main() -> None:
    """Run all methods and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--methods", nargs="+", default=["sasrec", "bsarec"], help="methods with their settings")
    parser.add_argument("--top_k", type=int, default=50, help="candidates per user")
    parser.add_argument("--limit_s", type=float, default=600, help="seconds per method")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings for all methods, e.g. epochs=3")
    options = parser.parse_intermixed_args()

    results: dict[str, Any] = {"command": " ".join(["bench/retrievers.py", *sys.argv[1:]]), "machine": machine()}
    results["methods"] = []
    for variant in options.methods:
        further = [] if variant.startswith("ensemble:") else options.settings
        name, line = command(options.data, variant, options.top_k, further)
        parts = variant.removeprefix("ensemble:").split(",") if variant.startswith("ensemble:") else []
        if lost := [row["method"] for row in results["methods"] if row["method"] in parts and "failed" in row]:
            # The dataset may hold lists of an earlier run by that name.
            results["methods"].append({"method": variant, "failed": f"no lists of {', '.join(lost)}"})
            continue
        print(f"{variant} ...", flush=True)
        code, seconds, output = timed(line, options.limit_s)
        row: dict[str, Any] = {"method": variant, "command": " ".join(line[1:]), "seconds": round(seconds, 1)}
        if code == 0:
            row |= quality(Dataset.open(options.data), name)
            row |= {"summary": facts(output), "epochs": epochs(options.data, name)}
            test = row["test"]
            print(
                f"  test Recall@10 {test['recall@10']:.4f}  NDCG@10 {test['ndcg@10']:.4f}  "
                f"Recall@20 {test['recall@20']:.4f}  Recall@50 {test['recall@50']:.4f}  in {seconds:.0f} s",
                flush=True,
            )
        else:
            row |= {"failed": "time limit" if code is None else f"exit code {code}", "output": output.splitlines()}
            print(f"  {row['failed']}\n{output}", flush=True)
        results["methods"].append(row)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Does a longer input need more memory? Peak of Ray's object store and of the driver, for N items and for 20 N.

    python bench/generate_memory.py --items 1000 --out bench/results/generate_memory.json

The job is that of ``vlrank generate`` up to the engine: plan, decode and scale pictures, commit. In place of an engine
stands a stage that holds every batch for ``--delay`` seconds, so that pictures would pile up if nothing held them back.
All items share ``--pictures`` files on disk; each of them is decoded again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from generate import blobs

FACTOR = 20


def main() -> None:
    """Measure both lengths, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000, help="of the short input")
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(run(options.child, options)))
        return
    results = []
    for items in (options.items, FACTOR * options.items):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(items)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
        print(results[-1], flush=True)
    growth = results[1]["object_store_peak_mb"] / max(1, results[0]["object_store_peak_mb"])
    print(f"{FACTOR} times the input: object store peak x {growth:.2f}")
    if options.out:
        report = {"command": f"python bench/generate_memory.py --items {options.items}", "results": results}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def run(items: int, options: argparse.Namespace) -> dict[str, Any]:
    """One bulk run; returns its length, time and peaks."""
    import ray

    from vlrank.bulk import Shards, run_bulk
    from vlrank.config import RayConfig
    from vlrank.data.schemas import GENERATED
    from vlrank.runtime import ray_session

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="vlrank-bench-") as name, ray_session(RayConfig(num_cpus=8)):
        folder = Path(name)
        for number in range(options.pictures):
            (folder / f"{number}.jpg").write_bytes(blobs(rng, options.side))
        keys = pl.Series("item_id", range(1, items + 1), dtype=pl.Int32)
        pictures = [str(folder / f"{key % options.pictures}.jpg") for key in keys]
        wanted = pl.DataFrame({"item_id": keys, "input_hash": [f"h{key}" for key in keys], "picture": pictures})
        shards = Shards(folder / "captions", GENERATED, "item_id", folder / "quarantine", "caption")
        peak, stop = [0.0], threading.Event()
        total = ray.cluster_resources()["object_store_memory"]

        def watch() -> None:
            while not stop.wait(0.1):
                free = ray.available_resources().get("object_store_memory", 0.0)
                peak[0] = max(peak[0], total - free)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        stages = partial(_stages, side=options.side, delay=options.delay)
        result = run_bulk(wanted, stages, shards, shard_rows=256, description=f"{items} items")
        stop.set()
        watcher.join()
        assert result.done == items
    return {
        "items": items,
        "seconds": round(result.seconds, 1),
        "object_store_peak_mb": round(peak[0] / 2**20, 1),
        "driver_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def _stages(dataset: Any, side: int, delay: float) -> Any:
    def decode(row: dict[str, Any]) -> dict[str, Any]:
        from vlrank.generation.job import load_picture

        return {"__data": row | {"picture": load_picture(row["picture"], side)}}

    def answer(batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(delay)
        rows = batch["__data"].tolist()
        texts = [f"{row['picture'].size}" for row in rows]
        columns: dict[str, Any] = {"item_id": [row["item_id"] for row in rows], "text": texts}
        columns["input_hash"] = [row["input_hash"] for row in rows]
        return columns | {"model": ["m"] * len(rows), "prompt_id": ["caption/v1"] * len(rows)}

    return dataset.map(decode, num_cpus=0.9).map_batches(answer, batch_size=64, num_cpus=2, concurrency=1)


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)

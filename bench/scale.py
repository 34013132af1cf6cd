"""Does the bulk machinery hold at 10 million rows? Driver memory and rows/s while thousands of shards are committed.

    python bench/scale.py --rows 10000000 --shard_rows 2000 --out bench/results/scale.json

The job is that of ``vlrank generate`` and ``vlrank rerank`` without an engine: plan, read, a stage that only adds
columns and fails one row in 1,009, commit, quarantine, prune. So it shows what the machinery costs, not a model. A
second run then finds everything done, which is what continuing a killed run costs before its first row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from vlrank.bulk import Shards, run_bulk
from vlrank.config import RayConfig
from vlrank.data.schemas import GENERATED
from vlrank.runtime import ray_session

BAD_EVERY = 1009
INTERVAL_S = 1.0


def main() -> None:
    """Run twice and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shard_rows", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlrank-bench-") as name, ray_session(RayConfig(num_cpus=8)):
        report = measure(options.rows, options.shard_rows, Path(name))
    report = {"command": f"python bench/scale.py --rows {options.rows} --shard_rows {options.shard_rows}"} | report
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


def measure(rows: int, shard_rows: int, folder: Path) -> dict[str, Any]:
    """A whole run and a run with nothing left to do; raises if a row is missing or there twice."""
    shards = Shards(folder / "captions", GENERATED, "item_id", folder / "quarantine", "caption")
    before = rss_mb()
    wanted = make_wanted(rows)
    with Watch(shards.folder) as watch:
        first = run_bulk(wanted, stages, shards, shard_rows=shard_rows, description=f"{rows:,} rows")
    with Watch(shards.folder) as again:
        second = run_bulk(wanted, must_not_run, shards, shard_rows=shard_rows, description="again")
    committed = pl.scan_parquet(shards.folder / "*.parquet").select("item_id")
    keys = committed.select(pl.len().alias("rows"), pl.col("item_id").n_unique().alias("keys")).collect().row(0)
    bad = sum(1 for _ in range(0, rows + 1, BAD_EVERY)) - 1
    assert keys == (rows - bad, rows - bad), keys
    assert (first.done, first.quarantined, second.reused, second.failed_before) == (rows - bad, bad, rows - bad, bad)
    return {
        "rows": rows,
        "shards": -(-rows // shard_rows),
        "shard_rows": shard_rows,
        "quarantined": first.quarantined,
        "seconds": round(first.seconds, 1),
        "rows_per_second": round(rows / first.seconds),
        "driver_mb_before": before,
        "driver_mb_with_the_wanted_rows": watch.samples[0][2],
        "driver_mb_peak": max(mb for _, _, mb in watch.samples),
        "quarters": quarters(watch, shard_rows),
        "second_run": {"seconds": round(second.seconds, 1), "driver_mb_peak": max(mb for _, _, mb in again.samples)},
        "samples": [
            {"seconds": round(at, 1), "rows": done * shard_rows, "driver_mb": mb} for at, done, mb in watch.thinned(60)
        ],
        "hardware": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "memory_gib": memory_gib()},
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("ray", "polars", "pyarrow")},
    }


def make_wanted(rows: int) -> pl.DataFrame:
    """Keys and hashes as generation makes them: 32 hexadecimal digits each."""
    keys = np.arange(1, rows + 1, dtype=np.int32)
    return pl.DataFrame({"item_id": keys}).with_columns(
        input_hash=pl.format(
            "{}{}", *(pl.col("item_id").hash(seed).cast(pl.String).str.zfill(16).str.tail(16) for seed in (1, 2))
        )
    )


def stages(dataset: Any) -> Any:
    """Next to no work: rows get the columns of a caption."""
    return dataset.map_batches(answer, batch_format="pyarrow", batch_size=None)


def answer(batch: pa.Table) -> pa.Table:
    """A caption for every row, an error for one in `BAD_EVERY`."""
    keys = batch["item_id"].to_numpy()
    texts = pc.binary_join_element_wise("caption of item", batch["item_id"].cast(pa.string()), " ")
    error = np.where(keys % BAD_EVERY == 0, "does not work", "")
    constant = {name: pa.array([value] * len(keys)) for name, value in (("model", "m"), ("prompt_id", "caption/v1"))}
    columns = {"text": texts, **constant, "error": pa.array(error.tolist())}
    return pa.table({"item_id": batch["item_id"], "input_hash": batch["input_hash"], **columns})


def must_not_run(dataset: Any) -> Any:
    """For a run with nothing to do."""
    raise AssertionError("rows are planned again that are done")


@dataclass
class Watch:
    """Samples (seconds, committed shards, driver's MB) while the block runs."""

    folder: Path
    samples: list[tuple[float, int, float]] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._begun, self._stop = time.monotonic(), threading.Event()
        self._sample()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        done = sum(1 for name in names if name.endswith(".parquet") and not name.startswith("."))
        self.samples.append((time.monotonic() - self._begun, done, rss_mb()))

    def thinned(self, most: int) -> list[tuple[float, int, float]]:
        """About so many samples, the last one included."""
        step = max(1, len(self.samples) // most)
        return [*self.samples[:-1:step], self.samples[-1]]


def quarters(watch: Watch, shard_rows: int) -> list[dict[str, float]]:
    """Rows/s and the driver's largest memory in each quarter of the shards."""
    total = watch.samples[-1][1]
    found = []
    for number in range(4):
        low, high = number * total // 4, (number + 1) * total // 4
        inside = [sample for sample in watch.samples if low <= sample[1] <= high and sample[1] > 0]
        inside = inside[: next((i for i, sample in enumerate(inside) if sample[1] == total), len(inside)) + 1]
        seconds, shards = inside[-1][0] - inside[0][0], inside[-1][1] - inside[0][1]
        rate = round(shards * shard_rows / seconds) if seconds else 0
        found.append({"rows_per_second": rate, "driver_mb": max(mb for _, _, mb in inside)})
    return found


def rss_mb() -> float:
    """Resident memory of this process, MB."""
    return round(psutil.Process().memory_info().rss / 2**20, 1)


def memory_gib() -> float:
    """Of the machine."""
    return round(psutil.virtual_memory().total / 2**30, 1)


def cpu_name() -> str:
    """As Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()

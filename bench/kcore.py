"""How long raw interactions take to become a dataset, and how much memory: k-core and split at size.

    python bench/kcore.py --interactions 20_000_000 --items 1_000_000

The generator makes a reviews file and a metadata file of the given size: popularity follows a power law with a long
tail, so that the 5-core takes several rounds; a tenth of the users repeat a purchase; ratings and times are given, ids
look like Amazon's. Each size runs in its own process, which reports its peak memory. The input is checked, too: the
number of interactions kept must be the same as the plain k-core below finds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

_CHUNK = 2_000_000
_START = 1_300_000_000
_DAYS = 3_000


def generate(folder: Path, interactions: int, items: int, seed: int = 0) -> tuple[Path, Path]:
    """Write ``reviews.csv`` (user, item, rating, timestamp) and ``items.parquet`` (item, title, brand, description)."""
    rng = np.random.default_rng(seed)
    users = max(1, interactions // 9)
    reviews = folder / "reviews.csv"
    with reviews.open("wb") as file:
        for start in range(0, interactions, _CHUNK):
            n = min(_CHUNK, interactions - start)
            # A power of a uniform number: many take part once or twice, few very often.
            user = (users * rng.random(n) ** 1.6).astype(np.int64)
            item = (items * rng.random(n) ** 3.0).astype(np.int64)
            if start == 0:
                item[:items] = np.arange(min(items, n))  # every item occurs
            rating = rng.choice([1.0, 2.0, 3.0, 4.0, 5.0], n, p=[0.06, 0.05, 0.1, 0.19, 0.6])
            timestamp = _START + rng.integers(0, _DAYS, n) * 86_400
            table = pl.DataFrame({"user": user, "item": item, "rating": rating, "timestamp": timestamp})
            table = table.with_columns(
                user=pl.format("A{}", (pl.col("user") * 7_919 % 10_000_019).cast(pl.String).str.zfill(12)),
                item=pl.format("B{}", pl.col("item").cast(pl.String).str.zfill(9)),
            )
            table.write_csv(file, include_header=start == 0)
    index = np.arange(items)
    meta = pl.DataFrame({"index": index}).select(
        item=pl.format("B{}", pl.col("index").cast(pl.String).str.zfill(9)),
        title=pl.format("Product {} &amp; more, <b>size</b> {}", "index", pl.col("index") % 12),
        brand=pl.format("Brand {}", pl.col("index") % 5_000),
        description=pl.format("A product with number {} that many people like. {}", "index", pl.lit("It lasts. " * 20)),
    )
    meta.write_parquet(folder / "items.parquet")
    return reviews, folder / "items.parquet"


def measure(folder: Path, core: int) -> dict[str, Any]:
    """Prepare the generated files in this process; seconds of each step and the peak memory of it all."""
    from vlrank.config import PrepareConfig
    from vlrank.data import prepare

    seconds: dict[str, float] = {}

    def timed(module: Any, name: str) -> None:
        function = getattr(module, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name.strip("_")] = time.perf_counter() - started

        setattr(module, name, wrapper)

    for name in ("_inputs", "_read_interactions", "_read_items", "order", "drop_duplicates", "k_core", "sequences"):
        timed(prepare, name)
    timed(prepare, "_items_table")
    config = PrepareConfig(
        reviews=(folder / "reviews.csv",),
        meta=(folder / "items.parquet",),
        out=folder / "dataset",
        min_uc=core,
        min_sc=core,
    )
    load = os.getloadavg()[0]
    started = time.perf_counter()
    summary = prepare.run(config)
    total = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "load_average": round(load, 1),  # processes that wanted a core when it began: above 0 means shared time
        "seconds": round(total, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),  # of all threads: what a busy machine cannot hide
        "peak_memory_gib": round(usage.ru_maxrss / 2**20, 2),
        "steps_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "kept": dict(summary.counts),
    }


def plain_core(reviews: Path, core: int) -> int:
    """Interactions in the k-core by repeated joins in Polars: slow, obvious, independent of the package."""
    table = pl.read_csv(reviews, columns=["user", "item"])
    table = table.select(pl.col("user", "item").cast(pl.Categorical).to_physical()).unique()
    while True:
        kept = table.filter((pl.len().over("user") >= core) & (pl.len().over("item") >= core))
        if len(kept) == len(table):
            return len(table)
        table = kept


def sizes(interactions: int, items: int, growth: bool) -> Iterator[tuple[int, int]]:
    """The given size, and with ``growth`` a tenth, a quarter and half of it before."""
    for share in (0.1, 0.25, 0.5) if growth else ():
        yield int(interactions * share), int(items * share)
    yield interactions, items


def main() -> None:
    """Generate, measure in a fresh process per size, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=20_000_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--core", type=int, default=5)
    parser.add_argument("--no_growth", action="store_true", help="only the full size")
    parser.add_argument("--check", action="store_true", help="compare with the plain k-core")
    parser.add_argument("--folder", type=Path, help="for the generated files; default a temporary one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kcore.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.core)))
        return
    runs = []
    for interactions, items in sizes(options.interactions, options.items, not options.no_growth):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            reviews, _ = generate(folder, interactions, items)
            command = [sys.executable, __file__, "--measure", str(folder), "--core", str(options.core)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            run = {"interactions": interactions, "items": items, "reviews_mb": reviews.stat().st_size // 10**6}
            run |= json.loads(done.stdout.splitlines()[-1])
            run["rows_per_second"] = round(interactions / run["seconds"])
            if options.check:
                run["plain_core_agrees"] = plain_core(reviews, options.core) == run["kept"]["interactions"]  # type: ignore[index]
            runs.append(run)
            print(json.dumps(run), flush=True)
    import pyarrow

    result = {
        "what": "raw CSV and Parquet metadata to a committed dataset: read, filter, k-core, split, write",
        "command": " ".join(["python", "bench/kcore.py", *sys.argv[1:]]),
        "hardware": {
            "cores": len(os.sched_getaffinity(0)),
            "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        },
        "versions": {
            "python": platform.python_version(),
            "polars": pl.__version__,
            "pyarrow": pyarrow.__version__,
            "numpy": np.__version__,
        },
        "runs": runs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

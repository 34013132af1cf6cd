"""How fast and how large: metrics of 1 million users x 50 candidates, with intervals and a paired comparison.

    python bench/metrics.py [--users 1000000] [--candidates 50] [--out bench/results/metrics.json]

The goal (issue 9): under 30 s and 4 GiB on 2 cores, from the rankings table in memory to all numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vlrank.data.lists import Lists
from vlrank.evaluation.compare import compare_ranks
from vlrank.evaluation.metrics import KS, evaluate_ranks


def main() -> None:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table, targets = rankings(args.users, args.candidates)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - start, 2)
        return result

    lists = timed("read lists", lambda: Lists.from_frame(table))
    ranks = timed("ranks", lambda: lists.rank_of(targets))
    timed("25 metrics, 2,000 resamples", lambda: evaluate_ranks(ranks, bootstrap=2000))
    tied = timed("sort by scores", lambda: lists.sorted_by(lists.scores.round(1)))  # type: ignore[union-attr]
    other = timed("ranks of the second method", lambda: tied.rank_of(targets))
    timed("paired tests", lambda: compare_ranks(ranks, other, metrics=["ndcg@10", "recall@10", "mrr@10"], ks=KS))
    result = {
        "users": args.users,
        "candidates": args.candidates,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


def rankings(users: int, candidates: int) -> tuple[pl.DataFrame, np.ndarray]:
    """A rankings table as it comes out of Parquet, and the targets; nine in ten targets are listed."""
    rng = np.random.default_rng(0)
    items = rng.integers(1, 100_000, size=(users, candidates), dtype=np.int32)
    scores = -np.sort(rng.random((users, candidates), dtype=np.float32), axis=1)
    places = rng.integers(0, candidates, size=users)
    targets = np.where(rng.random(users) < 0.9, items[np.arange(users), places], 100_000)
    width = pl.Array(pl.Int32, candidates), pl.Array(pl.Float32, candidates)
    table = pl.DataFrame(
        {
            "user_id": np.arange(1, users + 1, dtype=np.int32),
            "item_ids": pl.Series(items, dtype=width[0]).arr.to_list(),
            "scores": pl.Series(scores, dtype=width[1]).arr.to_list(),
        }
    )
    return table, targets


if __name__ == "__main__":
    main()

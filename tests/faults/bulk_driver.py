"""A bulk run in a process of its own, to be killed: ``bulk_driver.py FOLDER ROWS [--nodes] [--one]``.

Each batch takes a tenth of a second and notes the process that worked on it in FOLDER/pids. With ``--nodes`` Ray is a
cluster of a head without free CPUs for the stage and two nodes, one of which is killed when FOLDER/kill_node appears.
With ``--one`` a single actor does all the work.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import polars as pl

from vlrank.bulk import Shards, run_bulk
from vlrank.config import RayConfig
from vlrank.data.schemas import GENERATED
from vlrank.runtime import ray_session

SHARD_ROWS = 10


def make_shards(folder: Path) -> Shards:
    return Shards(folder / "captions", GENERATED, "item_id", folder / "quarantine", "caption")


def make_wanted(rows: int) -> pl.DataFrame:
    keys = pl.Series("item_id", range(1, rows + 1), dtype=pl.Int32)
    return pl.DataFrame({"item_id": keys, "input_hash": [f"h{key}" for key in keys]})


def is_bad(key: int) -> bool:
    return key % 17 == 0


class SlowCaptioner:
    """An engine's stand-in: an actor that holds on to its work for a while."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (self.folder / "pids" / f"{os.getpid()}-{node}").touch()
        time.sleep(0.1)
        keys = batch["item_id"].tolist()
        batch["text"] = [f"text {key}" for key in keys]
        batch["model"] = ["m"] * len(keys)
        batch["prompt_id"] = ["caption/v1"] * len(keys)
        batch["error"] = ["bad" if is_bad(key) else "" for key in keys]
        return batch


def main(folder: Path, rows: int, nodes: bool, actors: int) -> None:
    (folder / "pids").mkdir(exist_ok=True)

    def stages(dataset: Any) -> Any:
        import ray.data

        return dataset.map_batches(
            SlowCaptioner,
            fn_constructor_kwargs={"folder": folder},
            batch_size=5,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=2,
        )

    def work() -> None:
        result = run_bulk(make_wanted(rows), stages, make_shards(folder), shard_rows=SHARD_ROWS, description="bulk")
        print(f"finished done={result.done} reused={result.reused} quarantined={result.quarantined}", flush=True)

    if not nodes:
        with ray_session(RayConfig(num_cpus=8)):
            work()
        return
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    victims = [cluster.add_node(num_cpus=4), cluster.add_node(num_cpus=4)]
    ray.init(address=cluster.address, log_to_driver=False)

    def kill_when_asked() -> None:
        while not (folder / "kill_node").exists():
            time.sleep(0.05)
        cluster.remove_node(victims[0], allow_graceful=False)
        (folder / "node_killed").touch()

    threading.Thread(target=kill_when_asked, daemon=True).start()
    try:
        work()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "--nodes" in sys.argv, 1 if "--one" in sys.argv else 2)

"""A sweep whose node dies under a running trial: the trial goes on elsewhere, from where it was."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlrank.config import TuneConfig, load_config
from vlrank.tuning.run import run

from .stand_in import StandIn, quality
from .test_run import options, sweep_of

pytestmark = pytest.mark.stack


@pytest.fixture
def nodes() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[StandIn.__module__])
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_trials_of_a_lost_node_go_on_elsewhere(nodes: Any, tmp_path: Path) -> None:
    # Epochs of half a second: the node is lost in the middle of the first trial.
    train = {"weight_decay": 0.5, "epochs": 6}
    config = load_config(TuneConfig, **options(tmp_path / "sweep", train=train, trials=3, scheduler="none"))
    first = config.out / "runs" / "caption-000"
    lost: list[str] = []

    def lose_the_node_of_the_first_trial() -> None:
        history = first / "history.jsonl"
        for _ in range(1200):
            if history.exists() and len(history.read_text().splitlines()) >= 2:
                lost.append((first / "starts").read_text().split()[0])
                (node,) = (node for node in nodes.worker_nodes if node.node_id == lost[0])
                nodes.remove_node(node, allow_graceful=False)
                return
            time.sleep(0.05)

    killer = threading.Thread(target=lose_the_node_of_the_first_trial)
    killer.start()
    summary = run(config, build=StandIn)
    killer.join()
    assert lost, "the first trial never came to its second epoch"
    assert (summary.counts["completed"], summary.counts["failed"]) == (3, 0)
    starts = (first / "starts").read_text().split()
    assert starts[0] == lost[0] != starts[-1]
    for trial in sweep_of(config.out):
        values = [entry["metric"] for entry in trial.epochs]
        assert values == [quality(trial.config["lr"], epoch) for epoch in range(1, 7)], "no epoch twice, none left out"

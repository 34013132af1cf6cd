"""What an engine takes of a cluster."""

import json
from typing import Any

import pytest
import ray

from vlrank.config import EngineConfig
from vlrank.engines import resources
from vlrank.engines.resources import RESTARTS, engine_actor
from vlrank.errors import UserError
from vlrank.runtime import CAPACITY


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two nodes of four GPUs; a third has gone."""
    small, gone = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}
    found = [{"Alive": True, "Resources": small}] * 2 + [{"Alive": False, "Resources": gone}]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32.0, "GPU": 8.0})
    monkeypatch.setattr(resources, "cluster_gpus", lambda: 8.0)
    return found


def test_an_engine_is_one_actor_that_restarts_five_times(nodes: list[dict[str, Any]]) -> None:
    assert engine_actor(EngineConfig()) == {"num_cpus": 1, "num_gpus": 1, "max_restarts": RESTARTS}
    assert engine_actor(EngineConfig(gpus=0.25))["num_gpus"] == 0.25
    assert engine_actor(EngineConfig(tensor_parallel_size=4))["num_gpus"] == 4
    assert engine_actor(EngineConfig(gpus=0))["num_gpus"] == 0
    assert RESTARTS == 5


@pytest.mark.parametrize("engine", [{"tensor_parallel_size": 8}, {"cpus": 17}, {"gpus": 5}])
def test_an_engine_that_fits_no_node_is_refused(nodes: list[dict[str, Any]], engine: dict[str, Any]) -> None:
    """Ray would wait for such a node forever, without a word."""
    with pytest.raises(UserError, match=r"on one node; the cluster's nodes have 4 GPU, 16 CPU\n"):
        engine_actor(EngineConfig(**engine))


def test_a_node_that_an_autoscaler_can_start_counts(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CAPACITY, json.dumps({"GPU": 16, "CPU": 256}))
    assert engine_actor(EngineConfig(tensor_parallel_size=8))["num_gpus"] == 8
    with pytest.raises(UserError, match="on one node"):
        engine_actor(EngineConfig(tensor_parallel_size=32))

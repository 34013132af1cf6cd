"""Ray sessions: join the cluster we are in, or start one on this machine and stop it afterwards."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlrank.config import RayConfig


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Ray, connected for the time of the block.

    An already connected process is used as it is and left connected. With no address given and none in the environment
    Ray starts on this machine; logical CPUs default to at least 8, because Ray Data reserves whole CPUs for actors that
    mostly wait and would otherwise stall on a laptop.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": os.environ.get("VLRANK_VERBOSE") == "1", "logging_level": logging.ERROR}
    if address and address != "local":
        ray.init(address=address, **quiet)
    else:
        # "local" on purpose: without it a stale address file of an earlier cluster makes ray.init fail.
        cpus = config.num_cpus or max(8, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def cluster_gpus() -> float:
    """GPUs of the connected cluster."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0))

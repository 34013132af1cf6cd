"""Ray sessions: join the cluster we are in, or start one on this machine and stop it afterwards."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.data import DataContext

    from vlrank.config import RayConfig

CAPACITY = "VLRANK_CAPACITY"
"""Environment variable: what an autoscaling cluster can grow to, JSON such as ``{"GPU": 8}``."""


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
    by_sigterm = signal.getsignal(signal.SIGTERM) is _interrupt
    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": os.environ.get("VLRANK_VERBOSE") == "1", "logging_level": logging.ERROR}
    if address and address != "local":
        ray.init(address=address, **quiet)
    else:
        # One process fewer for every run and every trial of a sweep: this machine will not be taken away from itself.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Reports of a worker, and its end, are noticed every so many seconds; 2 by default, which short trials feel.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        # "local" on purpose: without it a stale address file of an earlier cluster makes ray.init fail.
        cpus = config.num_cpus or max(8, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    if by_sigterm:
        interrupt_on_sigterm()  # Ray has put its own handlers in place, which print their stack and abort
    try:
        yield
    finally:
        ray.shutdown()


def interrupt_on_sigterm() -> None:
    """End as by Ctrl-C where a batch system, a container or `ray job stop` ends this process; for programs, not for
    libraries. Other threads than the main one cannot set this and leave it.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)  # for whoever listens now: Python, Ray Train, Ray Tune


def quiet_data() -> DataContext:
    """Ray Data's settings with its own progress and log lines off: ours show items, tokens and time left."""
    import ray.data

    if os.environ.get("VLRANK_VERBOSE") != "1":
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    return context


def cluster_resources() -> dict[str, float]:
    """Resources of the connected cluster, grown to what `CAPACITY` says that it can have.

    Groups of workers that are scaled down to nothing are not to be seen in Ray, which does not know what they could be:
    a stage would take a cluster for one without GPUs and run on its CPUs.
    """
    import ray

    grown = {kind: float(number) for kind, number in json.loads(os.environ.get(CAPACITY, "{}")).items()}
    there = {kind: float(number) for kind, number in ray.cluster_resources().items()}
    return there | {kind: max(number, there.get(kind, 0.0)) for kind, number in grown.items()}


def cluster_gpus() -> float:
    """GPUs of the connected cluster, or that it can grow to."""
    return cluster_resources().get("GPU", 0.0)

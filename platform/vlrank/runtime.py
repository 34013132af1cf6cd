"""Ray sessions: join the cluster we are in, or start one on this machine and stop it afterwards."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from vlrank.compat import lean_node, patient_start, quiet_core
from vlrank.errors import UserError
from vlrank.supervisor import end_if_lost, running, watch

if TYPE_CHECKING:
    from ray.data import DataContext

    from vlrank.config import RayConfig

CAPACITY = "VLRANK_CAPACITY"
"""Environment variable: what an autoscaling cluster can grow to, JSON such as ``{"GPU": 8}``."""


STARTED_HERE = "VLRANK_STARTED_RAY"
"""Environment variable of all processes of a Ray that `ray_session` has started."""


@contextmanager
def ray_session(config: RayConfig, *, data: bool = False, preload: Preload | None = None) -> Iterator[None]:
    """Ray, connected for the time of the block.

    An already connected process is used as it is and left connected. With no address given and none in the environment
    Ray starts on this machine; logical CPUs default to at least 8, because Ray Data reserves whole CPUs for actors that
    mostly wait and would otherwise stall on a laptop.

    Args:
        config: Where Ray is, or how to start it.
        data: Ray Data will be used: it is imported while Ray's processes start.
        preload: What the first processes of a Ray that is started here are for; this one imports the same meanwhile.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = cluster_address(config)
    verbose = os.environ.get("VLRANK_VERBOSE") == "1"
    quiet = {"log_to_driver": verbose, "logging_level": logging.ERROR}
    imports = [*(preload.modules if preload else ()), *(["ray.data"] if data else [])]
    with _own_signal_handlers(), imported(imports), nullcontext() if verbose else quiet_core():
        if address:
            _join(address, **quiet)
        else:
            _start_here(config.num_cpus or max(8, os.cpu_count() or 1), preload, **quiet)
    try:
        yield
    except BaseException:
        end_if_lost()
        raise
    finally:
        watch([])
        ray.shutdown()
        os.environ.pop(STARTED_HERE, None)


def cluster_address(config: RayConfig) -> str | None:
    """Of the cluster to join; None where Ray is started on this machine."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def _join(address: str, **options: Any) -> None:
    import ray

    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise UserError(
            f"the Ray cluster at {address} could not be joined: {_first_line(error)}",
            "Give the address of a running cluster as ray.address or RAY_ADDRESS, or `local` to start Ray here. Where "
            "Ray says InvalidAuthToken, set RAY_AUTH_MODE=token and put the cluster's token in ~/.ray/auth_token or "
            "RAY_AUTH_TOKEN.",
        ) from error


@dataclass(frozen=True, slots=True)
class Preload:
    """Python processes that Ray starts ahead, while the command itself still imports, and what they import.

    Attributes:
        modules: Names.
        processes: How many; without it Ray starts one per core, before it knows what for.
    """

    modules: Sequence[str]
    processes: int


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that processes started inside the block inherit; those that are set keep their values."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def imported(modules: Sequence[str]) -> Iterator[None]:
    """Import in this process while the block waits for something else, and be done at its end."""

    def import_all() -> None:
        for name in modules:
            with suppress(Exception):  # not installed, or said where it is imported again
                import_module(name)

    thread = threading.Thread(target=import_all, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _start_here(cpus: int, preload: Preload | None, **options: Any) -> None:
    import ray

    # One process fewer for every run and every trial of a sweep: preemption cannot happen on this machine.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Reports of a worker, and its end, are noticed every so many seconds; 2 by default, which short trials feel.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray Train's controller gets along with blocking calls; it would set this for a process of its own.
    os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
    os.environ[STARTED_HERE] = "1"
    for name in ("RAY_raylet_start_wait_time_s", "RAY_gcs_server_port_wait_time_s"):
        os.environ.setdefault(name, str(_START_S))
    ahead = {}
    if preload is not None:
        ahead["RAY_preload_python_modules"] = ",".join(preload.modules)
        ahead["RAY_worker_maximum_startup_concurrency"] = str(preload.processes)
    folder = ray_folder()
    try:
        lean = lean_node(shows_logs=bool(options.get("log_to_driver")))
        with lean, patient_start(_START_S, _ray_is_alive), environment(ahead):
            # "local" on purpose: without it a stale address file of an earlier cluster makes ray.init fail.
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=str(folder), **options)
    except Exception as error:
        os.environ.pop(STARTED_HERE, None)
        for process in ray_processes():
            process.kill()
        raise UserError(
            f"Ray did not start on this machine: {_first_line(error)}",
            f"On a busy machine, run the same command again; else the newest files in {folder}/session_latest/logs "
            "say more. A full /dev/shm or disk and a low limit on processes (ulimit -u) are usual causes.",
        ) from error
    watch(ray_processes())


_START_S = 120
"""How long Ray's processes may take to start; Ray's own 10 and 30 seconds are too short for a busy machine."""


def _ray_is_alive() -> bool:
    return all(running(process) for process in ray_processes())


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def ray_folder() -> Path:
    """Where Ray keeps sockets and logs: ``ray`` in ``RAY_TMPDIR``, else in ``TMPDIR`` or ``/tmp``.

    Where it is somebody else's, ``ray-UID`` beside it is taken.

    Raises:
        UserError: none of them can be used.
    """
    chosen = os.environ.get("RAY_TMPDIR")
    parents = [chosen] if chosen else [os.environ.get("TMPDIR", "/tmp"), "/tmp"]
    problems = {}
    for parent in dict.fromkeys(parents):
        for name in ("ray", f"ray-{os.getuid()}"):
            folder = Path(parent).absolute() / name
            problem = _unusable(folder)
            if problem is None:
                return folder
            problems[str(folder)] = problem
    reasons = "; ".join(f"{folder}: {problem}" for folder, problem in problems.items())
    raise UserError(
        f"Ray finds no folder for its sockets and logs ({reasons})",
        f"Set RAY_TMPDIR to a writable folder on a local disk with a path of at most {_FOLDER_BYTES - len('/ray')} "
        "bytes, e.g. RAY_TMPDIR=/tmp.",
    )


_FOLDER_BYTES = (103 if sys.platform == "darwin" else 107) - len(
    "/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store"
)
"""What the path of a Unix socket leaves for `ray_folder`."""


def _unusable(folder: Path) -> str | None:
    if len(os.fsencode(folder)) > _FOLDER_BYTES:
        return "too long for the path of a socket"
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)


def ray_processes() -> list[psutil.Process]:
    """Ray's own processes that this one has started."""
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # others of its children end at any time
            if process.name() in ("gcs_server", "raylet"):
                found.append(process)
    return found


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray replaces SIGTERM's handler by one that prints its stack and aborts; puts the one found back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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

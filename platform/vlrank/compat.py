"""Remedies for mixed stacks, each in one place; they do nothing where they are not needed.

1. **torchvision without CUDA.** PyPI has torchvision as a CUDA build only; beside a CPU torch its compiled operators
   cannot load, and ``import torchvision`` fails because ``torchvision::nms`` is unknown. Declaring the two
   operators that torchvision registers fake kernels for makes the import work; image processors need nothing else of
   it. The declaration has to come before the import in *every* process (vLLM and Ray start their own), so set-up writes
   a ``.pth`` file into the environment: ``python -m vlrank.compat``.
2. **Unsloth beside vLLM.** Unsloth imports vLLM's compiled module where vLLM is installed, and that kills the process
   on a CPU without AVX-512. Training never needs vLLM: `hide_vllm` makes it look absent before Unsloth is imported.
3. **What nobody asked for.** transformers' Trainer and PEFT import torchao, datasets and bitsandbytes wherever they are
   installed, and these much of PyTorch's compiler: more than half of a worker's imports. SciPy, for the losses of
   object detection, and boto3, for SageMaker, are an eighth of the rest (`hide_extras`). Tokenizers import PyTorch and
   its compiler, although they do not use it (`hide_torch`, `show_torch`, `whole_transformers`). transformers and TRL,
   which Unsloth imports, each read the file lists of all installed packages: once is enough (`list_packages_once`).
4. **Sharded weights without GPUs.** accelerate refuses what PyTorch can: `shard_on_cpus`.
5. **Ray on a busy machine.** ``ray.init`` gives its node 30 seconds to register, whatever is set: `patient_start`.
6. **Ray's own processes.** ``include_dashboard=False`` starts the API server nevertheless, and ``ray.init`` waits for
   it; an autoscaler and a reader of logs are started for nobody; and where another Ray runs on the machine, the start
   waits for its port to become free: `lean_node`.
7. **Ray's log lines.** The compiled part of a driver writes to the terminal what its users can do nothing about:
   `quiet_core`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

PTH_NAME = "vlrank-torchvision.pth"
_OPERATORS = (
    ("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
)


class _DeclareBeforeImport(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is about to be imported, so that a bare `python` does not load torch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare_operators()
        return None


def _declare_operators() -> None:
    if not needs_pth():  # a torchvision that registers its operators itself must not find them declared
        return
    import torch

    for name, schema in _OPERATORS:
        try:
            torch.library.define(name, schema)
        except RuntimeError:  # already there
            continue


def patch_torchvision() -> None:
    """Make ``import torchvision`` work beside a CPU torch in this process. Cheap, and safe to call twice."""
    if "torchvision" in sys.modules or any(isinstance(finder, _DeclareBeforeImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _DeclareBeforeImport())


def pth_file() -> Path:
    """Where `install` puts its file: the environment's site-packages."""
    return Path(sysconfig.get_paths()["purelib"]) / PTH_NAME


def needs_pth() -> bool:
    """Whether this environment pairs a CPU torch with a CUDA build of torchvision."""
    torchvision = importlib.machinery.PathFinder.find_spec("torchvision")
    if torchvision is None or torchvision.origin is None or importlib.util.find_spec("torch") is None:
        return False
    import torch

    # torchvision's metadata does not name the build, and importing it is what fails.
    build = re.search(r"__version__ = .[\w.]+\+(\w+)", (Path(torchvision.origin).parent / "version.py").read_text())
    cuda_build = build is not None and build[1].startswith("cu")
    return cuda_build and torch.version.cuda is None and torch.version.hip is None


def install() -> Path | None:
    """Write the ``.pth`` file where it is needed, remove it where it is not.

    Returns:
        The file, or None where the environment needs none.
    """
    path = pth_file()
    if not needs_pth():
        path.unlink(missing_ok=True)
        return None
    # Guarded, because site prints a traceback at every start of Python when a .pth line raises.
    path.write_text(
        "import importlib.util as _u; "
        "_u.find_spec('vlrank') and __import__('vlrank.compat', fromlist=['_']).patch_torchvision()\n",
        encoding="utf-8",
    )
    return path


def hide_vllm() -> None:
    """Make vLLM look absent in this process; call before ``import unsloth``.

    Raises:
        RuntimeError: vLLM is already imported here: training and vLLM need separate processes.
    """
    if sys.modules.get("vllm") is not None:
        raise RuntimeError("vLLM is already imported in this process; Unsloth needs a process of its own")
    sys.modules["vllm"] = None  # type: ignore[assignment]


def list_packages_once() -> None:
    """Let what is installed be read from the disk once in this process; call before ``import unsloth``."""
    if not hasattr(importlib.metadata.packages_distributions, "cache_info"):
        importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)


def hide_extras(*, bitsandbytes: bool) -> None:
    """Make what training does not use look absent in this process of our own; call before ``import transformers``.

    Not for a user's own process, which may want them, and not where weights are quantised by torchao.

    Args:
        bitsandbytes: That too, which takes PEFT a second to import: no weights and no moments have 4 or 8 bits.
    """
    # scikit-learn goes with SciPy, which it cannot do without: transformers imports it wherever it is installed.
    names = ("torchao", "datasets", "scipy", "sklearn", "boto3")
    for name in (*names, *(["bitsandbytes"] if bitsandbytes else [])):
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]
            _hidden.add(name)


_hidden: set[str] = set()
"""What `hide_extras` has made look absent."""


def show_all() -> None:
    """Undo `hide_extras` and `hide_torch`: this process is to do something else than it was prepared for."""
    for name in _hidden:
        if sys.modules.get(name) is None:
            sys.modules.pop(name, None)
    _hidden.clear()
    whole_transformers()


_torchless = False
"""Whether PyTorch looked absent when transformers was imported."""


def hide_torch() -> None:
    """Make PyTorch look absent, for tokenizers; call before ``import transformers``, in a process of our own."""
    global _torchless
    if "transformers" not in sys.modules and "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        _torchless = True


def show_torch() -> None:
    """Undo `hide_torch` for everything but transformers, which goes on without it until `whole_transformers`."""
    if "torch" in sys.modules and sys.modules["torch"] is None:
        del sys.modules["torch"]


def whole_transformers() -> None:
    """Let transformers be imported again if that happened without PyTorch; tokenizers made so far go on working."""
    global _torchless
    if _torchless:
        _torchless = False
        show_torch()
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]


def shard_on_cpus() -> None:
    """Let accelerate shard a model (FSDP2) over CPU processes, which PyTorch can and accelerate refuses.

    Nobody trains that way, but everything about sharded training can so be tried, and is tested, without GPUs.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    start = PartialState.__init__

    def started(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU  # the kinds for which it looks at the FSDP plugin

    PartialState.__init__ = started


@contextmanager
def patient_start(seconds: float, running: Callable[[], bool]) -> Iterator[None]:
    """Let `ray.init` inside the block wait so long for its own node.

    Args:
        seconds: Instead of Ray's 30.
        running: Whether Ray's processes are; there is nothing to wait for otherwise.
    """
    from ray._private import services

    get_node, end = services.get_node, time.monotonic() + seconds

    def patient(*arguments: Any) -> Any:
        while True:
            try:
                return get_node(*arguments)
            except RuntimeError as error:
                if time.monotonic() > end:
                    raise
                if not running():
                    raise ChildProcessError("one of Ray's own processes ended while it started") from error
                time.sleep(0.1)

    services.get_node = patient
    try:
        yield
    finally:
        services.get_node = get_node


@contextmanager
def lean_node(*, shows_logs: bool) -> Iterator[None]:
    """Let `ray.init` inside the block start only what a session that ends with its command asks for.

    That is a node without the API server (dashboard, ``ray job``) and the autoscaler, and with an agent that takes any
    free port.

    Args:
        shows_logs: Start what shows the logs of workers.
    """
    from ray._private import services
    from ray._private.node import Node

    def nothing(*arguments: Any, **options: Any) -> None:
        return None

    start = services.start_raylet
    replaced: list[tuple[Any, str, Any]] = [
        (services, "start_api_server", lambda *arguments, **options: ("", None)),
        (services, "start_raylet", lambda *given, **more: start(*given, **{**more, "dashboard_agent_listen_port": 0})),
        (Node, "start_monitor", nothing),
    ]
    if not shows_logs:
        replaced.append((Node, "start_log_monitor", nothing))
    before = [(place, name, getattr(place, name)) for place, name, _ in replaced]
    for place, name, value in replaced:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


@contextmanager
def quiet_core() -> Iterator[None]:
    """Let `ray.init` inside the block connect a process whose compiled part writes no log lines to the terminal.

    It takes an actor of Ray Data that may be restarted for a mistake of the user. What ends a run is raised in Python.
    """
    from ray._private import worker

    connect = worker.connect

    def quietly(*arguments: Any, **options: Any) -> Any:
        if _LOG_LEVEL in os.environ:  # somebody wants to see them
            return connect(*arguments, **options)
        sys.stderr.flush()
        terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.environ[_LOG_LEVEL] = "fatal"
        os.dup2(nowhere, 2)  # for a line that says that the level was set
        try:
            return connect(*arguments, **options)
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            os.close(nowhere)
            del os.environ[_LOG_LEVEL]

    worker.connect = quietly
    try:
        yield
    finally:
        worker.connect = connect


_LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"


if __name__ == "__main__":
    written = install()
    print(f"wrote {written}" if written else "torchvision needs no remedy here")

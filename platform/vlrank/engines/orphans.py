"""A vLLM process ends with the process that started the engine; for vLLM's ``worker_extension_cls``.

vLLM imports this module in its workers, the processes that hold the GPU's memory. Killed without a chance to clean up,
the process that started the engine would leave them running. (prctl's PR_SET_PDEATHSIG is sent when the thread that
started a process ends, which need not be the last one of its process.)
"""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import parent_process

import psutil


class EndsWithParent:
    """What vLLM adds to the bases of its worker class; empty."""


def _ancestors() -> tuple[int, ...]:
    """The parent's process id and, where the parent is vLLM's core, that of the process that started the engine."""
    core = parent_process()
    if core is None or not core.name.startswith("EngineCore"):
        return (os.getppid(),)
    try:
        return os.getppid(), psutil.Process(os.getppid()).ppid()
    except psutil.NoSuchProcess:
        return (0,)


def _watch(ancestors: tuple[int, ...]) -> None:
    while _ancestors() == ancestors:  # a process whose parent has died gets another one
        time.sleep(1)
    if len(ancestors) > 1 and os.getppid() == ancestors[0]:
        os.kill(ancestors[0], signal.SIGKILL)  # vLLM's core, which would take its time
    os.kill(os.getpid(), signal.SIGKILL)


if parent_process() is not None:
    threading.Thread(target=_watch, args=(_ancestors(),), daemon=True, name="parent-watch").start()

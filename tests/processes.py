"""Processes that tests start: a failing test shows what its process printed, and none depends on an idle machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 600.0
"""A limit against hanging for ever, not a measure of speed."""


class Program:
    """A process in a session of its own; its output goes to a file, so that it never waits for a reader."""

    def __init__(self, *command: object, env: Mapping[str, str] | None = None, **options: Any) -> None:
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed with the object)
        self.process = subprocess.Popen(
            [str(word) for word in command],
            env=None if env is None else os.environ | dict(env),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        """What it has printed so far."""
        self._output.seek(0)
        return self._output.read()

    def family(self) -> list[psutil.Process]:
        """The process and all its descendants."""
        own = psutil.Process(self.pid)
        return [own, *own.children(recursive=True)]

    def wait_for(self, happened: Callable[[], object], what: str = "what the test waits for") -> None:
        """Until something is true, while the process goes on."""
        end = time.monotonic() + PATIENCE_S
        while not happened():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.output}"
            assert time.monotonic() < end, f"{what} did not happen:\n{self.output}"
            time.sleep(0.02)

    def finish(self, code: int = 0) -> str:
        """The output of a process that ends by itself with this code."""
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end:\n{self.output}") from None
        assert self.process.returncode == code, f"ended with {self.process.returncode}:\n{self.output}"
        return self.output

    def kill(self) -> None:
        """The process alone; what it had started has to notice that, and is gone afterwards."""
        if self.process.poll() is None:
            family = self.family()
            self.process.kill()
            self.process.wait()
            _, alive = psutil.wait_procs(family, timeout=60)
            _end(alive)

    def lose_power(self) -> None:
        """The process and all its descendants at once, as when a machine goes away."""
        if self.process.poll() is None:
            _end(self.family())
        self.process.wait()


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=60)


def two_shards(folder: Path, *arguments: object) -> Program:
    """`vlrank`, a bulk stage of which commits two shards and waits then, in the middle, to be killed.

    Args:
        folder: For notes.
        arguments: Of the command; Ray starts on this machine.
    """
    return Program(sys.executable, "-c", _TWO_SHARDS, *arguments, "ray.address=local", env={"NOTES": str(folder)})


_TWO_SHARDS = """
from vlrank import bulk
from vlrank.cli import main

def commit(block, shards, run):
    import os, time
    from vlrank import bulk  # in a worker, where it is not replaced
    for number in range(2):
        try:
            os.close(os.open(os.path.join(os.environ["NOTES"], f"shard{number}"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return bulk._commit(block, shards, run)
    while True:
        time.sleep(1)

bulk._commit = commit
main()
"""

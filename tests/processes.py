"""Processes that tests start: a failing test shows what its process printed, and none depends on an idle machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil

Fact = TypeVar("Fact")
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
        return family(self.pid)

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
            end(alive)

    def lose_power(self) -> None:
        """The process and all its descendants at once, as when a machine goes away."""
        if self.process.poll() is None:
            end(self.family())
        self.process.wait()


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants; empty when it has ended and nobody waits for it any more."""
    try:
        own = psutil.Process(pid)
        return [own, *own.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def of_living(
    processes: Iterable[psutil.Process], read: Callable[[psutil.Process], Fact]
) -> dict[psutil.Process, Fact]:
    """What ``read`` returns for each process, without those of which nothing can be read.

    A listed process may have ended before it is read; it is then gone, or a zombie until its parent waits for it.
    """
    facts = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            facts[process] = read(process)
    return facts


def command_line(process: psutil.Process) -> str:
    """As `ps` shows it; of Ray's workers it is their title.

    Raises:
        psutil.Error: the process has ended; `of_living` leaves it out.
    """
    return " ".join(process.cmdline()).strip()  # behind a title the old words leave blanks


def end(processes: Iterable[psutil.Process]) -> None:
    """Kill those that live, and wait until they have ended."""
    psutil.wait_procs(of_living(processes, psutil.Process.kill), timeout=60)


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

"""What tests read of processes that may end at any moment: a test that fails by that chance hides what it tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.processes import Program, command_line, end, family, of_living

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


@pytest.fixture
def zombie() -> Iterator[psutil.Process]:
    """A process that has ended and that nobody has waited for."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        pass
    yield process
    child.wait()


@pytest.fixture
def gone() -> psutil.Process:
    child = subprocess.Popen(SLEEP)
    process = psutil.Process(child.pid)
    child.kill()
    child.wait()
    return process


@pytest.fixture
def living() -> Iterator[Program]:
    program = Program(*SLEEP)
    yield program
    program.kill()


def test_a_process_that_has_ended_is_left_out(zombie: psutil.Process, gone: psutil.Process, living: Program) -> None:
    for ended in (zombie, gone):
        with pytest.raises(psutil.NoSuchProcess):
            command_line(ended)
    process = psutil.Process(living.pid)
    assert of_living([zombie, process, gone], command_line) == {process: " ".join(SLEEP)}


def test_other_errors_are_not_hidden(living: Program) -> None:
    with pytest.raises(ZeroDivisionError):
        of_living(family(living.pid), lambda process: 1 / 0)


def test_the_living_are_ended_beside_those_that_have_ended(gone: psutil.Process, living: Program) -> None:
    end([gone, psutil.Process(living.pid)])
    assert family(gone.pid) == family(living.pid) == []

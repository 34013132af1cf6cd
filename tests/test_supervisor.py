"""Every command ends with one message and the right code, and leaves no process behind; here with stand-ins for stages.

What a user would lose: a GPU held by a process that nobody sees, and a batch job that hangs until it is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import of_living
from vlrank import supervisor

COMMAND = """
import os, signal, subprocess, sys, time
import psutil
from vlrank import supervisor

supervisor.GRACE_S, supervisor._LEFTOVERS_S = float(sys.argv[2]), 0.2

def report(status, message):
    print(f"{status}: {message}", flush=True)

def helper(*words):
    # In a session of its own and deaf to polite requests, as some libraries start their servers.
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-c", code, *words], start_new_session=True)

def ready():
    open(sys.argv[1], "w").close()

def wait():
    while not os.path.exists(sys.argv[1] + ".go"):
        time.sleep(0.02)

def sleep():
    while True:
        time.sleep(600)

def work():
    {work}

supervisor.supervised(work, report)
"""

POLITE = """
    try:
        helper(); ready(); sleep()
    except KeyboardInterrupt:
        print("said by the command", flush=True)
        sys.exit(130)
"""
PATIENT = """
    supervisor.allow_grace(60)
    try:
        helper(); ready(); sleep()
    except KeyboardInterrupt:
        time.sleep(2)
        print("all is answered", flush=True)
"""
DEAF = "helper(); signal.signal(signal.SIGINT, signal.SIG_IGN); ready(); sleep()"
SWALLOWED = """
    helper()
    try:
        ready(); sleep()
    except BaseException:
        raise RuntimeError("an import was cut off") from None
"""
SILENT = "helper(); ready(); sleep()"
RAY_STARTS = "helper(); signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number)); ready(); sleep()"
WATCHING = "watched = helper(); supervisor.watch([psutil.Process(watched.pid)]); ready(); sleep()"


class Command:
    """A supervised command in a process group of its own."""

    def __init__(self, folder: Path, work: str, grace: float) -> None:
        marker = folder / "ready"
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND.replace("{work}", work), str(marker), str(grace)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        while not marker.exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)
        self.descendants = psutil.Process(self.process.pid).children(recursive=True)
        assert len(self.descendants) == 2

    def end(self) -> tuple[int, str]:
        """Exit code and output; every process that it had started is gone."""
        said, _ = self.process.communicate(timeout=60)
        assert not [process for process in self.descendants if process.is_running()]
        return self.process.returncode, said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Command] = []

    def command(work: str, grace: float = 60) -> Command:
        started.append(Command(tmp_path, work, grace))
        return started[-1]

    yield command
    for each in started:
        each.process.kill()
        of_living(each.descendants, psutil.Process.kill)
        each.process.wait()


def test_a_command_that_owes_answers_may_take_its_time(start: Any) -> None:
    command = start(PATIENT, grace=0.2)
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.end() == (0, "all is answered\n")


def test_a_signal_that_comes_while_the_command_is_forked_prints_no_traceback() -> None:
    code = """
import os, signal
from vlrank import supervisor

fork = os.fork

def forked():
    child = fork()
    os.kill(os.getpid(), signal.SIGTERM if child else signal.SIGINT)
    return child

os.fork = forked
supervisor.supervised(lambda: None, lambda status, message: print(f"{status}: {message}", flush=True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout == f"interrupted: {supervisor.INTERRUPTED}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_to_the_process_or_its_group(start: Any, number: signal.Signals, send: Any) -> None:
    command = start(POLITE)
    send(command.process.pid, number)
    assert command.end() == (130, "said by the command\n")


@pytest.mark.parametrize(("work", "grace"), [(DEAF, 1), (SILENT, 60)])
def test_a_command_that_says_nothing_is_ended_with_a_message(start: Any, work: str, grace: float) -> None:
    command = start(work, grace)
    os.kill(command.process.pid, signal.SIGTERM)
    code, said = command.end()
    assert code == 130
    assert said.startswith("interrupted: interrupted; what was committed stays")


def test_an_interrupt_that_somebody_swallowed_is_still_one(start: Any) -> None:
    command = start(SWALLOWED)
    os.killpg(command.process.pid, signal.SIGINT)
    code, said = command.end()
    assert code == 130
    assert "interrupted: interrupted; what was committed stays" in said


@pytest.mark.parametrize("work", [POLITE, RAY_STARTS])
def test_a_signal_to_the_command_alone_or_to_all_its_processes(start: Any, work: str) -> None:
    """`ray job stop` and scancel signal each process of a job; Ray's own handler exits without a word."""
    command = start(work)
    of_living((command.descendants[0], psutil.Process(command.process.pid)), psutil.Process.terminate)
    code, said = command.end()
    assert code == 130
    assert said in ("said by the command\n", f"interrupted: {said.removeprefix('interrupted: ')}")
    assert said.count("\n") == 1


def test_a_killed_supervisor_takes_its_command_along(start: Any) -> None:
    command = start(SILENT)
    command.process.kill()
    psutil.wait_procs(command.descendants[:1], timeout=60)
    assert not command.descendants[0].is_running()


def test_a_command_that_was_killed_is_told_of(start: Any) -> None:
    command = start(SILENT)
    command.descendants[0].kill()
    code, said = command.end()
    assert code == 1
    assert said.startswith("error: the command's process was killed by SIGKILL")


def test_a_lost_process_of_ray_ends_the_command(start: Any) -> None:
    command = start(WATCHING)
    command.descendants[1].kill()
    code, said = command.end()
    assert code == 1
    assert said.startswith("error: Ray's process python")


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("sys.exit(2)", 2), ("sys.exit('no')", 1)])
def test_codes_of_commands_that_end_by_themselves(start: Any, tmp_path: Path, end: str, code: int) -> None:
    command = start(f"helper(); ready(); wait(); {end}")
    (tmp_path / "ready.go").touch()
    assert command.end()[0] == code


def test_a_background_job_stays_deaf_to_ctrl_c(tmp_path: Path) -> None:
    """A shell without job control starts `command &` with SIGINT ignored, and nohup with SIGHUP."""
    marker = tmp_path / "ready"
    code = COMMAND.replace("{work}", "ready(); wait(); print('done')")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(marker), "60"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)],
    )
    while not marker.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGHUP)
    (tmp_path / "ready.go").touch()
    assert (process.communicate(timeout=60)[0], process.returncode) == ("done\n", 0)

"""A command and the process that watches it: signals, lost Ray processes, and what a command leaves behind.

`supervised` forks before anything heavy is imported. The child runs the command in a session of its own, so that a
signal to the process group (`timeout`, a terminal, systemd, scancel) does not reach Ray's processes before the command
has heard of it. The parent passes one SIGINT on, waits, and in the end kills every process that the command has
started: orphans come back to it, because it is their subreaper.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, NoReturn

import psutil

GRACE_S = 7.0
"""A command ends by itself within this time after a signal, or is killed."""
_EXIT_S = 60.0
"""A command that has said how it ends, without a signal, leaves Python within this time, or is killed."""
_LEFTOVERS_S = 3.0
"""Processes that outlive a command which ended by itself may finish within this time."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

INTERRUPTED = "interrupted; what was committed stays, and the same command goes on from there"

_STARTED = time.time()  # imported before anything heavy is

_supervisor: int | None = None  # the writing end of the pipe, in a supervised process
_watched: tuple[int, ...] = ()


def supervised(work: Callable[[], Any], report: Callable[[str, str], None]) -> NoReturn:
    """Run ``work`` in a child process and exit as the child does.

    Exit codes are those of ``work``; 130 after SIGINT, SIGTERM or SIGHUP; 1 where the child or one of the processes
    given to `watch` ended unexpectedly.

    Args:
        work: The command; ends by ``SystemExit`` and prints its own message.
        report: Prints the message of a command that could not: status (``"interrupted"`` or ``"error"``) and text.
    """
    if _supervisor is not None:
        work()
    sys.stdout.flush()
    sys.stderr.flush()
    supervisor = _Supervisor(report)
    if supervisor.fork():
        _run(work)
    code = supervisor.wait()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the handlers of `atexit` are the command's


def command_started() -> float | None:
    """When the running command was started, seconds since the epoch; None where nothing supervises this process."""
    return None if _supervisor is None else _STARTED


def watch(processes: Sequence[psutil.Process]) -> None:
    """Have the command ended with a message once one of these processes has; nothing watches them unsupervised."""
    global _watched
    _watched = tuple(process.pid for process in processes)
    _tell(watch={process.pid: process.name() for process in processes})


def allow_grace(seconds: float) -> None:
    """From here on the command may take so long to end by itself after a signal, in place of `GRACE_S`."""
    _tell(grace=seconds)


def end_if_lost() -> None:
    """Before an error is passed on: if a watched process has ended, wait for the supervisor, which explains that."""
    if _supervisor is not None and any(not _alive(pid) for pid in _watched):
        time.sleep(60)


# ---- the command's process -------------------------------------------------------------------------------------------


def _tell(**message: Any) -> None:
    if _supervisor is not None:
        os.write(_supervisor, json.dumps(message).encode() + b"\n")


def _run(work: Callable[[], Any]) -> NoReturn:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # one may be waiting since the fork
        _run_once(work)
    except KeyboardInterrupt:  # another signal, while the first one ends the command
        os._exit(130)


def _run_once(work: Callable[[], Any]) -> NoReturn:
    code: Any = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:
        os._exit(130)  # nobody has said so: the supervisor does
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code == signal.SIGTERM:  # what Ray's own handler, in place while Ray starts, exits with
            _tell(signal=code)
        _tell(code=code)
        if code in (130, signal.SIGTERM):
            os._exit(code)  # Ray may be half started or half stopped, and its `atexit` handler would wait for it
    sys.exit(code)


# ---- the supervisor's process ----------------------------------------------------------------------------------------


class _Supervisor:
    """State of the parent process."""

    def __init__(self, report: Callable[[str, str], None]) -> None:
        self._report = report
        self._child = 0
        self._status: int | None = None  # of `waitpid`
        self._code: int | None = None
        self._code_at = self._signalled_at = float("inf")
        self._grace = GRACE_S
        self._watched: dict[int, str] = {}
        self._ends: list[int] = []  # descriptors, readable once the watched processes have ended
        self._unread = b""
        self._reader, self._writer = os.pipe()

    def fork(self) -> bool:
        """Whether this is the child, in which signals are blocked until `_run`."""
        global _supervisor
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup, or a background job
                signal.signal(number, self._on_signal)
        _prctl(_SUBREAPER, 1)
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until both processes have their own handlers
        early = self._signalled_at < float("inf")
        child = os.fork()
        if child == 0:
            os.close(self._reader)
            _supervisor = self._writer
            os.setsid()
            _prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP):
                if before[number] is not signal.SIG_IGN:
                    signal.signal(number, _pass_on)
        else:
            os.close(self._writer)
            os.set_blocking(self._reader, False)
            self._child = child
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        if child and early:
            os.kill(child, signal.SIGINT)
        return child == 0

    def _on_signal(self, number: int, _: FrameType | None = None) -> None:
        now = time.monotonic()
        if self._signalled_at == float("inf"):
            self._signalled_at = now
            if self._child and self._status is None:
                os.kill(self._child, signal.SIGINT)
        elif number == signal.SIGINT and now - self._signalled_at > 1:
            self._signalled_at = now - self._grace  # a second Ctrl-C, and no copy of the first

    def wait(self) -> int:
        """Until the command has ended in one way or another; returns the exit code."""
        while True:
            self._read()
            lost = [name for pid, name in self._watched.items() if not _alive(pid)]
            self._reap()
            self._read()
            now = time.monotonic()
            signalled = self._signalled_at < float("inf")
            if self._status is not None or now > self._code_at + (GRACE_S if signalled else _EXIT_S):
                return self._ended(signalled)
            if lost and self._watched and self._code is None:
                # Without Ray nothing ends in good order, neither after an accident nor after a signal to all processes.
                if signalled:
                    return self._kill_and_report("interrupted", INTERRUPTED, 130)
                return self._kill_and_report("error", _lost(lost), 1)
            if now > self._signalled_at + self._grace and self._code is None:
                return self._kill_and_report("interrupted", INTERRUPTED, 130)
            ends = self._ends if self._code is None else ()
            select.select([self._reader, *ends], [], [], 0.25)

    def _ended(self, signalled: bool) -> int:
        if self._code is not None and not (signalled and self._code not in (0, 2, 130)):
            _end_descendants(_LEFTOVERS_S if self._status is not None else 0)
            return self._code
        if signalled:
            return self._kill_and_report("interrupted", INTERRUPTED, 130)
        return self._kill_and_report("error", _died(self._status or 0), 1)

    def _kill_and_report(self, status: str, message: str, code: int) -> int:
        if self._status is None:
            os.kill(self._child, signal.SIGKILL)  # first of all, before it prints what Ray thinks of the end of others
        _end_descendants(0)
        self._report(status, message)
        return code

    def _read(self) -> None:
        try:
            while data := os.read(self._reader, 65536):
                self._unread += data
        except BlockingIOError:
            pass
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "watch" in message:
                self._watched = {int(pid): name for pid, name in message["watch"].items()}
                for descriptor in self._ends:
                    os.close(descriptor)
                self._ends = _end_descriptors(self._watched)
            self._grace = message.get("grace", self._grace)
            if "signal" in message:
                self._on_signal(message["signal"])
            if "code" in message:
                self._code, self._code_at = message["code"], time.monotonic()

    def _reap(self) -> None:
        """Take the status of the command and of orphans that came back to this process."""
        while self._status is None:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == self._child:
                self._status = status
            if pid == 0:
                return


def _pass_on(number: int, _: FrameType | None = None) -> None:
    """In the command's process: have the supervisor decide what a signal to this process alone means."""
    if os.getsid(0) == os.getpid():
        _tell(signal=int(number))
    else:  # a fork of the command, which somebody ends
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _lost(names: Sequence[str]) -> str:
    return (
        f"Ray's process {' and '.join(names)} ended while the command was running: on a full machine the system kills "
        "such processes first\nFree memory (fewer or smaller engines and workers), then run the same command again: "
        "what was committed stays."
    )


def _died(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return (
        f"the command's process {how} without a message of its own\n"
        "If memory ran out, use fewer or smaller engines and workers; then run the same command again: what was "
        "committed stays."
    )


def running(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that nobody has waited for has."""
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _alive(pid: int) -> bool:
    try:
        return running(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def _end_descriptors(pids: Iterable[int]) -> list[int]:
    """For `select`; where the system has none, the processes are looked at four times a second."""
    descriptors = []
    for pid in pids:
        try:
            descriptors.append(os.pidfd_open(pid))
        except (AttributeError, OSError):
            continue
    return descriptors


def _end_descendants(patience: float) -> None:
    """Every process below this one is gone afterwards; they have ``patience`` seconds to end by themselves."""
    own = psutil.Process()
    kill_at = time.monotonic() + patience
    give_up_at = kill_at + 5  # a process in an uninterruptible wait cannot be killed
    while (descendants := own.children(recursive=True)) and time.monotonic() < give_up_at:
        if time.monotonic() >= kill_at:
            for process in descendants:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        time.sleep(0.1)


_PARENT_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of Linux's <sys/prctl.h>


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)

"""Ray Train for every room that trains: which failures of a worker are worth another attempt, and how a run ends."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlrank.errors import user_error_in
from vlrank.runtime import STARTED_HERE, Preload
from vlrank.storage import BucketPath, Location

if TYPE_CHECKING:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_ALWAYS_MET = (
    *(TypeError, AttributeError, NameError, ImportError, LookupError, ValueError, AssertionError),
    *(NotImplementedError, RecursionError),
)
_ALWAYS_MET_ERRNO = {
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR),
}


def always_met(error: BaseException) -> bool:
    """Whether every attempt would meet this error: faults in code, files and rights, not in machines and networks."""
    if isinstance(error, OSError):
        return error.errno in _ALWAYS_MET_ERRNO
    return isinstance(error, _ALWAYS_MET) or type(error).__name__ == "SafetensorError" or bool(user_error_in(error))


def with_failure_policy(kind: type[DataParallelTrainer], evaluations: Callable[[], int]) -> type[DataParallelTrainer]:
    """A trainer class that does not repeat what `always_met`, nor what was met twice without an evaluation between.

    Args:
        kind: Ray Train's class.
        evaluations: How many the run has by now.
    """
    from ray.exceptions import RayError
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import RayTrainError
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

    class Policy(DefaultFailurePolicy):
        """Runs in the controller."""

        def __init__(self, failure_config: Any) -> None:
            super().__init__(failure_config)
            self._last: tuple[Any, ...] | None = None

        def make_decision(self, training_failed_error: Any) -> Any:
            decision = super().make_decision(training_failed_error)
            if not isinstance(training_failed_error, WorkerGroupError):
                return decision
            failures = training_failed_error.worker_failures
            if any(isinstance(failure, RayError | RayTrainError) for failure in failures.values()):
                return decision  # a process was lost, and the errors of the others may come from that
            last, self._last = self._last, (evaluations(), *sorted(map(_line, failures.values())))
            hopeless = any(map(always_met, failures.values())) or last == self._last
            return FailureDecision.RAISE if hopeless else decision

    class Trainer(kind):
        def _initialize_and_run_controller(self, **controller: Any) -> Any:
            controller["failure_policy"] = Policy(self.run_config.failure_config)
            if STARTED_HERE not in os.environ:
                return super()._initialize_and_run_controller(**controller)
            from vlrank.ray_processes import run_on_one_node

            return run_on_one_node(self, controller)

    return Trainer


def preload_for(workers: int) -> Preload:
    """The first processes of a run: its controller, the barrier of its workers, and these."""
    return Preload(("vlrank.ray_processes",), processes=2 + workers)


def _line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {failure}"


def worker_error(failures: Mapping[int, BaseException]) -> Exception:
    """What to raise for the failures of workers (rank -> failure): a `UserError`, or an error that shows one traceback.

    Ray Train's own message joins the tracebacks of all ranks and cuts each in its middle; `worker.train_loop` adds the
    whole one to the exception, as a note.
    """
    for failure in failures.values():
        if found := user_error_in(failure):
            return found
    # Of several, the others often only lost their connection to the one that failed first.
    rank, failure = min(failures.items(), key=lambda item: (not always_met(item[1]), item[0]))
    error = RuntimeError(f"training worker {rank} failed: {_line(failure)}")
    for note in getattr(failure, "__notes__", ()):
        error.add_note(note)
    return error


def fit_trainer(trainer: DataParallelTrainer) -> Any:
    """Run a trainer to its end; returns Ray Train's ``Result``.

    Raises:
        UserError: what a worker found that the user has to mend.
        RuntimeError: any other failure of a worker, with its traceback as a note.
    """
    from ray.train import TrainingFailedError

    in_main_thread = threading.current_thread() is threading.main_thread()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None)
        if not failures:
            raise
        raise worker_error(failures) from None
    except SystemExit:  # Ray Train's answer to Ctrl-C, once it has ended its workers
        raise KeyboardInterrupt from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, on_interrupt)  # Ray Train leaves its own behind


def ray_storage(folder: Location) -> dict[str, Any]:
    """Where Ray Train keeps a run's state, as arguments of its ``RunConfig``."""
    if isinstance(folder, BucketPath):
        return {"storage_path": folder.in_file_system, "storage_filesystem": folder.file_system}
    return {"storage_path": str(folder)}


@contextmanager
def followed(look: Callable[[bool], None], seconds: float) -> Iterator[None]:
    """Call ``look`` every so many seconds while the block runs, and once after it, with True; from one thread."""
    done = threading.Event()

    def follow() -> None:
        finished = False
        while not finished:
            finished = done.wait(seconds)
            look(finished)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)  # a bucket may not answer

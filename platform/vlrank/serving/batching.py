"""Users of several requests, ranked together: a bounded queue in front of an engine that blocks.

The engine works in threads, so the event loop stays free. What a client no longer waits for is not ranked, unless the
engine has it already.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from vlrank.serving.messages import Refused

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Batching:
    """How jobs are handed over.

    Attributes:
        calls: Calls of the engine at the same time.
        size: Jobs per call.
        wait_s: How long the first job of a call waits for others.
    """

    calls: int
    size: int
    wait_s: float

    @classmethod
    def of(cls, callers: int, users_at_once: int, wait_s: float) -> Batching:
        """For an engine.

        One that several threads may call fills its passes from a queue of its own: each user is a call, so none waits
        for a neighbour's answer. One that takes a call at a time gets users together.
        """
        return cls(users_at_once, 1, 0.0) if callers > 1 else cls(1, users_at_once, wait_s)


class Batcher(Generic[Job, Result]):
    """Belongs to one event loop.

    Args:
        work: Answers jobs, each with a result or an exception in its place; called in threads.
        batching: How jobs are handed over.
        max_queue: Requests that may wait, beside those in work.
        started: Told the number of jobs in work whenever a call starts.
    """

    def __init__(
        self,
        work: Callable[[list[Job]], Sequence[Result | Exception]],
        batching: Batching,
        max_queue: int,
        started: Callable[[int], None] = lambda jobs: None,
    ) -> None:
        self._work, self._batching, self._started = work, batching, started
        self._places = max_queue + batching.calls * batching.size
        self._waiting: deque[tuple[Job, asyncio.Future[Result], float]] = deque()
        self._threads = ThreadPoolExecutor(batching.calls, "rank")
        self._calls = self._in_work = self._taken = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def admitted(self) -> int:
        """Requests that hold a place."""
        return self._taken

    @property
    def waiting(self) -> int:
        """Jobs that are not in work yet."""
        return sum(not future.done() for _, future, _ in self._waiting)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for a request, from before its pictures are fetched until its answer is made.

        Raises:
            Refused: all places are taken.
        """
        if self._taken >= self._places:
            raise Refused(429, f"{self._taken} requests are waiting or in work; try again", {"Retry-After": "1"})
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    async def __call__(self, job: Job) -> Result:
        """The job's result; a cancelled call gives its place in the queue up."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((job, future, loop.time()))
        self._start(loop)
        return await future

    def close(self) -> None:
        """Wait for the calls in work."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._calls < self._batching.calls:
            while self._waiting and self._waiting[0][1].done():
                self._waiting.popleft()  # cancelled
            if not self._waiting:
                return
            left = self._waiting[0][2] + self._batching.wait_s - loop.time()
            if left > 0 and self.waiting < self._batching.size:
                self._wake_in(left, loop)
                return
            batch: list[tuple[Job, asyncio.Future[Result]]] = []
            while self._waiting and len(batch) < self._batching.size:
                job, future, _ = self._waiting.popleft()
                if not future.done():
                    batch.append((job, future))
            self._calls += 1
            self._in_work += len(batch)
            self._started(self._in_work)
            call = loop.run_in_executor(self._threads, self._work, [job for job, _ in batch])
            call.add_done_callback(lambda done, batch=batch: self._finish(done, batch, loop))  # type: ignore[misc]

    def _wake_in(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self._start, loop)

    def _finish(
        self,
        call: asyncio.Future[Sequence[Result | Exception]],
        batch: list[tuple[Job, asyncio.Future[Result]]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._calls -= 1
        self._in_work -= len(batch)
        error = call.exception()
        results: Sequence[Result | BaseException] = [error] * len(batch) if error else call.result()
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue  # the client has left meanwhile
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
        self._start(loop)

"""The queue in front of the engine: who waits, who is refused, and what nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from vlrank.serving.batching import Batcher, Batching
from vlrank.serving.messages import Refused


class Engine:
    """Answers with the square, as soon as it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.calls: list[list[int]] = []

    def __call__(self, jobs: list[int]) -> list[int | Exception]:
        self.calls.append(jobs)
        assert self.may.wait(60)
        return [job * job if job >= 0 else ValueError(str(job)) for job in jobs]


def run(
    batching: Batching, story: Callable[[Engine, Batcher[int, int]], Awaitable[None]], max_queue: int = 100
) -> None:
    async def told() -> None:
        engine = Engine()
        batcher: Batcher[int, int] = Batcher(engine, batching, max_queue)
        try:
            await story(engine, batcher)
        finally:
            engine.may.set()
            batcher.close()

    asyncio.run(told())


ONE_BY_ONE = Batching(calls=1, size=1, wait_s=0)


def test_the_event_loop_is_free_while_the_engine_works() -> None:
    async def story(engine: Engine, batcher: Batcher[int, int]) -> None:
        asked = asyncio.create_task(batcher(3))
        while not engine.calls:
            await asyncio.sleep(0)
        engine.may.set()  # from the loop: it would never come to this if the engine held it
        assert await asked == 9

    run(ONE_BY_ONE, story)


def test_what_nobody_waits_for_never_reaches_the_engine() -> None:
    async def story(engine: Engine, batcher: Batcher[int, int]) -> None:
        first, left, last = (asyncio.create_task(batcher(job)) for job in (1, 2, 3))
        while not engine.calls:
            await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        assert batcher.waiting == 1
        engine.may.set()
        assert [await first, await last] == [1, 9]
        assert engine.calls == [[1], [3]]

    run(ONE_BY_ONE, story)


def test_a_client_that_leaves_in_the_middle_of_a_call_disturbs_no_other() -> None:
    async def story(engine: Engine, batcher: Batcher[int, int]) -> None:
        left, stays = (asyncio.create_task(batcher(job)) for job in (1, 2))
        while not engine.calls:
            await asyncio.sleep(0)
        left.cancel()
        engine.may.set()
        assert await stays == 4
        assert await batcher(5) == 25

    run(Batching(calls=1, size=2, wait_s=0.2), story)


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    async def story(engine: Engine, batcher: Batcher[int, int]) -> None:
        with batcher.place(), batcher.place(), batcher.place():  # one in work, two waiting
            with pytest.raises(Refused) as refused, batcher.place():
                pass
            assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
        with batcher.place():
            assert batcher.admitted == 1

    run(ONE_BY_ONE, story, max_queue=2)


def test_users_of_several_requests_share_a_call_of_an_engine_that_takes_one_at_a_time() -> None:
    async def story(engine: Engine, batcher: Batcher[int, int]) -> None:
        engine.may.set()
        assert await asyncio.gather(*(batcher(job) for job in range(5))) == [0, 1, 4, 9, 16]
        assert sorted(len(call) for call in engine.calls) == [1, 4]

    run(Batching.of(callers=1, users_at_once=4, wait_s=0.05), story)


def test_an_engine_with_a_queue_of_its_own_gets_every_user_at_once() -> None:
    async def story(engine: Engine, batcher: Batcher[int, int]) -> None:
        asked = [asyncio.create_task(batcher(job)) for job in range(6)]
        while len(engine.calls) < 4:
            await asyncio.sleep(0)
        assert engine.calls == [[0], [1], [2], [3]]
        engine.may.set()
        assert await asyncio.gather(*asked) == [0, 1, 4, 9, 16, 25]

    run(Batching.of(callers=4, users_at_once=4, wait_s=60), story)


def test_an_error_is_its_own_jobs_alone() -> None:
    async def story(engine: Engine, batcher: Batcher[int, int]) -> None:
        engine.may.set()
        good, bad = await asyncio.gather(batcher(2), batcher(-2), return_exceptions=True)
        assert good == 4
        assert isinstance(bad, ValueError)

    run(Batching(calls=1, size=2, wait_s=60), story)


def test_a_call_that_fails_answers_all_its_jobs() -> None:
    def broken(jobs: list[int]) -> list[int | Exception]:
        raise MemoryError("full")

    async def told() -> None:
        batcher: Batcher[int, int] = Batcher(broken, Batching(1, 2, 60), 10)
        answers = await asyncio.gather(batcher(1), batcher(2), return_exceptions=True)
        assert [type(answer) for answer in answers] == [MemoryError, MemoryError]
        batcher.close()

    asyncio.run(told())

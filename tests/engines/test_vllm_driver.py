"""Whatever becomes of a prompt, somebody waits for its answer: one that never comes hangs the whole job, silently."""

import queue
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vlrank.engines import vllm_scorer
from vlrank.engines.resources import EngineDied
from vlrank.engines.vllm_scorer import VllmScorer
from vlrank.prompting.encoding import Encoded
from vlrank.prompting.labels import LabelTrie

LONGEST = 256
TRIE = LabelTrie(tuple((*(10 + int(d) for d in str(i)), 2) for i in range(1, 21)))  # two reads, the first of two nodes
NO_ENCODER: Any = None


class EngineDeadError(Exception):
    """vLLM's."""


class Core:
    """Answers as vLLM's ``LLMEngine`` does, with its rules for lengths."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, Any]] = []
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST))

    def add_request(self, name: str, prompt: dict[str, Any], params: Any, **_: object) -> None:
        self.asked.append((name, len(prompt["prompt_token_ids"]), params))

    def step(self) -> list[Any]:
        asked, self.asked = self.asked, []
        return [self.output(name, length, self.steps(length, params)) for name, length, params in asked]

    def steps(self, length: int, params: Any) -> Any:
        room = max(1, LONGEST - length)
        chances = {token: SimpleNamespace(logprob=-float(token)) for token in params.logprob_token_ids}
        return [chances] * min(params.max_tokens, room)

    @staticmethod
    def output(name: str, length: int, steps: Any) -> Any:
        answer = SimpleNamespace(logprobs=steps, finish_reason="stop")
        return SimpleNamespace(
            finished=True, request_id=name, prompt_token_ids=[0] * length, num_cached_tokens=0, outputs=[answer]
        )


Start = Callable[[Core], VllmScorer]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver of an engine whose core is a stub; no vLLM is needed."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.exceptions")}
    modules["vllm"].SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    modules["vllm.v1.engine.exceptions"].EngineDeadError = EngineDeadError  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm_scorer._label_params.cache_clear()
    started = []

    def engine(core: Core) -> VllmScorer:
        made = VllmScorer.__new__(VllmScorer)
        made.vllm, made.in_flight, made.lora = core, 2, None  # type: ignore[assignment]
        made.requests = made.prompt_tokens = made.cached_tokens = 0
        made._inbox = queue.SimpleQueue()
        made._thread = threading.Thread(target=made._drive, daemon=True)
        made._thread.start()
        started.append(made)
        return made

    yield engine
    for made in started:
        made._inbox.put(None)
        made._thread.join(5)
        assert not made._thread.is_alive()
    vllm_scorer._label_params.cache_clear()


def prompt(length: int) -> Encoded:
    return Encoded([5] * length, (), (), TRIE)


def outcome(engine: VllmScorer, encoded: Encoded) -> Any:
    """What the caller gets; a timeout where nothing comes."""
    future = engine.submit(NO_ENCODER, encoded)
    return future.exception(timeout=5) or future.result()


def test_every_length_up_to_the_engines_is_answered(start: Start) -> None:
    """One without room for both nodes of its first read would hang."""
    engine = start(Core())
    fits = LONGEST - 2
    for length in (1, fits):
        assert np.exp(outcome(engine, prompt(length))).sum() == pytest.approx(1, abs=1e-5)
    for length in (fits + 1, LONGEST, LONGEST + 1):
        error = outcome(engine, prompt(length))
        assert isinstance(error, ValueError)
        assert f"{length} tokens, the engine takes at most {fits}" in str(error)
    assert isinstance(outcome(engine, prompt(9)), np.ndarray), "the others are not disturbed"


@pytest.mark.parametrize("steps", [None, [], [{}]])
@pytest.mark.parametrize("read", [1, 2])
def test_a_short_answer_is_its_prompts_own_error(start: Start, steps: Any, read: int) -> None:
    class Short(Core):
        count = 0

        def steps(self, length: int, params: Any) -> Any:
            self.count += 1
            return (
                (steps if read == 1 or steps is None else []) if self.count == read else super().steps(length, params)
            )

    engine = start(Short())
    error = outcome(engine, prompt(9))
    assert isinstance(error, ValueError)
    assert "vLLM answered" in str(error)
    answers = engine.score_labels(NO_ENCODER, [prompt(n) for n in range(1, 8)])  # more than are in flight
    assert all(isinstance(answer, np.ndarray) for answer in answers)


@pytest.mark.parametrize("method", ["add_request", "step", "output"])
def test_a_dead_core_leaves_nobody_waiting(start: Start, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def dead(*_: object, **__: object) -> Any:
        raise EngineDeadError("the core is gone")

    core = Core()
    monkeypatch.setattr(core, method, dead)
    engine = start(core)
    futures = [engine.submit(NO_ENCODER, prompt(9)) for _ in range(5)]
    assert {type(future.exception(timeout=5)) for future in futures} == {EngineDied}
    with pytest.raises(EngineDied):
        engine.score_labels(NO_ENCODER, [prompt(9), prompt(9)])  # nor anybody who comes later


def test_an_answer_that_cannot_be_read_leaves_nobody_waiting(start: Start) -> None:
    """E.g. after an update of vLLM; its job is in no queue any more when this shows."""

    class Changed(Core):
        def steps(self, length: int, params: Any) -> Any:
            return [{}] * params.max_tokens

    assert isinstance(outcome(start(Changed()), prompt(9)), EngineDied)

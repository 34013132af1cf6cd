"""Where the wall-clock time of a training command goes: one phase after the other, from Enter to the summary."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

PHASES = (
    *("start", "Ray", "imports", "model", "vision features", "compilation", "learning", "waiting for data"),
    *("validation", "checkpoints", "restart", "end", "other"),
)
"""In the order of the summary.

- start: the command's imports, reading the dataset, checks;
- Ray: its start, and that of the workers with their process group;
- imports: libraries of the worker;
- model: loading, adapting, optimizer;
- vision features: pictures fetched and read once by a frozen tower;
- compilation: the first step as a whole, and whatever torch compiles in later ones;
- learning: steps after the first one; waiting for data: on the loader, between these steps;
- validation;
- checkpoints: training stands still for a copy, for the last write to end, or for the state of a resumed run;
- restart: from the last sign of life of a worker that failed to the start of the next one;
- end: the last write, workers and Ray stopped, the result;
- other: none of these.
"""


class Timeline:
    """Seconds by phase. Exactly one phase runs at a time, so that the phases add up to the wall clock.

    The driver's timeline travels to the worker of rank 0 with the run's settings, and back with its outcome: phases
    that begin in one process and end in another are joined by `time.time`. On other ranks it measures for the worker
    alone.

    Args:
        began: When the command was started, seconds since the epoch; default now.
        phase: The phase that runs since then.
        earlier: Attempts of the same run before this one, see `attempts`.
    """

    def __init__(
        self, began: float | None = None, phase: str = "start", earlier: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.began = time.time() if began is None else began
        self.seconds: dict[str, float] = {}
        self.samples = self.tokens = 0
        self.earlier = [dict(attempt) for attempt in earlier]
        self._phase, self._since = phase, self.began

    def enter(self, phase: str) -> str:
        """End the running phase and begin another one; returns the one that ended."""
        ended, now = self._phase, time.time()
        self.seconds[ended] = self.seconds.get(ended, 0.0) + max(0.0, now - self._since)  # clocks of nodes differ
        self._phase, self._since = phase, now
        return ended

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase inside of the running one, which goes on afterwards."""
        outer = self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def move(self, seconds: float, phase: str) -> None:
        """Count seconds of the running phase for another one."""
        self.enter(self._phase)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) - seconds

    def count(self, samples: int, tokens: int) -> None:
        """Count work of the phase "learning", over all ranks."""
        self.samples += samples
        self.tokens += tokens

    @property
    def steady(self) -> float:
        """Seconds of learning and of waiting for data, without the first step and whatever is compiled."""
        self.enter(self._phase)
        return self.seconds.get("learning", 0.0) + self.seconds.get("waiting for data", 0.0)

    # ---- between processes ------------------------------------------------------------------------------------------

    def handed_on(self) -> dict[str, Any]:
        """The timeline as plain values, up to now."""
        self.enter(self._phase)
        return {"attempt": self._attempt(), "at": self._since, "phase": self._phase, "earlier": self.earlier}

    @classmethod
    def taken_over(cls, given: Mapping[str, Any], phase: str | None = None) -> Timeline:
        """Go on with the timeline of another process.

        Args:
            given: From `handed_on`.
            phase: What has been running since then; default the same phase as there.
        """
        attempt = given["attempt"]
        timeline = cls(attempt["began"], phase or given["phase"], given["earlier"])
        timeline.seconds = dict(attempt["seconds"])
        timeline.samples, timeline.tokens = attempt["samples"], attempt["tokens"]
        timeline._since = given["at"]
        return timeline

    def _attempt(self) -> dict[str, Any]:
        return {"began": self.began, "seconds": dict(self.seconds), "samples": self.samples, "tokens": self.tokens}

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """All attempts of the run, oldest first: ``began``, ``seconds`` by phase, ``samples`` and ``tokens``.

        An attempt that was killed counts up to its last sign of life. Steps that had to be repeated count in both.
        """
        self.enter(self._phase)
        return [*self.earlier, self._attempt()]


def as_result(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What result.json says of the time of a run.

    Args:
        attempts: From `Timeline.attempts`.

    Returns:
        ``seconds`` of all attempts together, ``phases`` that add up to them, steady ``samples_per_s`` and
        ``tokens_per_s`` (learning and waiting for data alone), ``loader_wait``, the share of waiting in these, and
        ``attempts``: when each began and how many seconds it took.

    >>> seconds = {"Ray": 6.0, "learning": 3.0, "waiting for data": 1.0}
    >>> attempt = {"began": 0.0, "seconds": seconds, "samples": 40, "tokens": 80}
    >>> result = as_result([attempt, attempt])
    >>> result["seconds"], result["phases"]["Ray"], result["samples_per_s"], result["loader_wait"]
    (20.0, 12.0, 10.0, 0.25)
    """
    known = dict.fromkeys([*PHASES, *(phase for attempt in attempts for phase in attempt["seconds"])])
    sums = {phase: sum(attempt["seconds"].get(phase, 0.0) for attempt in attempts) for phase in known}
    waited = sums["waiting for data"]
    steady = max(1e-9, sums["learning"] + waited)
    phases = {phase: round(seconds, 3) for phase, seconds in sums.items() if seconds}
    return {
        "seconds": round(sum(phases.values()), 3),
        "phases": phases,
        "samples_per_s": sum(attempt["samples"] for attempt in attempts) / steady,
        "tokens_per_s": sum(attempt["tokens"] for attempt in attempts) / steady,
        "loader_wait": waited / steady,
        "attempts": [
            {"began": attempt["began"], "seconds": round(sum(attempt["seconds"].values()), 3)} for attempt in attempts
        ],
    }


def in_words(phases: Mapping[str, float]) -> str:
    """The phases in one line: those of at least half a second and a hundredth of the time, then all others together.

    >>> in_words({"Ray": 6.04, "learning": 93.0, "end": 0.4, "other": 0.1})
    'Ray 6.0 s, learning 93.0 s, other 0.5 s'
    """
    least = max(0.5, 0.01 * sum(phases.values()))
    shown = {phase: seconds for phase, seconds in phases.items() if seconds >= least and phase != "other"}
    shown["other"] = sum(phases.values()) - sum(shown.values())
    return ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in shown.items() if seconds >= 0.05)

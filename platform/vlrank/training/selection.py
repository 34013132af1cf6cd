"""Which checkpoint is best, and when to stop: one rule for the run folder, the console, resuming and Ray Train.

The best evaluation has the highest metric, and of equals the earlier one. A run stops when its last ``patience``
evaluations were no improvement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def selection_value(value: float, step: int) -> float:
    """What evaluations are compared by: the metric, with a tie in favour of the earlier step.

    >>> selection_value(0.4, 20) > selection_value(0.4, 30) > selection_value(0.3999, 10)
    True
    """
    return value - 1e-9 * step


def best_evaluation(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The best of a run's evaluations."""
    return max(history, key=lambda line: line["selection"])


def improves(selections: Sequence[float]) -> bool:
    """Whether the last evaluation is the best.

    >>> improves([0.1, 0.3]), improves([0.3, 0.1]), improves([0.1])
    (True, False, True)
    """
    return selections[-1] > max(selections[:-1], default=float("-inf"))


def patience_spent(selections: Sequence[float], patience: int) -> bool:
    """Whether the last ``patience`` evaluations were no improvement.

    >>> patience_spent([0.1, 0.3, 0.2], 2), patience_spent([0.1, 0.3, 0.2, 0.3], 2), patience_spent([], 1)
    (False, True, False)
    """
    return bool(selections) and len(selections) - 1 - selections.index(max(selections)) >= patience


def logged_selections(log: Sequence[Mapping[str, Any]]) -> list[float]:
    """The evaluations in the log of a `transformers.TrainerState`."""
    return [line["eval_selection"] for line in log if "eval_selection" in line]

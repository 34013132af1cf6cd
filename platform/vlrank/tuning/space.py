"""The search space of a sweep: YAML in, concrete training keys per trial out. No Ray and no torch in here.

A dimension is written as ``{loguniform: [low, high]}``, ``{uniform: [low, high]}``, ``{randint: [low, high]}`` (both
ends included), ``{choice: [...]}``, or a plain value that every trial shares. Continuous dimensions take ``steps: N``
for grid search (3 by default).
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from vlrank.config import Config, TrainConfig, merge, validate
from vlrank.errors import UserError

Point = dict[str, Any]
"""Training keys of one trial, dots for nested ones: ``{"lr": 1e-4, "lora.r": 8}``."""


class Dimension(Protocol):
    """One key's values."""

    def sample(self, rng: random.Random) -> Any:
        """A random value."""

    def grid(self) -> list[Any]:
        """The values of a grid search."""

    def bounds(self) -> list[Any]:
        """Values that must all be valid for every sample to be valid."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """Real numbers in [low, high], uniform, or uniform in their logarithm."""

    low: float
    high: float
    log: bool = False
    steps: int = 3

    def sample(self, rng: random.Random) -> float:
        """See `Dimension`."""
        return self._at(rng.random())

    def grid(self) -> list[float]:
        """``steps`` values from low to high, evenly spaced (in the logarithm for a log dimension)."""
        return [self._at(step / (self.steps - 1)) for step in range(self.steps)] if self.steps > 1 else [self._at(0.5)]

    def bounds(self) -> list[float]:
        """See `Dimension`."""
        return [self.low, self.high]

    def _at(self, share: float) -> float:
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        # Four digits: the same number in YAML, in the table and in the trial. Clipped, as rounding may leave the range.
        return min(max(float(f"{value:.4g}"), self.low), self.high)


@dataclass(frozen=True, slots=True)
class RandInt:
    """Whole numbers from low to high, both included."""

    low: int
    high: int

    def sample(self, rng: random.Random) -> int:
        """See `Dimension`."""
        return rng.randint(self.low, self.high)

    def grid(self) -> list[int]:
        """Every number."""
        return list(range(self.low, self.high + 1))

    def bounds(self) -> list[int]:
        """See `Dimension`."""
        return [self.low, self.high]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the given values; one value alone is a constant."""

    values: tuple[Any, ...]

    def sample(self, rng: random.Random) -> Any:
        """See `Dimension`."""
        return rng.choice(self.values)

    def grid(self) -> list[Any]:
        """Every value."""
        return list(self.values)

    def bounds(self) -> list[Any]:
        """See `Dimension`."""
        return list(self.values)


_KINDS = ("loguniform", "uniform", "randint", "choice")
_SET_BY_THE_SWEEP = ("dataset", "out", "mode", "ray")
_MEASURE = ("negatives", "candidates", "val_users", "metric", "max_missing", "ranking.missing")
"""Keys that change which users validation ranks, or which candidates."""


def parse_space(space: Mapping[str, Any]) -> dict[str, Dimension]:
    """The dimensions, by training key.

    Raises:
        UserError: a key that training does not know, an unknown kind, or bounds that make no sense.
    """
    known = training_keys()
    dimensions: dict[str, Dimension] = {}
    for key, spec in space.items():
        if key.split(".")[0] in _SET_BY_THE_SWEEP:
            raise UserError(f"search space: `{key}` is set by the sweep itself", "Remove it from `space`.")
        if key in _MEASURE:
            raise UserError(
                f"search space: `{key}` changes what validation measures, so trials could not be compared",
                "Set it under `train`, the same for all trials.",
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else "`vlrank train --help` lists the keys."
            raise UserError(f"search space: `{key}` is not a key of training", hint)
        dimensions[key] = _dimension(key, spec)
    return dimensions


def _dimension(key: str, spec: Any) -> Dimension:
    if not isinstance(spec, Mapping):
        return Choice((spec,))
    kinds = [name for name in spec if name in _KINDS]
    strange = [name for name in spec if name not in (*_KINDS, "steps")]
    if len(kinds) != 1 or strange:
        found = ", ".join(map(str, spec)) or "nothing"
        raise UserError(
            f"search space: `{key}` has {found}, expected exactly one of {', '.join(_KINDS)}",
            f"Example: {key}: {{choice: [1, 2]}} or lr: {{loguniform: [5e-5, 2e-4]}}",
        )
    kind, value = kinds[0], spec[kinds[0]]
    if kind == "choice":
        if not isinstance(value, list | tuple) or not value:
            raise UserError(f"search space: `{key}.choice` must be a list of at least one value, got {value!r}")
        return Choice(tuple(value))
    low, high = _bounds(f"{key}.{kind}", value)
    if kind == "randint":
        if low != int(low) or high != int(high):
            raise UserError(f"search space: `{key}.randint` needs whole numbers, got {value!r}")
        return RandInt(int(low), int(high))
    if kind == "loguniform" and low <= 0:
        raise UserError(f"search space: `{key}.loguniform` needs bounds above 0, got {value!r}")
    steps = spec.get("steps", 3)
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"search space: `{key}.steps` must be a whole number of at least 1, got {steps!r}")
    return Uniform(low, high, log=kind == "loguniform", steps=steps)


def _bounds(key: str, value: Any) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in value)  # YAML reads 5e-5 as a string
    except (TypeError, ValueError):
        raise UserError(f"search space: `{key}` must be [low, high], two numbers, got {value!r}") from None
    if not low <= high:
        raise UserError(f"search space: `{key}` has low {low:g} above high {high:g}")
    return low, high


def training_keys(kind: type[Config] = TrainConfig, prefix: str = "") -> list[str]:
    """Every key of training, nested ones with dots."""
    keys = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            keys += training_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def nested(point: Mapping[str, Any]) -> dict[str, Any]:
    """``{"lora.r": 8}`` -> ``{"lora": {"r": 8}}``."""
    tree: dict[str, Any] = {}
    for key, value in point.items():
        *parents, leaf = key.split(".")
        branch: dict[str, Any] = {leaf: value}
        for parent in reversed(parents):
            branch = {parent: branch}
        tree = merge(tree, branch)
    return tree


def default_point(dimensions: Mapping[str, Dimension], defaults: Mapping[str, Any]) -> Point:
    """The point of the trial without any search: the documented defaults.

    Args:
        dimensions: The space.
        defaults: A whole resolved training config, nested (``TrainConfig.model_dump()``).
    """
    point: Point = {}
    for key, dimension in dimensions.items():
        value: Any = defaults
        for part in key.split("."):
            value = value[part]
        constant = isinstance(dimension, Choice) and len(dimension.values) == 1
        point[key] = dimension.grid()[0] if constant else value
    return point


def sampled_points(dimensions: Mapping[str, Dimension], search: str, seed: int | str) -> Iterator[Point]:
    """Points of a random (endless) or grid (every combination once) search; the same for the same seed."""
    keys = list(dimensions)
    if search == "grid":
        for values in itertools.product(*(dimensions[key].grid() for key in keys)):
            yield dict(zip(keys, values, strict=True))
        return
    rng = random.Random(f"vlrank-sweep-{seed}")
    while True:
        yield {key: dimensions[key].sample(rng) for key in keys}


def trial_points(
    dimensions: Mapping[str, Dimension], default: Point, search: str, trials: int, seed: int | str
) -> list[Point]:
    """The default first, then up to ``trials - 1`` further points, none twice.

    A small discrete space may hold fewer points than ``trials``: then all of them are returned.
    """
    points = [default]
    # Random draws from a small discrete space repeat points: stop after 1,000 without a new one.
    fruitless = 0
    for point in sampled_points(dimensions, search, seed):
        if len(points) >= trials or fruitless > 1000:
            break
        if point in points:
            fruitless += 1
        else:
            points.append(point)
            fruitless = 0
    return points


def optuna_point(
    results: Sequence[tuple[Point, float]], dimensions: Mapping[str, Dimension], *, index: int, total: int, seed: int
) -> Point:
    """A point from Optuna's TPE sampler (Bergstra et al. 2011).

    The study is rebuilt from the results each time, so that a resumed sweep chooses as an unbroken one.

    Args:
        results: The mode's other trials: point and best validation metric.
        dimensions: The space.
        index: The trial's place among the mode's trials.
        total: The number of the mode's trials.
        seed: The sweep's seed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(dimension) for key, dimension in dimensions.items()}
    # TPE models nothing in its start-up trials; its default of 10 would make a sweep of 8 a random search.
    sampler = optuna.samplers.TPESampler(seed=seed * 1009 + index, n_startup_trials=max(2, total // 3))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for point, value in results:
        with suppress(ValueError):  # defaults outside the space teach the sampler nothing
            study.add_trial(optuna.trial.create_trial(params=point, distributions=distributions, value=value))
    chosen = study.ask(distributions).params
    return {
        key: float(f"{value:.4g}") if isinstance(dimensions[key], Uniform) else value for key, value in chosen.items()
    }


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Uniform):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    if isinstance(dimension, RandInt):
        return IntDistribution(dimension.low, dimension.high)
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    raise TypeError(f"no Optuna distribution for {dimension!r}")


def check_points(dimensions: Mapping[str, Dimension], base: Mapping[str, Any]) -> None:
    """Every bound and choice must make a valid training config, so that no trial fails on its config hours later.

    Args:
        dimensions: The space.
        base: A whole training config, nested.

    Raises:
        UserError: names the key and the value.
    """
    for key, dimension in dimensions.items():
        for value in dimension.bounds():
            validate(TrainConfig, merge(base, nested({key: value})))


def combined(*spaces: Mapping[str, Any]) -> dict[str, Any]:
    """Spaces joined key by key; a later space replaces a key's whole dimension."""
    joined: dict[str, Any] = {}
    for space in spaces:
        joined |= space
    return joined


def names(points: Sequence[Point]) -> list[str]:
    """The keys that differ between the points, in the order of the space: the columns of a table."""
    keys = list(points[0]) if points else []
    return [key for key in keys if len({repr(point.get(key)) for point in points}) > 1]

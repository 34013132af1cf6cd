"""What a sweep searches in one mode: the default configuration, the search space and the points to try."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vlrank.config import Mode, TrainConfig, TuneConfig, config_dir, merge, mode_defaults, read_yaml, validate
from vlrank.errors import UserError
from vlrank.training.data import selection_metric
from vlrank.tuning import space as spaces
from vlrank.tuning.space import Dimension, Point
from vlrank.tuning.trials import Trial


@dataclass(frozen=True, slots=True)
class ModeSearch:
    """The search in one mode.

    Attributes:
        mode: Mode.
        base: The default configuration of the trials; ``out`` is the sweep's folder of runs.
        dimensions: The search space.
        points: Training keys per trial, the defaults first; an adaptive search fills the empty ones while it runs.
    """

    mode: Mode
    base: TrainConfig
    dimensions: dict[str, Dimension]
    points: list[Point]

    @property
    def epochs(self) -> int:
        """Epochs of the longest trial."""
        dimension = self.dimensions.get("epochs")
        return int(max(dimension.bounds())) if dimension else self.base.epochs

    def epochs_of(self, trial: Trial) -> int:
        """The number of epochs that a trial is to train."""
        return int(trial.config.get("epochs", self.base.epochs))

    @property
    def metric(self) -> str:
        """The validation metric that compares the trials."""
        return selection_metric(self.base)[0]

    def trial_config(self, trial: Trial, runs: Path, seed: int | None = None) -> TrainConfig:
        """The whole training config of a trial; ``seed`` replaces the mode's."""
        values = merge(self.base.model_dump(), spaces.nested(trial.config)) | {"out": runs / trial.trial_id}
        return validate(TrainConfig, values if seed is None else {**values, "seed": seed})


def mode_search(config: TuneConfig, mode: Mode) -> ModeSearch:
    """Everything about a mode's trials that is known before any of them runs.

    Raises:
        UserError: a wrong key or value in ``train``, ``per_mode``, ``space`` or ``spaces``.
    """
    # The default configuration: the mode's file, then the sweep's own training keys.
    own = merge(config.train, config.per_mode.get(mode, {}))
    taken = sorted({"dataset", "out", "mode", "ray"} & set(own))
    if taken:
        raise UserError(f"`train` of a sweep cannot set {', '.join(taken)}", "They are options of the sweep itself.")
    values = merge(mode_defaults(mode), own)
    values = {"resume_minutes": 0, **values}  # ASHA pauses trials, which go on from where they were
    base = validate(TrainConfig, {**values, "dataset": config.dataset, "out": config.out / "runs", "mode": mode})
    base = base.model_copy(update={"metric": selection_metric(base)[0]})

    # The space. A key that `train` fixes is not searched just because the shipped space has it.
    shipped = read_yaml(config_dir() / "tune" / f"{mode}.yaml").get("space", {})
    shipped = {key: value for key, value in shipped.items() if key.split(".")[0] not in own}
    dimensions = spaces.parse_space(spaces.combined(shipped, config.space, config.spaces.get(mode, {})))
    spaces.check_points(dimensions, base.model_dump())

    # The points.
    default = spaces.default_point(dimensions, base.model_dump())
    if config.search == "optuna":
        points: list[Point] = [default, *({} for _ in range(config.trials - 1))]
    else:
        every_combination = math.prod(len(dimension.grid()) for dimension in dimensions.values()) + 1
        count = every_combination if config.search == "grid" else config.trials
        points = spaces.trial_points(dimensions, default, config.search, count, f"{config.seed}-{mode}")
    return ModeSearch(mode, base, dimensions, points)

"""The stages by name: config, ``run`` and what ``--dry_run`` calls."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from vlrank.config import (
    Config,
    EvaluateConfig,
    GenerateConfig,
    PrepareConfig,
    RerankConfig,
    RetrieveConfig,
    TrainConfig,
    TuneConfig,
)
from vlrank.console import Summary

Stage = tuple[type[Config], str, str | None]

STAGES: dict[str, Stage] = {
    "prepare": (PrepareConfig, "vlrank.data.prepare:run", "vlrank.data.prepare:dry_run"),
    "generate": (GenerateConfig, "vlrank.generation.pipeline:run", "vlrank.generation.pipeline:dry_run"),
    "retrieve": (RetrieveConfig, "vlrank.retrieval.retrieve:run", "vlrank.retrieval.retrieve:dry_run"),
    "train": (TrainConfig, "vlrank.training.run:run", "vlrank.training.run:dry_run"),
    "tune": (TuneConfig, "vlrank.tuning.run:run", "vlrank.tuning.run:dry_run"),
    "rerank": (RerankConfig, "vlrank.reranking.pipeline:run", "vlrank.reranking.pipeline:dry_run"),
    "evaluate": (EvaluateConfig, "vlrank.evaluation.run:run", "vlrank.evaluation.run:dry_run"),
}
"""Stages that can run as jobs; their functions are imported when they are called."""


def lazy(target: str) -> Callable[[Any], Summary]:
    """``"module:function"``, imported when called: `vlrank --help` loads neither torch nor Ray."""
    module, _, function = target.partition(":")
    return lambda config: getattr(import_module(module), function)(config)

"""What every ranking engine can do, and how one is opened."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vlrank.compat import show_all
from vlrank.config import EngineConfig
from vlrank.engines.models import ModelFolder
from vlrank.engines.resources import engine_name, left_by_packed, ranking_engine
from vlrank.errors import UserError
from vlrank.prompting.encoding import Encoded, Encoder


class LabelScorer(Protocol):
    """One loaded model. A request that fails is returned as an exception in its place; the others are not disturbed.

    Attributes:
        callers: Threads that may call it at once, and keep it busy; 1 where calls must come one by one.
    """

    callers: int

    def score_labels(self, encoder: Encoder, requests: Sequence[Encoded]) -> list[npt.NDArray[np.float32] | Exception]:
        """Per request the float32 log-probabilities [N] of the labels "1".."N"; see `LabelTrie`."""
        ...

    def close(self) -> None:
        """Give memory and processes back."""
        ...


def open_scorer(model: ModelFolder, config: EngineConfig, encoder: Encoder | None = None) -> LabelScorer:
    """Load a model into this process with the configured engine; see `ranking_engine`.

    Args:
        model: What to load.
        config: The engine.
        encoder: Of the model: lets the packed engine compare itself with transformers.

    Raises:
        UserError: the engine is not installed, or the model cannot be loaded.
    """
    name = ranking_engine(config, model)
    if why := left_by_packed(config, model):
        _say(model, name, why)
    if name == "packed":
        from vlrank.engines.packed_load import open_packed
        from vlrank.engines.packed_model import Unsuited

        try:
            return open_packed(model, config, encoder)
        except Unsuited as error:
            if config.name == "packed":
                raise UserError(
                    f"engine.name=packed cannot rank with {model.path}: {error}", "Set engine.name=auto."
                ) from error
            name = engine_name(config)
            _say(model, name, str(error))
            show_all()
    if name == "vllm":
        from vlrank.engines.vllm_scorer import VllmScorer

        return VllmScorer(model, config)
    from vlrank.engines.transformers_scorer import TransformersScorer

    return TransformersScorer(model, config)


def _say(model: ModelFolder, engine: str, why: str) -> None:
    print(f"{model.path} is ranked by {engine}, not by packed: {why}", file=sys.stderr, flush=True)

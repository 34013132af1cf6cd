"""What every ranking engine can do, and how one is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vlrank.config import EngineConfig
from vlrank.engines.models import ModelFolder
from vlrank.engines.resources import engine_name
from vlrank.prompting.encoding import Encoded, Encoder


class LabelScorer(Protocol):
    """One loaded model. A request that fails is returned as an exception in its place; the others are not disturbed."""

    def score_labels(self, encoder: Encoder, requests: Sequence[Encoded]) -> list[npt.NDArray[np.float32] | Exception]:
        """Per request the float32 log-probabilities [N] of the labels "1".."N"; see `LabelTrie`."""
        ...

    def close(self) -> None:
        """Give memory and processes back."""
        ...


def open_scorer(model: ModelFolder, config: EngineConfig) -> LabelScorer:
    """Load a model into this process with the configured engine; ``auto`` takes vLLM where it is installed.

    Raises:
        UserError: the engine is not installed, or the model cannot be loaded.
    """
    if engine_name(config) == "vllm":
        from vlrank.engines.vllm_scorer import VllmScorer

        return VllmScorer(model, config)
    from vlrank.engines.transformers_scorer import TransformersScorer

    return TransformersScorer(model, config)

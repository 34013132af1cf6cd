"""What both engines are judged by."""

from pathlib import Path

import numpy as np
import pytest

from vlrank.engines.models import open_model
from vlrank.engines.transformers_scorer import load_model
from vlrank.prompting.encoding import Encoded, Encoder
from vlrank.prompting.modes import mode_spec

from .brute_force import RANKING, brute_force, text_items


@pytest.fixture(scope="session")
def judged(tiny_text_model: Path) -> dict[int, tuple[Encoded, np.ndarray]]:
    """Number of candidates -> prompt and brute-force log-probabilities of the tiny text model."""
    model = load_model(open_model(tiny_text_model))
    encoder = Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), RANKING)
    result = {}
    for n in (1, 5, 9, 10, 20, 99, 100):
        encoded = encoder.encode(text_items(3, "old"), text_items(n))
        result[n] = encoded, brute_force(model, encoder, encoded)
    return result

"""Fusion must lean on the side that is right, and must not invent an opinion."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlrank.reranking.fusion import best_weight, fuse
from vlrank.reranking.windows import stable_order


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30))
def test_fusion_ends(values: list[float]) -> None:
    retriever = np.linspace(1, 0, len(values))
    constant = np.full(len(values), -3.0)
    assert stable_order(fuse(constant, retriever, 0.3)) == list(range(len(values)))
    assert stable_order(fuse(values, retriever, 1)) == list(range(len(values)))


def test_fusion_adds_what_each_side_is_sure_of() -> None:
    # Centred: [-1, 1] and [2, -2]; a quarter of the retriever, whose spread is 2, leaves [-0.5, 0.5].
    np.testing.assert_allclose(fuse([0, 2], [5, 1], 0.25, spread=2), [-0.5, 0.5])
    # A side that hardly tells the candidates apart does not overrule one that does.
    unsure, sure = [-1.10, -1.09, -1.11], [3.0, 0.0, 0.0]
    assert stable_order(fuse(unsure, sure, 0.5))[0] == 0
    assert stable_order(fuse(sure, unsure, 0.5))[0] == 0


@given(st.floats(0.01, 100))
def test_the_unit_of_the_retrievers_scores_does_not_matter(unit: float) -> None:
    model, retriever = np.array([-0.2, -1.5, -3.0]), np.array([0.1, 0.9, 0.2])
    expected = fuse(model, retriever, 0.4, spread=0.3)
    np.testing.assert_allclose(fuse(model, retriever * unit, 0.4, spread=0.3 * unit), expected, rtol=1e-5)


def test_the_fusion_weight_is_the_best_on_validation() -> None:
    # The retriever knows the target of the first user, the model that of the second; the model is surer.
    retriever_right = ([1, 2, 3], [-1.0, -0.9, -1.1], [0.9, 0.0, 0.1], 1)
    model_right = ([1, 2, 3], [-0.1, -4.0, -5.0], [0.5, 0.51, 0.49], 1)
    assert best_weight([model_right]) == 0.0  # several weights do: the smallest
    assert best_weight([retriever_right]) > 0.0
    assert best_weight([retriever_right, model_right] * 3) > 0.0

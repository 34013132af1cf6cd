"""Fast paths must learn exactly what the plain forward pass learns: same loss, same gradients, in float32.

What a user would lose: a model trained on subtly wrong gradients looks like any other, only worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlrank.config import RankingConfig
from vlrank.data.dataset import Dataset
from vlrank.engines.structure import decoder_layers
from vlrank.engines.transformers_scorer import score_labels
from vlrank.prompting.encoding import Encoded, Encoder
from vlrank.prompting.modes import mode_spec
from vlrank.training.answers import AnswerHead, token_losses
from vlrank.training.attention import compile_layers, use_packed_attention
from vlrank.training.collate import MicroBatch, Row, answer_row, end_to_end, side_by_side
from vlrank.training.model import accept_features
from vlrank.training.pictures import Pixels, compute_features

TOLERANCE = 1e-5
LENGTHS = (3, 11, 5, 14)  # candidates per prompt: answers of one and of two digits


class Case:
    """A model with four prompts of different lengths, and the plain loss and gradients on them."""

    def __init__(self, model: Any, encoder: Encoder, prompts: list[Encoded], vision: bool) -> None:
        self.model, self.encoder, self.vision = model, encoder, vision
        self.labels = [encoded.n_candidates for encoded in prompts]  # the last number: "3", "11", "5", "14"
        self.prompts = prompts
        self.rows = [answer_row(encoder, *pair) for pair in zip(prompts, self.labels, strict=True)]
        self.head = AnswerHead(model)
        self.pixels = Pixels(encoder) if encoder.image_processor is not None else None
        self.form: dict[str, Any] = {"vision": vision, "pad_id": 0, "pictures": self.pixels}
        self.loss, self.gradients = self.measure(self.plain)

    def measure(self, losses: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.model.zero_grad(set_to_none=True)
        total = losses()
        total.sum().backward()
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return total.detach(), gradients

    def plain(self) -> torch.Tensor:
        """One prompt at a time, logits of all places, positions left to transformers: the path to agree with."""
        parts = []
        for encoded, label in zip(self.prompts, self.labels, strict=True):
            answer = encoded.answer_ids(label - 1)
            ids = torch.tensor([[*encoded.ids, *answer]])
            inputs: dict[str, Any] = {"input_ids": ids}
            if encoded.grids:
                pixels = np.concatenate([self.encoder.pixels(path) for path in encoded.image_paths])
                inputs |= {
                    "pixel_values": torch.from_numpy(pixels),
                    "image_grid_thw": torch.tensor(encoded.grids),
                    "mm_token_type_ids": (ids == self.encoder.image_token_id).int(),
                }
            logits = self.model(**inputs, use_cache=False).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            parts.append(losses[-len(answer) :])
        return torch.cat(parts)

    def fast(self, *batches: MicroBatch) -> torch.Tensor:
        return torch.cat([token_losses(self.model, self.head, batch) for batch in batches])

    def assert_same(self, losses: Any) -> None:
        loss, gradients = self.measure(losses)
        torch.testing.assert_close(loss, self.loss, rtol=TOLERANCE, atol=TOLERANCE)
        assert gradients.keys() == self.gradients.keys()
        for name, gradient in gradients.items():
            expected = self.gradients[name]
            atol = TOLERANCE * max(1.0, float(expected.abs().max()))  # entries that cancel keep the others' rounding
            torch.testing.assert_close(gradient, expected, rtol=TOLERANCE, atol=atol, msg=name)

    def differs(self, losses: Any) -> bool:
        loss, _ = self.measure(losses)
        return bool((loss - self.loss).abs().max() > 100 * TOLERANCE)


def make_case(folder: Path, shop: Dataset, mode: str) -> Case:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    spec = mode_spec(mode)
    kind = AutoModelForImageTextToText if spec.family == "vision" else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    encoder = Encoder.load(folder, spec, RankingConfig(max_image_pixels=64 * 64))
    if encoder.image_processor is not None:  # several tokens per picture, or two-dimensional positions go unnoticed
        encoder.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    items = list(shop.item_meta().values())
    prompts = [encoder.encode(items[20 : 20 + i], items[:n]) for i, n in enumerate(LENGTHS)]
    return Case(model, encoder, prompts, spec.family == "vision")


@pytest.fixture(scope="module", params=["semantic_summary_small", "caption", "raw_image"])
def case(request: pytest.FixtureRequest, shop: Dataset, tiny_text_model: Path, tiny_vision_model: Path) -> Case:
    folder = tiny_text_model if request.param == "semantic_summary_small" else tiny_vision_model
    return make_case(folder, shop, request.param)


@pytest.fixture
def packed_attention(case: Case) -> Iterator[None]:
    config = case.model.config.get_text_config()
    before = config._attn_implementation
    use_packed_attention(case.model)
    yield
    config._attn_implementation = before


@contextmanager
def compiled_layers(case: Case, backend: Any) -> Iterator[None]:
    compile_layers(case.model, backend=backend)
    try:
        yield
    finally:
        for layer in decoder_layers(case.model):
            layer._compiled_call_impl = None
        del decoder_layers(case.model)[-1].narrow.keys_and_values  # the compiled one, the class's is behind it


def test_padded_batch_with_answer_only_logits_equals_plain(case: Case) -> None:
    case.assert_same(lambda: case.fast(side_by_side(case.rows, **case.form)))


def test_packed_row_equals_plain(case: Case, packed_attention: None) -> None:
    length = sum(map(len, case.rows)) + 17  # filled up, with room in cu_seqlens for more documents
    longest = max(map(len, case.rows))  # the filling is longer than that, and has to be cut
    length += 2 * longest
    case.assert_same(lambda: case.fast(end_to_end(case.rows, length=length, documents=9, longest=longest, **case.form)))


def test_packed_row_equals_plain_through_the_block_diagonal_mask_of_transformers(case: Case) -> None:
    def losses() -> torch.Tensor:
        batch = end_to_end(case.rows, **case.form)
        batch.pop("cu_seqlens"), batch.pop("longest")
        return case.fast(batch)

    case.assert_same(losses)


def test_two_micro_batches_add_up_to_one(case: Case) -> None:
    case.assert_same(lambda: case.fast(*(side_by_side(case.rows[i : i + 2], **case.form) for i in (0, 2))))


def test_gradient_checkpointing_changes_nothing(case: Case) -> None:
    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    case.model.train()
    try:
        case.assert_same(lambda: case.fast(side_by_side(case.rows, **case.form)))
    finally:
        case.model.gradient_checkpointing_disable()
        case.model.eval()


def test_compiled_layers_equal_plain(case: Case, packed_attention: None) -> None:
    if not case.rows[0].grids:
        pytest.skip("one model is enough: capture is slow, and the layers are the same")
    # The eager backend runs what was captured without generating code: capture is what could go wrong in our part.
    with compiled_layers(case, "eager"):
        case.assert_same(lambda: case.fast(end_to_end(case.rows, documents=9, **case.form)))


def test_validation_compiles_nothing(case: Case, packed_attention: None) -> None:
    """Every batch has another shape: the first evaluation of a run took 7 to 18 seconds on an H200, the others one."""
    if case.vision:
        pytest.skip("one model is enough: capture is slow, and the layers are the same")
    expected = [scores for prompt in case.prompts for scores in score_labels(case.model, case.encoder, [prompt])]
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with compiled_layers(case, backend):
        for prompt, scores in zip(case.prompts, expected, strict=True):
            np.testing.assert_allclose(score_labels(case.model, case.encoder, [prompt])[0], scores)
        assert not compiled
        case.fast(side_by_side(case.rows, **case.form))  # in training they are
        assert compiled


# ---- what must be noticed -------------------------------------------------------------------------------------------


def test_positions_that_do_not_restart_are_caught(case: Case) -> None:
    def losses() -> torch.Tensor:
        batch = end_to_end(case.rows, **case.form)
        batch.pop("cu_seqlens"), batch.pop("longest")
        shape = batch["position_ids"].shape
        batch["position_ids"] = torch.arange(shape[-1]).expand(shape).clone()
        return case.fast(batch)

    assert case.differs(losses)


@pytest.mark.parametrize("form", ["three rows", "none", "two-dimensional"])
def test_qwen3_vl_without_its_four_rows_of_positions_is_caught(case: Case, form: str) -> None:
    if not case.vision:
        pytest.skip("text models take two-dimensional positions")
    if form == "two-dimensional" and not case.rows[0].grids:
        pytest.skip("all rows are equal without pictures, so nothing is lost")

    def losses() -> torch.Tensor:
        batch = end_to_end(case.rows, **case.form)
        batch.pop("cu_seqlens"), batch.pop("longest")
        positions = batch.pop("position_ids")
        if form == "three rows":
            batch["position_ids"] = positions[1:]
        elif form == "two-dimensional":
            batch["position_ids"] = positions[0]
        elif case.rows[0].grids:
            batch["mm_token_type_ids"] = (batch["input_ids"] == case.encoder.image_token_id).int()
        return case.fast(batch)

    assert case.differs(losses)


def test_a_live_cache_is_caught(case: Case) -> None:
    def losses() -> torch.Tensor:
        batch = end_to_end(case.rows, **case.form)
        batch.pop("cu_seqlens"), batch.pop("longest")
        index, targets = batch.pop("answer_index"), batch.pop("targets")
        with case.head.at(index):
            logits = case.model(**batch, use_cache=True).logits[0]
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    assert case.differs(losses)


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_cached_features_with_deepstack_equal_pixels(tiny_vision_model: Path, shop: Dataset, tmp_path: Path) -> None:
    case = make_case(tiny_vision_model, shop, "raw_image")
    case.model.model.visual.requires_grad_(False)
    case.loss, case.gradients = case.measure(case.plain)
    paths = sorted({path for row in case.rows for path in row.image_paths})
    accept_features(case.model)
    features, bad = compute_features(case.model, case.encoder, paths, tmp_path / "features")
    assert not bad
    assert len(features) == len(paths)
    form = case.form | {"pictures": features}
    case.assert_same(lambda: case.fast(side_by_side(case.rows, **form)))
    # Pixels are still understood: validation of a model in training may send them.
    case.assert_same(lambda: case.fast(side_by_side(case.rows, **case.form)))


def test_features_without_deepstack_are_caught(tiny_vision_model: Path, shop: Dataset, tmp_path: Path) -> None:
    case = make_case(tiny_vision_model, shop, "raw_image")
    paths = sorted({path for row in case.rows for path in row.image_paths})
    accept_features(case.model)
    features, _ = compute_features(case.model, case.encoder, paths, tmp_path / "features")
    hidden = case.model.config.vision_config.out_hidden_size

    def flat(wanted: Any) -> torch.Tensor:
        values = features(wanted).clone()
        values[:, hidden:] = 0
        return values

    assert case.differs(lambda: case.fast(side_by_side(case.rows, **(case.form | {"pictures": flat}))))


def test_an_unreadable_picture_is_named_and_the_rest_is_kept(
    tiny_vision_model: Path, shop: Dataset, tmp_path: Path
) -> None:
    case = make_case(tiny_vision_model, shop, "raw_image")
    good = case.rows[0].image_paths[0]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    features, bad = compute_features(case.model, case.encoder, [str(broken), good], tmp_path / "features")
    assert bad == [str(broken)]
    torch.testing.assert_close(features([good]), compute_again(case, good, tmp_path))


def compute_again(case: Case, path: str, tmp_path: Path) -> torch.Tensor:
    features, _ = compute_features(case.model, case.encoder, [path], tmp_path / "again")
    return features([path])


# ---- the whole text -------------------------------------------------------------------------------------------------


def test_loss_all_learns_every_text_token_and_no_placeholder(case: Case) -> None:
    encoded, label = case.prompts[1], case.labels[1]
    row: Row = answer_row(case.encoder, encoded, label, loss="all")
    whole = [*encoded.ids, *encoded.answer_ids(label - 1)]
    expected = [(i, token) for i, token in enumerate(whole[1:]) if token != case.encoder.image_token_id]
    assert list(zip(row.places.tolist(), row.targets.tolist(), strict=True)) == expected

"""The last layer computed at the answers' places alone: same numbers, less work, and only where that is exact.

tests/training/test_exact.py compares all paths through it with the plain forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3VLForConditionalGeneration

from tests.training.test_lora import adapted
from vlrank.engines.structure import core, decoder_layers
from vlrank.training.answers import AnswerHead, attend, token_losses
from vlrank.training.attention import compile_layers, use_packed_attention
from vlrank.training.collate import MicroBatch, Row, end_to_end, side_by_side
from vlrank.training.lora import fuse_lora


def rows(*lengths: int, answer: int = 2) -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        Row(
            rng.integers(5, 200, size=length),
            np.tile(np.arange(length), (3, 1)),
            np.arange(length - answer, length),
            rng.integers(5, 200, size=answer),
        )
        for length in lengths
    ]


def packed(*lengths: int) -> MicroBatch:
    return end_to_end(rows(*lengths), vision=False, pad_id=0, length=sum(lengths) + 8, documents=4, longest=64)


def learn(model: Any, head: AnswerHead, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Loss and gradients by name."""
    model.zero_grad()
    losses = token_losses(model, head, batch)
    losses.sum().backward()
    return {"loss": losses.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5, msg=name)


@contextmanager
def places_in_last_mlp(model: Any) -> Iterator[list[int]]:
    """How many places each pass takes through the MLP of the last layer."""
    seen: list[int] = []
    mlp = decoder_layers(model)[-1].mlp
    hook = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    try:
        yield seen
    finally:
        hook.remove()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, attn_implementation="sdpa")
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("form", ["packed", "padded"])
def test_the_answers_places_learn_what_all_places_learn(family: str, form: str, tiny_text_model: Path) -> None:
    model = load(tiny_text_model) if family == "qwen3" else llama()
    model.train()
    batch = packed(40, 23, 31) if form == "packed" else side_by_side(rows(40, 23, 31), vision=False, pad_id=0)
    if form == "packed":
        use_packed_attention(model)
    expected = learn(model, AnswerHead(model, last_layer=False), batch)
    head = AnswerHead(model)
    with places_in_last_mlp(model) as seen:
        assert_same(learn(model, head, batch), expected)
        assert seen == [6]
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        assert_same(learn(model, head, batch), expected)
        assert seen == [6, 6]  # and is not computed again


def test_adapters_of_the_last_layer_learn_the_same_in_one_graph(tiny_text_model: Path) -> None:
    model = adapted(tiny_text_model)
    model.enable_input_require_grads()
    # One shape, other numbers of places: packed rows have 2 or 3 per prompt.
    batches = [side_by_side(rows(40, 23, answer=n), vision=False, pad_id=0) for n in (1, 2, 3)]
    whole = AnswerHead(model, last_layer=False)
    expected = [learn(model, whole, batch) for batch in batches]
    head = AnswerHead(model)
    fuse_lora(model)
    torch._dynamo.reset()
    compile_layers(core(model), backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), places_in_last_mlp(model) as seen:
        for batch, right in zip(batches, expected, strict=True):
            assert_same(learn(model, head, batch), right)
    assert seen == [2, 4, 6]


def test_outside_training_and_with_many_places_the_layer_is_whole(tiny_text_model: Path) -> None:
    model = load(tiny_text_model)
    ids = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids, use_cache=False).logits
    many = side_by_side(rows(24, 20, answer=18), vision=False, pad_id=0)
    expected = learn(model, AnswerHead(model, last_layer=False), many)
    head = AnswerHead(model)
    with places_in_last_mlp(model) as seen:
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before)
        assert_same(learn(model, head, many), expected)
        assert seen == [48, 48]


def test_layers_that_are_not_known_stay_whole(tiny_text_model: Path, tiny_vision_model: Path) -> None:
    """Unsloth replaces forward functions; windows, dropout and late deepstack features need other places too."""
    patched = load(tiny_text_model)
    own = type("Qwen3DecoderLayer", (type(decoder_layers(patched)[-1]),), {"forward": lambda self, hidden, **_: hidden})
    decoder_layers(patched)[-1].__class__ = own
    sliding, dropping = load(tiny_text_model), load(tiny_text_model)
    decoder_layers(sliding)[-1].self_attn.sliding_window = 8
    decoder_layers(dropping)[-1].self_attn.attention_dropout = 0.1
    late = Qwen3VLForConditionalGeneration.from_pretrained(tiny_vision_model)
    late.config.vision_config.deepstack_visual_indexes = [0] * len(decoder_layers(late))
    for model in (patched, sliding, dropping, late):
        AnswerHead(model)
        assert not hasattr(decoder_layers(model)[-1], "narrow")


def test_attention_of_few_queries_sees_its_document_up_to_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    heads, key_heads, length, size = 6, 2, 20, 8
    query, key, value = (torch.randn(1, n, length, size, generator=generator) for n in (heads, key_heads, key_heads))
    index, begin = torch.tensor([3, 11, 12, 19]), torch.tensor([0, 5, 12, 5])
    found = attend(query[:, :, index], key, value, begin, index, 0.3)
    for i, (start, end) in enumerate(zip(begin.tolist(), index.tolist(), strict=True)):
        for head in range(heads):
            own = key[0, head // 3, start : end + 1], value[0, head // 3, start : end + 1]
            weights = torch.softmax(0.3 * own[0] @ query[0, head, end], dim=0)
            torch.testing.assert_close(found[0, i, head * size : (head + 1) * size], weights @ own[1])

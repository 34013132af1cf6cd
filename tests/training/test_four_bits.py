"""4-bit training on CPUs: validation between two steps must not change the gradients of the second."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlrank.config import TrainConfig
from vlrank.data.dataset import Dataset
from vlrank.training.answers import token_losses
from vlrank.training.collate import answer_row, side_by_side
from vlrank.training.model import load_trainable, resolve_base


def test_validation_leaves_4_bit_gradients_alone(settings: Callable[..., TrainConfig], told_shop: Dataset) -> None:
    # bitsandbytes repacks 4-bit weights for AVX512-BF16 at the first forward pass without gradients, and every later
    # backward pass is wrong. On other processors this test passes either way.
    pytest.importorskip("bitsandbytes")
    config = settings("semantic_summary_small", backend="transformers", dtype="bfloat16")
    base = resolve_base(config)
    assert (base.in_4bit, base.unsloth) == (True, False)
    trainable = load_trainable(config, base, torch.device("cpu"))
    items = list(told_shop.item_meta().values())
    row = answer_row(trainable.encoder, trainable.encoder.encode(items[:3], items[3:9]), label=4)
    batch = side_by_side([row], vision=False, pad_id=0)
    for name, parameter in trainable.model.named_parameters():
        if "lora_B" in name:  # begins at zero, and then nothing but lora_B has a gradient
            torch.nn.init.normal_(parameter, std=0.1)

    def gradients() -> dict[str, torch.Tensor]:
        trainable.model.zero_grad(set_to_none=True)
        token_losses(trainable.model, trainable.head, batch).sum().backward()
        return {n: p.grad.clone() for n, p in trainable.model.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        token_losses(trainable.model, trainable.head, batch)
    after = gradients()
    assert len(before) == 28  # two layers, seven adapted matrices each, A and B
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, msg=name)

"""Where things are inside a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlrank.errors import UserError


def core(model: Any) -> Any:
    """The plain transformers model inside PEFT and data-parallel wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def language_model(model: Any) -> Any:
    """The part without output head and vision tower: token ids -> hidden states."""
    whole = core(model)
    inner = whole.base_model if whole.base_model is not whole else getattr(whole, "model", whole)
    return getattr(inner, "language_model", inner)


def decoder_layers(model: Any) -> Any:
    """The ``ModuleList`` of a language model's layers: the longest one, whatever its name (layers, h, blocks).

    Raises:
        UserError: there is none.
    """
    from torch.nn import ModuleList

    lists = [part for part in language_model(model).children() if isinstance(part, ModuleList)]
    if not lists:
        raise UserError(
            f"{type(core(model)).__name__} keeps its decoder layers in no list", "Set `model` to another causal model."
        )
    return max(lists, key=len)


def blocks(model: Any) -> list[str]:
    """Class names of the layers that are sharded one by one."""
    layers = [decoder_layers(model)[0]]
    if tower := getattr(core(model).base_model, "visual", None):
        layers.append(tower.blocks[0])
    return [type(layer).__name__ for layer in layers]


def weights(model: Any) -> list[tuple[int, int, bool]]:
    """Numbers, bytes and whether it is trained, of each weight."""
    return [(p.numel(), p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]


@contextmanager
def attending(model: Any, attention: str) -> Iterator[None]:
    """Eval mode and another attention implementation, for the time of the block.

    Layers that were compiled for training run as they are: every batch has another shape, and each would be compiled.
    """
    import torch

    training, config = model.training, core(model).config.get_text_config()
    before = config._attn_implementation
    model.eval()
    config._attn_implementation = attention
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        config._attn_implementation = before
        model.train(training)

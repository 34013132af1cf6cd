"""Where things are inside a model."""

from __future__ import annotations

from typing import Any


def core(model: Any) -> Any:
    """The plain transformers model inside PEFT and data-parallel wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> Any:
    """The ``ModuleList`` of a language model's layers, of Qwen3-VL too."""
    inner = core(model).model
    return getattr(inner, "language_model", inner).layers


def blocks(model: Any) -> list[str]:
    """Class names of the layers that are sharded one by one."""
    layers = [decoder_layers(model)[0]]
    if hasattr(core(model).model, "visual"):
        layers.append(core(model).model.visual.blocks[0])
    return [type(layer).__name__ for layer in layers]


def weights(model: Any) -> list[tuple[int, int, bool]]:
    """Numbers, bytes and whether it is trained, of each weight."""
    return [(p.numel(), p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]

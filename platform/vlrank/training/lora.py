"""LoRA with less memory traffic: projections of the same input share one matrix product.

An adapter of rank 8 adds nothing to the arithmetic of a projection and doubles its memory traffic: PEFT's layers read
the input once more for each A, and write and read each output once more to add B to it. Here the input of a group
(query, key and value; gate and up) meets one matrix of all A; that product is appended to the input, B to the frozen
weight, and one matrix product gives all outputs: ``[x | x A^T] [W | s B]^T``. The backward pass has the same form.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections that share an input, in the order in which Qwen's models and Llama call them."""

GROUPS_OF_LAST = (("q_proj",), ("k_proj", "v_proj"), *GROUPS[1:])
"""The same for a last layer with queries at a few places only (`vlrank.training.answers.LastLayer`)."""


class _Projections(torch.autograd.Function):
    """``y = x W^T + (x A^T) B^T`` with W frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """See `project`. x [M, K], weight [N, K], a [R, K], b [N, R] -> [M, N]."""
        low = x @ a.T
        ctx.save_for_backward(x, low, weight, a, b)
        return torch.cat([x, low], dim=1) @ torch.cat([weight, b], dim=1).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, a and b."""
        x, low, weight, a, b = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:  # the first layer reads frozen embeddings
            return None, None, (grad @ b).T @ x, grad.T @ low
        both = _through(grad, weight, b)
        grad_x, grad_low = both.split([x.shape[1], low.shape[1]], dim=1)
        return grad_x + grad_low @ a, None, grad_low.T @ x, grad.T @ low


@torch.library.custom_op("vlrank::lora_through", mutates_args=())
def _through(grad: torch.Tensor, weight: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``grad [W | B]``, [M, K + R].

    An operation of its own: a compiler that saw inside would keep the forward pass's ``[W | B]`` for it, a copy of all
    frozen weights.
    """
    return grad @ torch.cat([weight, b], dim=1)


@_through.register_fake
def _(grad: torch.Tensor, weight: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1] + b.shape[1])


def project(x: torch.Tensor, layers: list[Linear], weight: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of several LoRA layers for one input.

    Args:
        x: [..., K].
        layers: With one adapter each, r_i of it.
        weight: Their base weights, concatenated, [sum of N_i, K].

    Returns:
        [..., N_i] for each layer.
    """
    name = layers[0].active_adapters[0]
    a = torch.cat([layer.lora_A[name].weight for layer in layers])
    b = torch.block_diag(*(layer.lora_B[name].weight * layer.scaling[name] for layer in layers))
    y = _Projections.apply(x.reshape(-1, x.shape[-1]), weight, a.to(x.dtype), b.to(x.dtype))
    sizes = [layer.out_features for layer in layers]
    return [part.reshape(*x.shape[:-1], -1) for part in y.split(sizes, dim=1)]


class _First(Linear):
    """The first layer of a group to be called; it also computes the outputs of the others."""

    others: list[_Other]
    weights: list[torch.Tensor]  # in a list, so that it is no part of the model's state

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """PEFT's forward pass for all layers of the group; the others keep their outputs until they are called."""
        layers = [self, *self.others]
        if args or kwargs or not all(map(_active, layers)):
            return super().forward(x, *args, **kwargs)
        own, *rest = project(x, layers, self.weights[0])
        for layer, output in zip(self.others, rest, strict=True):
            layer.ready = (x, output)
        return own


class _Other(Linear):
    """A layer whose output `_First` computes."""

    ready: tuple[torch.Tensor, torch.Tensor] | None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """PEFT's forward pass, or the output that `_First` computed."""
        ready, self.ready = self.ready, None
        if ready is not None and ready[0] is x:
            return ready[1]
        return super().forward(x, *args, **kwargs)


def _active(layer: Linear) -> bool:
    return not layer.disable_adapters and not layer.merged


def fuse_lora(model: Any) -> int:
    """Let LoRA layers that share an input compute together, in place; call it when the model is on its device.

    Adapters keep their names, so checkpoints are PEFT's. Layers that are quantised or have a bias, dropout, DoRA or
    several adapters stay as they are.

    Args:
        model: A `PeftModel`, or anything with `peft.tuners.lora.Linear` inside.

    Returns:
        Layers that were changed.
    """
    changed = 0
    for parent in list(model.modules()):
        for names in GROUPS_OF_LAST if getattr(parent, "queries_apart", False) else GROUPS:
            layers: list[Any] = [layer for name in names if _plain(layer := getattr(parent, name, None))]
            if not layers:
                continue
            weight = torch.cat([layer.get_base_layer().weight.detach() for layer in layers])
            bases = [layer.get_base_layer() for layer in layers]
            for base, part in zip(bases, weight.split([base.out_features for base in bases]), strict=True):
                base.weight.data = part  # one copy in memory
            first, *others = layers
            for layer in others:
                layer.__class__ = _Other
                layer.ready = None
            first.__class__ = _First
            first.others, first.weights = others, [weight]
            changed += len(layers)
    return changed


def _plain(layer: Any) -> bool:
    if type(layer) is not Linear or type(layer.get_base_layer()) is not nn.Linear:
        return False
    (name, *more) = layer.active_adapters
    weight = layer.get_base_layer().weight
    return (
        not more
        and list(layer.lora_A) == [name]
        and not layer.use_dora.get(name, False)
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.get_base_layer().bias is None
        and layer.lora_B[name].bias is None
        and not weight.requires_grad
        and weight.is_floating_point()
    )

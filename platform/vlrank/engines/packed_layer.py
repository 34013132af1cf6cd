"""A decoder layer of packed rows around its attention, in PyTorch: what CPUs run, and GPUs without Triton.

The operations are those of transformers' models, one by one. `vlrank.engines.packed_kernels` has the same two functions
for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import linear, silu

E4M3_MAX = 448.0
"""The largest number of float8_e4m3fn."""


class Matrix(NamedTuple):
    """A linear layer.

    Attributes:
        weight: [out, in], or float8_e4m3fn.
        bias: [out] or None.
        scale: float32 [1, out] of a float8 weight.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None


class Adapter(NamedTuple):
    """A LoRA adapter of a linear layer: ``scaling * B A``.

    Attributes:
        up: B, [out, rank].
        down: A, [rank, in].
        scaling: Factor of their product.
    """

    up: torch.Tensor
    down: torch.Tensor
    scaling: float


class LivePart(NamedTuple):
    """One linear layer of a model in training.

    Attributes:
        weight: Gives [out, in] as it is now.
        bias: [out] or None.
        size: out.
        adapters: Beside it.
    """

    weight: Callable[[], torch.Tensor]
    bias: torch.Tensor | None
    size: int
    adapters: Sequence[Adapter]


@dataclass(frozen=True, slots=True)
class LiveMatrix:
    """Linear layers of a model in training that share an input; nothing is merged and no weight is copied."""

    parts: Sequence[LivePart]

    @property
    def scale(self) -> None:
        """There is none: the weights are not float8."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, sum of out]."""
        y = x.new_empty(len(x), sum(part.size for part in self.parts))
        for part, own in zip(self.parts, y.split([part.size for part in self.parts], dim=1), strict=True):
            torch.mm(x, part.weight().t(), out=own)
            for adapter in part.adapters:
                low = x @ adapter.down.to(x.dtype).t()
                own.addmm_(low, adapter.up.to(x.dtype).t(), alpha=adapter.scaling)
            if part.bias is not None:
                own += part.bias
        return y


class Layer(NamedTuple):
    """The weights of a decoder layer; head norms are None in models without them."""

    norm: torch.Tensor
    qkv: Matrix | LiveMatrix
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Matrix | LiveMatrix
    mlp_norm: torch.Tensor
    gate_up: Matrix | LiveMatrix
    down: Matrix | LiveMatrix


class Sizes(NamedTuple):
    """What a layer's code depends on beside its weights."""

    heads: int
    key_heads: int
    head_dim: int
    epsilon: float


def product(x: torch.Tensor, matrix: Matrix | LiveMatrix) -> torch.Tensor:
    """``x W^T + b``; float8 weights meet activations that are scaled row by row, as they come."""
    if isinstance(matrix, LiveMatrix):
        return matrix.product(x)
    if matrix.scale is None:
        return linear(x, matrix.weight, matrix.bias)
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return float8_product((x.float() / scale).to(torch.float8_e4m3fn), scale, matrix, x.dtype)


def float8_product(x: torch.Tensor, scale: torch.Tensor, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """The same of float8_e4m3fn activations [T, in] and their scales, float32 [T, 1]."""
    y: torch.Tensor = torch._scaled_mm(
        x, matrix.weight.t(), scale_a=scale, scale_b=matrix.scale, out_dtype=dtype, use_fast_accum=True
    )
    return y if matrix.bias is None else y + matrix.bias


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """As transformers' RMSNorm: in float32, rounded before it is scaled."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def before_attention(
    x: torch.Tensor, layer: Layer, cos: torch.Tensor, sin: torch.Tensor, sizes: Sizes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[T, hidden] -> queries [T, heads, head dim], keys and values [T, key-value heads, head dim]."""
    y = product(rms_norm(x, layer.norm, sizes.epsilon), layer.qkv).unflatten(1, (-1, sizes.head_dim))
    q, k, v = y.split((sizes.heads, sizes.key_heads, sizes.key_heads), 1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, sizes.epsilon), rms_norm(k, layer.k_norm, sizes.epsilon)
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v.contiguous()


def after_attention(x: torch.Tensor, attended: torch.Tensor, layer: Layer, sizes: Sizes) -> torch.Tensor:
    """[T, hidden] and [T, heads, head dim] -> [T, hidden]."""
    x = x + product(attended.flatten(1), layer.o)
    gate, up = product(rms_norm(x, layer.mlp_norm, sizes.epsilon), layer.gate_up).chunk(2, -1)
    return x + product(silu(gate) * up, layer.down)

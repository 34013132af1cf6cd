"""Triton kernels for what lies between the matrix products of a packed row on a GPU.

Each replaces a handful of PyTorch's operations by one pass over memory, in float32 and with one rounding at the end. A
program works on one token, so nothing depends on a row's length or on its neighbours. They compile in seconds, where a
general compiler takes half a minute to load and trace. `vlrank.engines.packed_layer` has the same two functions in
PyTorch: the reference, and what CPUs run.
"""

# Triton's own types are not Python's.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlrank.engines.packed_layer import E4M3_MAX, Layer, LiveMatrix, Matrix, Sizes, float8_product
from vlrank.engines.packed_layer import product as plain_product


class Activations(NamedTuple):
    """What meets a matrix.

    Attributes:
        values: [T, width], or float8_e4m3fn.
        scale: float32 [T, 1] of float8 values.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None


# ---- a decoder layer, around its attention ---------------------------------------------------------------------------


def before_attention(
    x: torch.Tensor, layer: Layer, cos: torch.Tensor, sin: torch.Tensor, sizes: Sizes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `packed_layer.before_attention`."""
    _, normed = norm(x, layer.norm, sizes.epsilon, float8=layer.qkv.scale is not None)
    return heads(_product(normed, layer.qkv, x.dtype), layer, cos, sin, sizes)


def after_attention(x: torch.Tensor, attended: torch.Tensor, layer: Layer, sizes: Sizes) -> torch.Tensor:
    """See `packed_layer.after_attention`."""
    flat = attended.flatten(1)
    out = _product(Activations(flat) if layer.o.scale is None else float8(flat), layer.o, x.dtype)
    x, normed = norm(x, layer.mlp_norm, sizes.epsilon, added=out, float8=layer.gate_up.scale is not None)
    gated = silu_product(_product(normed, layer.gate_up, x.dtype), float8=layer.down.scale is not None)
    return x + _product(gated, layer.down, x.dtype)


def _product(x: Activations, matrix: Matrix | LiveMatrix, dtype: torch.dtype) -> torch.Tensor:
    if x.scale is None or isinstance(matrix, LiveMatrix):
        return plain_product(x.values, matrix)
    return float8_product(x.values, x.scale, matrix, dtype)


# ---- the kernels' callers --------------------------------------------------------------------------------------------


def norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, added: torch.Tensor | None = None, float8: bool = False
) -> tuple[torch.Tensor, Activations]:
    """RMS norm over the last axis of ``x + added``.

    Args:
        x, added: [T, width].
        weight: [width].
        epsilon: Under the root.
        float8: Round the result to float8, each token with a scale of its own.

    Returns:
        ``x + added`` and its norm.
    """
    tokens, width = x.shape
    total = x if added is None else torch.empty_like(x)
    result = _activations(x, width, float8)
    _norm[(tokens,)](
        x,
        x if added is None else added,
        weight,
        total,
        result.values,
        result.values if result.scale is None else result.scale,
        width,
        epsilon,
        E4M3_MAX,
        ADDED=added is not None,
        FLOAT8=float8,
        **_block(width),
    )
    return total, result


def heads(
    qkv: torch.Tensor, layer: Layer, cos: torch.Tensor, sin: torch.Tensor, sizes: Sizes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the first product of a layer, norm the heads where the model does, and turn them to their positions.

    Args:
        qkv: [T, (heads + 2 key-value heads) * head dim].
        layer: For its norms.
        cos, sin: [T, 1, head dim].
        sizes: Of the layer.

    Returns:
        Queries [T, heads, head dim], keys and values [T, key-value heads, head dim].
    """
    tokens = qkv.shape[0]
    n, keys, dim = sizes.heads, sizes.key_heads, sizes.head_dim
    q = qkv.new_empty(tokens, n, dim)
    k, v = (qkv.new_empty(tokens, keys, dim) for _ in range(2))
    normed = layer.q_norm is not None
    _heads[(tokens,)](
        qkv,
        layer.q_norm if normed else qkv,
        layer.k_norm if normed else qkv,
        cos,
        sin,
        q,
        k,
        v,
        sizes.epsilon,
        HEADS=n,
        KEYS=keys,
        DIM=dim,
        NORMED=normed,
        BLOCK_HEADS=triton.next_power_of_2(n),
        BLOCK_KEYS=triton.next_power_of_2(keys),
        BLOCK_HALF=triton.next_power_of_2(dim // 2),
        num_warps=4,
    )
    return q, k, v


def silu_product(gate_up: torch.Tensor, *, float8: bool = False) -> Activations:
    """``silu(gate) * up`` of [T, 2 * width]."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    result = _activations(gate_up, width, float8)
    scale = result.values if result.scale is None else result.scale
    _silu_product[(tokens,)](gate_up, result.values, scale, width, E4M3_MAX, FLOAT8=float8, **_block(width))
    return result


def float8(x: torch.Tensor) -> Activations:
    """[T, width] rounded to float8, each token with a scale of its own."""
    tokens, width = x.shape
    result = _activations(x, width, float8=True)
    _float8[(tokens,)](x, result.values, result.scale, width, E4M3_MAX, **_block(width))
    return result


def join(near: tuple[torch.Tensor, torch.Tensor], far: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`packed_attention.join`, without its log-sum-exp."""
    (a, lse_a), (b, lse_b) = near, far
    a, b = a.contiguous(), b.contiguous()
    tokens, n, dim = a.shape
    out = torch.empty_like(a)
    _join[(tokens,)](
        a,
        b,
        lse_a,
        lse_b,
        out,
        *lse_a.stride(),
        *lse_b.stride(),
        HEADS=n,
        DIM=dim,
        BLOCK_HEADS=triton.next_power_of_2(n),
        BLOCK=triton.next_power_of_2(dim),
        num_warps=4,
    )
    return out


def _activations(like: torch.Tensor, width: int, float8: bool) -> Activations:
    values = like.new_empty(len(like), width, dtype=torch.float8_e4m3fn if float8 else like.dtype)
    return Activations(values, like.new_empty(len(like), 1, dtype=torch.float32) if float8 else None)


def _block(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


# ---- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _store(values, y, scales, row, width, at, inside, largest, FLOAT8: tl.constexpr):
    """Float32 ``values`` of a token as they are kept."""
    if FLOAT8:
        scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12) / largest
        tl.store(scales + row, scale)
        values = values / scale
    tl.store(y + row * width + at, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm(
    x, added, weight, total, y, scales, width, epsilon, largest,
    ADDED: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        values += tl.load(added + row * width + at, mask=inside, other=0.0).to(tl.float32)
        kept = values.to(total.dtype.element_ty)
        tl.store(total + row * width + at, kept, mask=inside)
        values = kept.to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / width + epsilon)
    values *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    _store(values, y, scales, row, width, at, inside, largest, FLOAT8)


@triton.jit
def _turned(
    source, weight, cos_first, cos_second, sin_first, sin_second, target, epsilon,
    HEADS: tl.constexpr, DIM: tl.constexpr, NORMED: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """The heads of one kind of one token: [heads, head dim] in two halves."""
    HALF: tl.constexpr = DIM // 2
    at = tl.arange(0, BLOCK_HALF)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    inside = (head < HEADS) & (at < HALF)[None, :]
    place = head * DIM + at[None, :]
    first = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + place + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        factor = tl.rsqrt(squares / DIM + epsilon)[:, None]
        first *= factor * tl.load(weight + at, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
        second *= factor * tl.load(weight + at + HALF, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
    kind = target.dtype.element_ty
    tl.store(target + place, (first * cos_first - second * sin_first).to(kind), mask=inside)
    tl.store(target + place + HALF, (second * cos_second + first * sin_second).to(kind), mask=inside)


@triton.jit
def _heads(
    qkv, q_norm, k_norm, cos, sin, q, k, v, epsilon,
    HEADS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, NORMED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_HALF)
    inside = at < HALF
    cos_first = tl.load(cos + row * DIM + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + row * DIM + at + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + row * DIM + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + row * DIM + at + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    start = qkv + row * (HEADS + 2 * KEYS) * DIM
    _turned(
        start, q_norm, cos_first, cos_second, sin_first, sin_second, q + row * HEADS * DIM, epsilon,
        HEADS, DIM, NORMED, BLOCK_HEADS, BLOCK_HALF,
    )  # fmt: skip
    _turned(
        start + HEADS * DIM, k_norm, cos_first, cos_second, sin_first, sin_second, k + row * KEYS * DIM, epsilon,
        KEYS, DIM, NORMED, BLOCK_KEYS, BLOCK_HALF,
    )  # fmt: skip
    head = tl.arange(0, BLOCK_KEYS)[:, None]
    held = (head < KEYS) & inside[None, :]
    place = head * DIM + at[None, :]
    values = start + (HEADS + KEYS) * DIM
    tl.store(v + row * KEYS * DIM + place, tl.load(values + place, mask=held), mask=held)
    tl.store(v + row * KEYS * DIM + place + HALF, tl.load(values + place + HALF, mask=held), mask=held)


@triton.jit
def _silu_product(gate_up, y, scales, width, largest, FLOAT8: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    _store(gate / (1 + tl.exp(-gate)) * up, y, scales, row, width, at, inside, largest, FLOAT8)


@triton.jit
def _float8(x, y, scales, width, largest, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    _store(
        tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32),
        y, scales, row, width, at, inside, largest, True,
    )  # fmt: skip


@triton.jit
def _join(
    a, b, lse_a, lse_b, out, a_head, a_token, b_head, b_token,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)
    near = tl.load(lse_a + head * a_head + row * a_token, mask=head < HEADS, other=0.0)
    far = tl.load(lse_b + head * b_head + row * b_token, mask=head < HEADS, other=0.0)
    weight = (1 / (1 + tl.exp(far - near)))[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS)[:, None] & (at < DIM)
    place = row * HEADS * DIM + head[:, None] * DIM + at
    first = tl.load(a + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(b + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (first * weight + second * (1 - weight)).to(out.dtype.element_ty), mask=inside)

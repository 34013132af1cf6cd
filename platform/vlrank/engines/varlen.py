"""Kernels for attention within packed documents on GPUs: PyTorch's flash attention, and FlashAttention 4."""

from __future__ import annotations

import inspect
import logging
from functools import cache
from typing import Any

import torch

_log = logging.getLogger(__name__)


def flash2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention within documents by PyTorch's kernel.

    Args:
        query: [T, heads, head dim], bfloat16 or float16.
        key, value: [T, key-value heads, head dim].
        cu_seqlens: int32 [documents + 1], from 0 to T.
        longest: At least the length of the longest document.
        scaling: Factor of the scores; default ``head dim ** -0.5``.

    Returns:
        [T, heads, head dim].
    """
    # PyTorch's module brings its compiler along, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **_flash2_options(scaling, True))


@cache
def _flash2_knows() -> frozenset[str]:
    """Names of its options, which differ between versions of PyTorch."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _flash2_options(scaling: float | None, causal: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": scaling}
    # The interface changed between PyTorch 2.10 and 2.12: newer versions ask for enable_gqa where there are fewer
    # key-value heads than heads, older ones accept that as it is.
    if "window_size" in _flash2_knows():
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    return options | ({"enable_gqa": True} if "enable_gqa" in _flash2_knows() else {})


def flash4(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention within documents by FlashAttention 4.

    Args:
        query: [T, heads, head dim], bfloat16 or float16.
        key, value: [T, key-value heads, head dim].
        cu_seqlens: int32 [documents + 1], from 0 to T.
        longest: At least the length of the longest document.
        scaling: Factor of the scores; default ``head dim ** -0.5``.

    Returns:
        [T, heads, head dim].
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _flash4_forward(query, key, value, cu_seqlens, longest, scale)[0]


@torch.library.custom_op("vlrank::flash4", mutates_args=())
def _flash4_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _flash4(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale, True)


@_flash4_forward.register_fake
def _(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, head_dim = query.shape
    return query.new_empty(tokens, heads, head_dim), query.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("vlrank::flash4_backward", mutates_args=())
def _flash4_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    query_grad, key_grad, value_grad, *_ = _flash_attn_bwd(
        query,
        key,
        value,
        out,
        grad.contiguous(),
        lse,
        softmax_scale=scale,
        causal=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )
    return query_grad.contiguous(), key_grad.contiguous(), value_grad.contiguous()


@_flash4_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, cu_seqlens, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)


def _differentiate(ctx: Any, grad: torch.Tensor, *rest: Any) -> tuple[torch.Tensor | None, ...]:
    return *_flash4_backward(grad, *ctx.saved_tensors, ctx.longest, ctx.scale), None, None, None


_flash4_forward.register_autograd(_differentiate, setup_context=_save)


@cache
def flash4_agrees(heads: int, key_heads: int, head_dim: int, device: torch.device) -> bool:
    """Whether FlashAttention 4 is installed, runs on this GPU and gives what PyTorch's kernels give.

    It is young, and its backward pass for packed documents is reached through functions of its own that may change: so
    it is used only after this comparison, on documents of uneven length with empty ones among them.
    """
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError:
        return False
    generator = torch.Generator(device).manual_seed(0)
    bounds = torch.tensor([0, 1, 130, 700, 700, 1021, 1024, 1024], dtype=torch.int32, device=device)

    def drawn(n: int) -> torch.Tensor:
        return torch.randn(1024, n, head_dim, device=device, dtype=torch.bfloat16, generator=generator)

    inputs, grad = [drawn(heads), drawn(key_heads), drawn(key_heads)], drawn(heads)
    results = []
    for kernel in (flash2, flash4):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        try:
            query, key, value = leaves
            out = kernel(query, key, value, bounds, 640, None)
            out.backward(grad)
        except Exception as error:  # whatever a compiler of kernels may raise
            _log.warning("FlashAttention 4 is not used: %s", error)
            return False
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    # bfloat16 keeps 8 bits: 2^-8 is 0.4%.
    errors = [((a.float() - b.float()).norm() / a.float().norm()).item() for a, b in zip(*results, strict=True)]
    agrees = max(errors) < 0.01
    if not agrees:
        _log.warning("FlashAttention 4 is not used: it differs from PyTorch's attention by %.1f%%", 100 * max(errors))
    return agrees


def flash2_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention from documents of queries to documents of keys by PyTorch's kernel, without a backward pass.

    Args:
        query: [T, heads, head dim], bfloat16 or float16.
        key, value: [K, key-value heads, head dim].
        cu_queries, cu_keys: int32 [documents + 1]; documents may be without queries, not without keys.
        longest_query, longest_key: At least the lengths of the longest documents.
        scaling: Factor of the scores.
        causal: A query sees the keys up to its own place; the documents have as many keys as queries.

    Returns:
        [T, heads, head dim], and the log-sum-exp of the scores, float32 [heads, T].
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    options = _flash2_options(scaling, causal) | {"return_aux": AuxRequest(lse=True)}
    # How keys are split among thread blocks depends on the longest document of the row: a score would as well.
    options |= {"num_splits": 1} if "num_splits" in _flash2_knows() else {}
    out, lse = varlen_attn(query, key, value, cu_queries, cu_keys, longest_query, longest_key, **options)
    return out, lse if lse.shape == (query.shape[1], query.shape[0]) else lse.transpose(0, 1)


def flash4_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash2_lse` by FlashAttention 4."""
    bounds = cu_queries, cu_keys, longest_query, longest_key
    return _flash4(query, key, value, *bounds, scaling, causal, num_splits=1)


def _flash4(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
    causal: bool,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        query,
        key,
        value,
        cu_seqlens_q=cu_queries,
        cu_seqlens_k=cu_keys,
        max_seqlen_q=longest_query,
        max_seqlen_k=longest_key,
        softmax_scale=scaling,
        causal=causal,
        return_lse=True,
        **options,
    )
    return out, lse

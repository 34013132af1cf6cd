"""Attention for packed rows: every document sees itself only.

On GPUs PyTorch's variable-length flash attention does it without a mask, or FlashAttention 4 where it is installed
(1.3 to 1.8 times as fast on an H100); on a CPU each document gets its own call of scaled dot-product attention. All are
told where documents begin by ``packed_cu_seqlens``, an argument that transformers passes through to its attention
functions. Without it the function is plain sdpa.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlrank.training.answers import LastLayer
from vlrank.training.structure import decoder_layers

_log = logging.getLogger(__name__)
NAME = "vlrank_packed"
_VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_cu_seqlens: torch.Tensor | None = None,
    packed_longest: int = 0,
    flash4: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents.

    Args:
        module: The attention layer.
        query: [1, heads, T, head dim].
        key, value: [1, key-value heads, T, head dim].
        attention_mask: Must be None for packed rows.
        scaling: Factor of the scores.
        dropout: Not applied to packed rows; Qwen3 has none.
        packed_cu_seqlens: int32 [documents + 1], from 0 to T; empty documents may end it.
        packed_longest: At least the length of the longest document.
        flash4: Use FlashAttention 4 on a GPU.
        kwargs: What other attention functions take.

    Returns:
        [1, T, heads, head dim], and None for the weights.
    """
    if packed_cu_seqlens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError("packed rows come one at a time and without an attention mask")
    if query.is_cuda and query.dtype != torch.float32:
        q, k, v = (tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value))
        kernel = _flash4 if flash4 else _flash2
        return kernel(q, k, v, packed_cu_seqlens, packed_longest, scaling).unsqueeze(0), None
    bounds = packed_cu_seqlens.tolist()
    parts = [
        sdpa_attention_forward(
            module, *(t[:, :, start:end] for t in (query, key, value)), None, scaling=scaling, is_causal=True
        )[0]
        for start, end in pairwise(bounds)
        if end > start
    ]
    return torch.cat(parts, dim=1), None


def _flash2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    options: dict[str, Any] = {"scale": scaling}
    # The interface changed between PyTorch 2.10 and 2.12. Fewer key heads never needed more than leave to be fewer.
    options |= {"window_size": (-1, 0)} if "window_size" in _VARLEN_OPTIONS else {"is_causal": True}
    options |= {"enable_gqa": True} if "enable_gqa" in _VARLEN_OPTIONS else {}
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)


def _flash4(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _flash4_forward(query, key, value, cu_seqlens, longest, scale)[0]


@torch.library.custom_op("vlrank::flash4", mutates_args=())
def _flash4_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        return_lse=True,
    )
    return out, lse


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
    for kernel in (_flash2, _flash4):
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


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def use_packed_attention(model: Any) -> None:
    """Switch a model's language layers to `packed_attention`; the vision tower keeps its own."""
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, head_dim)
    flash4 = device.type == "cuda" and flash4_agrees(*heads, device)
    name = f"{NAME}_flash4" if flash4 else NAME
    ALL_ATTENTION_FUNCTIONS.register(name, partial(packed_attention, flash4=True) if flash4 else packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _no_mask)
    config._attn_implementation = name


def compile_layers(model: Any, backend: str | Callable[..., Any] = "inductor", *, dynamic: bool = False) -> int:
    """Compile each decoder layer in place (regional compilation): one graph for all layers, small start-up.

    Args:
        model: A plain causal language model or Qwen3-VL.
        backend: Of ``torch.compile``.
        dynamic: For padded batches, whose shapes change.

    Returns:
        How many layers.
    """
    layers = decoder_layers(model)
    for layer in layers:
        if isinstance(layer, LastLayer):
            layer.compile_narrow(backend, dynamic)
        else:
            layer.compile(dynamic=dynamic, backend=backend)
    return len(layers)

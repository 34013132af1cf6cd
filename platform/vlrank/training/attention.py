"""Attention for packed rows: every document sees itself only.

On GPUs PyTorch's variable-length flash attention does it without a mask; on a CPU each document gets its own call of
scaled dot-product attention. Both are told where documents begin by ``packed_cu_seqlens``, an argument that
transformers passes through to its attention functions. Without it the function is plain sdpa.
"""

from __future__ import annotations

import inspect
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "vlrank_packed"


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
        return _flash(q, k, v, packed_cu_seqlens, packed_longest, scaling).unsqueeze(0), None
    bounds = packed_cu_seqlens.tolist()
    parts = [
        sdpa_attention_forward(
            module, *(t[:, :, start:end] for t in (query, key, value)), None, scaling=scaling, is_causal=True
        )[0]
        for start, end in pairwise(bounds)
        if end > start
    ]
    return torch.cat(parts, dim=1), None


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling}
    known = _varlen_options()
    # The interface changed between PyTorch 2.10 and 2.12.
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)


@cache
def _varlen_options() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def use_packed_attention(model: Any) -> None:
    """Switch a model's language layers to `packed_attention`; the vision tower keeps its own."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)
    _varlen_options()  # not inside a compiled layer
    model.config.get_text_config()._attn_implementation = NAME


def compile_layers(model: Any, backend: str = "inductor") -> int:
    """Compile each decoder layer in place (regional compilation): one graph for all layers, small start-up.

    Returns:
        How many layers.
    """
    text = getattr(model.model, "language_model", model.model)
    for layer in text.layers:
        layer.compile(dynamic=False, backend=backend)
    return len(text.layers)

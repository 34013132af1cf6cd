"""Packed rows through Unsloth's layers, which take the lengths of their documents as ``packed_seq_lengths``.

On a GPU Unsloth replaces the forward passes of models. Their attention is a function of its modules, ``run_attention``:
where FlashAttention 2 is not installed and PyTorch is older than 2.12, it takes a row's documents one after the other.
`use_packed_rows` hands them to a kernel of `vlrank.engines.varlen` instead. Without a GPU Unsloth leaves the forward
passes to transformers, and rows are packed as for any other model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from vlrank.engines import varlen
from vlrank.engines.packable import why_not_packed_by_unsloth
from vlrank.engines.structure import decoder_layers
from vlrank.training.attention import NotPackable, heads_of

_PLAIN = {"causal", "dropout_p", "softmax_scale"}
"""Options by which Unsloth's layers ask for causal attention and nothing else."""


def computed_by_unsloth(model: Any) -> bool:
    """Whether Unsloth has replaced the forward pass of the attention layers."""
    return _module_of_attention(model).startswith("unsloth.")


def _module_of_attention(model: Any) -> str:
    attention = getattr(decoder_layers(model)[0], "self_attn", None)
    return "" if attention is None else str(type(attention).forward.__module__)


def use_packed_rows(model: Any, longest: float) -> None:
    """Have a model whose layers Unsloth computes take packed rows through our kernels.

    Args:
        model: A causal language model, on its device.
        longest: Tokens of the longest prompt.

    Raises:
        NotPackable: some layers are not plain causal attention, see `vlrank.engines.packable`.
    """
    config, embedding = model.config.get_text_config(), model.get_input_embeddings().weight
    device, module = embedding.device, sys.modules[_module_of_attention(model)]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        kernel = varlen.flash4 if varlen.flash4_agrees(*heads_of(config), device) else varlen.flash2
        own: Any = module
        own.run_attention = rerouted(getattr(own.run_attention, "before", own.run_attention), kernel)
    # As in training: adapters are float32, the layers compute in the type of the weights.
    half = embedding.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, embedding.dtype) if half else nullcontext():
        kind = why_not_packed_by_unsloth(model, longest)
    if kind:
        raise NotPackable(f"prompts are not packed: {config.model_type} has {kind}", "Set packing: false.")


def rerouted(run_attention: Callable[..., torch.Tensor], kernel: Callable[..., torch.Tensor]) -> Any:
    """Unsloth's ``run_attention``, with packed rows of plain causal attention taken to a kernel of ours.

    Args:
        run_attention: Function of ``config``, ``context`` and [1, heads, T, head dim] queries, keys and values, to
            [1, T, heads, head dim].
        kernel: `varlen.flash2` or one like it.
    """

    def run(*, config: Any, context: Any, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        if not _plain_row(config, context, Q):
            return run_attention(config=config, context=context, Q=Q, K=K, V=V)
        _, bounds, longest = context.seq_info
        query, key, value = (states.squeeze(0).transpose(0, 1) for states in (Q, K, V))
        scaling = (config.flash_varlen_kwargs or {}).get("softmax_scale")
        return kernel(query, key, value, bounds, longest, scaling).unsqueeze(0)

    run.before = run_attention  # type: ignore[attr-defined]
    return run


def _plain_row(config: Any, context: Any, query: torch.Tensor) -> bool:
    options = config.flash_varlen_kwargs or {}
    return (
        context.seq_info is not None
        and query.dtype in (torch.bfloat16, torch.float16)
        and context.attention_mask is None
        and context.is_causal
        and not context.sliding_window
        and context.prefix_seg_info is None
        and context.q_len == context.kv_seq_len
        and set(options) <= _PLAIN
        and not options.get("dropout_p")
    )

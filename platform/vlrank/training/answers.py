"""Computes only the places whose next token is learned, in the output head and in the last decoder layer.

An answer is two or three tokens of a prompt of a thousand. Logits of a whole batch are what fills memory (2048 tokens x
152k words are 1.2 GB in float32 per sample), and no operation after the last layer's keys and values mixes places: its
queries, its output projection and its MLP are needed at the answers alone. That saves almost one layer of the 28 in
Qwen3-0.6B, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import rotate_half

from vlrank.engines.structure import core, decoder_layers

_KNOWN = tuple(
    f"transformers.models.{name}.modeling_{name}" for name in ("qwen3", "qwen3_vl", "qwen2", "qwen2_5_vl", "llama")
)
"""Modules whose decoder layers compute what `LastLayer` computes. Unsloth replaces functions in them."""

_FEW = 8
"""The last layer is narrowed if at most one place in this many is learned: `attend` builds a mask over all keys."""


class AnswerHead:
    """Restricts the end of a model to the places whose next token is learned.

    ``logits_to_keep`` of transformers takes one set of places for all rows of a batch, so the places are picked inside
    the last layer, and where that is not possible right before the head: the same numbers, for padded and packed rows.

    Args:
        model: A causal language model or a vision model, plain or PEFT.
        last_layer: Narrow the last layer too, where its class is known; without it the head alone.
    """

    def __init__(self, model: Any, *, last_layer: bool = True) -> None:
        self.index: torch.Tensor | None = None
        self._picked = False
        core(model).get_output_embeddings().register_forward_pre_hook(self._select)
        self._last = LastLayer(decoder_layers(model)[-1], self) if last_layer and _narrowable(model) else None

    def _select(self, module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.index is None or self._picked:
            return None
        hidden = arguments[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self.index].unsqueeze(0), *arguments[1:])

    def pick(self) -> torch.Tensor:
        """The places, for a layer that returns only them."""
        assert self.index is not None
        self._picked = True
        return self.index

    @contextmanager
    def at(self, index: torch.Tensor) -> Iterator[None]:
        """Within the block logits are [1, n, vocabulary], of ``index`` (int64 [n]) into the flattened batch."""
        self.index, self._picked = index, False
        if self._last is not None:  # the places are unset in the backward pass, and little would be recomputed
            self._last.layer.gradient_checkpointing = False
        try:
            yield
        finally:
            self.index = None


class LastLayer:
    """Replaces the forward pass of a model's last decoder layer: it is computed at the answers' places alone.

    Keys and values are computed at all places. The layer's own forward pass runs if there are no places, if there are
    many, or if there is a mask (as in validation).

    Args:
        layer: Of a class in `_KNOWN`. Its ``forward`` is replaced, and ``narrow`` names this object.
        answers: Knows the places.
    """

    def __init__(self, layer: Any, answers: AnswerHead) -> None:
        self.layer, self.answers, self.whole = layer, answers, layer.forward
        layer.forward, layer.narrow = self.forward, self
        layer.self_attn.queries_apart = True

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[B, T, hidden] -> [1, n, hidden] of the places, or [B, T, hidden]."""
        if not self._is_narrow(hidden_states, *args, **kwargs):
            whole: torch.Tensor = self.whole(hidden_states, *args, **kwargs)
            return whole
        layer, attention = self.layer, self.layer.self_attn
        shape = hidden_states.shape[:2]
        cos, sin = (part.expand(*shape, -1) for part in kwargs["position_embeddings"])
        key, value = self.keys_and_values(hidden_states, cos, sin)
        index = self.answers.pick()
        hidden, cos, sin = (part.flatten(0, 1)[index].unsqueeze(0) for part in (hidden_states, cos, sin))
        projected = attention.q_proj(layer.input_layernorm(hidden))
        query = _rotated(_heads(projected, attention, getattr(attention, "q_norm", None)), cos, sin)
        begin = _beginnings(index, shape[1], kwargs.get("packed_cu_seqlens"))
        hidden = hidden + attention.o_proj(attend(query, key, value, begin, index, attention.scaling))
        narrow: torch.Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return narrow

    def keys_and_values(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, hidden] -> twice [B, key-value heads, T, head dim]; the part that is worth compiling."""
        attention, normed = self.layer.self_attn, self.layer.input_layernorm(hidden)
        key = _heads(attention.k_proj(normed), attention, getattr(attention, "k_norm", None))
        return _rotated(key, cos, sin), _heads(attention.v_proj(normed), attention, None)

    def compile(self, backend: str | Callable[..., Any], dynamic: bool) -> None:
        """Compile what is computed at all places."""
        compiled = torch.compile(self.keys_and_values, dynamic=dynamic, backend=backend)
        self.keys_and_values = compiled  # type: ignore[method-assign]

    def _is_narrow(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any) -> bool:
        index = self.answers.index
        return index is not None and attention_mask is None and index.numel() * _FEW <= hidden.shape[:2].numel()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of a few queries, each to the keys from ``begin`` to ``end`` inclusive.

    Args:
        query: [1, heads, n, head dim].
        key, value: [B, key-value heads, T, head dim].
        begin, end: int64 [n], places in the flattened [B * T].
        scaling: Factor of the scores.

    Returns:
        [1, n, heads * head dim].
    """
    _, heads, n, head_dim = query.shape
    key, value = (part.transpose(0, 1).flatten(1, 2).unsqueeze(0) for part in (key, value))
    key_heads = key.shape[1]
    # Queries of heads that share a key head are consecutive, so keys need not be repeated.
    groups = heads // key_heads
    at = torch.arange(key.shape[2], device=key.device)
    mask = ((at >= begin[:, None]) & (at <= end[:, None])).repeat(groups, 1)
    out = nn.functional.scaled_dot_product_attention(
        query.reshape(1, key_heads, groups * n, head_dim), key, value, attn_mask=mask, scale=scaling
    )
    return out.view(heads, n, head_dim).transpose(0, 1).reshape(1, n, -1)


def _beginnings(index: torch.Tensor, length: int, bounds: torch.Tensor | None) -> torch.Tensor:
    """Where the document of each place begins: a packed one, or a row of the batch."""
    if bounds is None:
        return index // length * length
    return bounds[torch.searchsorted(bounds, index, right=True) - 1]


def _heads(projected: torch.Tensor, attention: Any, norm: nn.Module | None) -> torch.Tensor:
    """[B, T, heads * head dim] -> [B, heads, T, head dim]."""
    split = projected.unflatten(-1, (-1, attention.head_dim))
    return (split if norm is None else norm(split)).transpose(1, 2)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned: torch.Tensor = states * cos.unsqueeze(1) + rotate_half(states) * sin.unsqueeze(1)
    return turned


def _narrowable(model: Any) -> bool:
    """Whether `LastLayer` knows the last layer, and only the norm and the head follow it."""
    config = core(model).config
    layers = decoder_layers(model)
    last = layers[-1]
    deepstack = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", ())
    return (
        type(last).forward.__module__ in _KNOWN
        and type(last.self_attn).forward.__module__ in _KNOWN
        and getattr(last.self_attn, "sliding_window", None) is None
        and not last.self_attn.attention_dropout
        and len(deepstack) < len(layers)
    )


_OWN = ("answer_index", "targets", "cu_seqlens", "longest", "lengths")
"""Entries of a micro-batch that models do not take under this name."""


def token_losses(model: Any, head: AnswerHead, batch: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy in float32 of each learned token of a micro-batch, [n].

    ``use_cache`` is off in every pass: with a cache, packed documents would see each other.
    """
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name not in _OWN}
    if "cu_seqlens" in batch:
        inputs |= {"packed_cu_seqlens": batch["cu_seqlens"], "packed_longest": batch["longest"]}
    if "lengths" in batch:
        inputs["packed_seq_lengths"] = torch.from_numpy(batch["lengths"])
    with head.at(batch["answer_index"]):
        logits = model(**inputs, use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits.float(), batch["targets"], reduction="none")

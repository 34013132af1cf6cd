"""SASRec and BSARec: what a user takes next, from the ids of what came before.

SASRec is Kang and McAuley 2018 (arXiv 1808.09781). BSARec is Shin et al. 2024 (arXiv 2312.10325): each block mixes
self-attention with a frequency filter. Both share one encoder here, post-norm with GELU as in the code of BSARec's
authors; SASRec is the encoder without the filter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlrank.config import SequentialConfig

_INIT_STD = 0.02


class Attention(nn.Module):
    """Causal multi-head self-attention with its residual connection and norm."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """New states, float [B, T, H]; ``allowed`` (bool [B, 1, T, T]) says which positions a position reads."""
        batch, length, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -1e9)
        read = self.dropout(scores.softmax(-1)) @ v
        read = self.out(read.transpose(1, 2).reshape(batch, length, hidden))
        return self.norm(x + self.dropout(read))


class FrequencyFilter(nn.Module):
    """BSARec's frequency rescaling: the low frequencies stay, all others are scaled by a learned factor per feature.

    The low-pass is the discrete Fourier transform over ``max_length`` positions, cut to its first ``c // 2 + 1``
    frequencies and transformed back. That is a fixed linear map of the positions, so a sequence is multiplied by its
    part of this map; places before the first item count as zeros, and no padding has to be computed.
    """

    lowpass: Tensor

    def __init__(self, hidden: int, max_length: int, c: int, dropout: float) -> None:
        super().__init__()
        spectrum = torch.fft.rfft(torch.eye(max_length, dtype=torch.float64), dim=0, norm="ortho")
        spectrum[c // 2 + 1 :] = 0
        lowpass = torch.fft.irfft(spectrum, n=max_length, dim=0, norm="ortho").float()
        self.register_buffer("lowpass", lowpass, persistent=False)  # [max_length, max_length]
        self.sqrt_beta = nn.Parameter(torch.randn(hidden))
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """New states, float [B, T, H]; ``real`` (bool [B, T]) is false before a sequence's first item."""
        length = x.shape[1]
        known = x * real[:, :, None]
        low = self.lowpass[-length:, -length:] @ known
        filtered = low + self.sqrt_beta.square() * (known - low)
        return self.norm(x + self.dropout(filtered))


class Block(nn.Module):
    """Attention, mixed with the frequency filter where there is one, and a feed-forward layer."""

    def __init__(self, model: SequentialConfig, *, filtered: bool) -> None:
        super().__init__()
        self.alpha = model.alpha
        self.attention = Attention(model.hidden, model.heads, model.dropout)
        self.filter = FrequencyFilter(model.hidden, model.max_length, model.c, model.dropout) if filtered else None
        self.expand = nn.Linear(model.hidden, 4 * model.hidden)
        self.reduce = nn.Linear(4 * model.hidden, model.hidden)
        self.norm = nn.LayerNorm(model.hidden)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x: Tensor, real: Tensor, allowed: Tensor) -> Tensor:
        """New states, float [B, T, H]."""
        mixed = self.attention(x, allowed)
        if self.filter is not None:
            mixed = self.alpha * self.filter(x, real) + (1 - self.alpha) * mixed
        fed = self.reduce(nn.functional.gelu(self.expand(mixed)))
        return self.norm(mixed + self.dropout(fed))


class SequenceModel(nn.Module):
    """An encoder of item sequences whose states are scored against the item embeddings.

    Args:
        n_items: Items have ids 1..n_items; 0 is "no item".
        model: Sizes.
        filtered: Whether blocks hold the frequency filter (BSARec) or not (SASRec).
    """

    def __init__(self, n_items: int, model: SequentialConfig, *, filtered: bool) -> None:
        super().__init__()
        self.max_length = model.max_length
        self.from_start = model.samples == "histories"
        self.items = nn.Embedding(n_items + 1, model.hidden, padding_idx=0)
        self.positions = nn.Embedding(model.max_length, model.hidden)
        self.norm = nn.LayerNorm(model.hidden)
        self.dropout = nn.Dropout(model.dropout)
        self.blocks = nn.ModuleList(Block(model, filtered=filtered) for _ in range(model.layers))
        self.apply(_initialise)

    def forward(self, items: Tensor) -> Tensor:
        """States after each item, float [B, T, H].

        Args:
            items: int64 [B, T], T at most ``max_length``: oldest first, 0 before a sequence's first item.
        """
        length = items.shape[1]
        real = items > 0
        causal = torch.ones(length, length, dtype=torch.bool, device=items.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=items.device)  # places without an item read something too
        allowed = (causal & real[:, None, :] | itself)[:, None]
        x = self.dropout(self.norm(self.items(items) + self._positions(real)))
        for block in self.blocks:
            x = block(x, real, allowed)
        return x

    def _positions(self, real: Tensor) -> Tensor:
        """Position embeddings, float [T, H] or [B, T, H].

        They count from a sequence's last item, as in the papers. What learns from all places of a history counts from
        its first item: a state amid the history is then the very state that its prefix has when lists are made.
        """
        if self.from_start:
            return self.positions((real.cumsum(1) - 1).clamp(min=0))
        return self.positions.weight[-real.shape[1] :]

    def scores(self, states: Tensor) -> Tensor:
        """Scores of all items for states [N, H]: float [N, n_items + 1]; column 0 means nothing."""
        return states @ self.items.weight.T


def _initialise(module: Any) -> None:
    """Normal weights of one small spread for all layers, as both papers' codes do."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx] = 0

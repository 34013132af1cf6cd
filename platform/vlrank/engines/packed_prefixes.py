"""Keys and values of prefixes, which rows that continue them read: places of one piece of memory that never moves.

So a pass that writes or reads prefixes can be recorded (`vlrank.engines.packed_graphs`): which places it means is among
the numbers that each row brings along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlrank.engines.packed_rows import Int

if TYPE_CHECKING:
    from vlrank.engines.packed_attention import RowAttention
    from vlrank.engines.packed_model import PackedModel

WRITTEN, READ = "prefix places written", "prefix places read"
"""Names of the numbers, see `RowAttention.tensors`."""


class PrefixMemory:
    """Memory for the keys and values of so many tokens.

    Args:
        model: Whose they are.
        tokens: How many.

    Raises:
        torch.OutOfMemoryError: the device has no room for it.
    """

    def __init__(self, model: PackedModel, tokens: int) -> None:
        self.tokens = self.nobodys = tokens  # the last place takes what is written for filling
        shape = len(model.layers), 2, tokens + 1, model.sizes.key_heads, model.sizes.head_dim
        self._memory = torch.empty(shape, dtype=model.dtype, device=model.device)
        self._free = np.arange(tokens)
        self.free = tokens

    @staticmethod
    def token_bytes(model: PackedModel) -> int:
        """Memory of one token."""
        numbers = len(model.layers) * 2 * model.sizes.key_heads * model.sizes.head_dim
        return numbers * torch.empty(0, dtype=model.dtype).element_size()

    def take(self, tokens: int) -> Int:
        """Places for so many tokens, of which as many are `free`."""
        assert tokens <= self.free
        self.free -= tokens
        return self._free[self.free : self.free + tokens].copy()

    def give(self, places: Int) -> None:
        """Take places back. What was launched before still finds what it reads: launches have one order."""
        self._free[self.free : self.free + len(places)] = places
        self.free += len(places)

    def writer(self, attention: RowAttention) -> Callable[[int, torch.Tensor, torch.Tensor], None]:
        """`PackedModel.forward`'s ``store``: puts keys and values of all tokens of a row in its places."""
        places = attention.tensors[WRITTEN]

        def store(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            self._memory[layer, 0].index_copy_(0, places, keys[: len(places)])
            self._memory[layer, 1].index_copy_(0, places, values[: len(places)])

        return store

    def reader(self, attention: RowAttention) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
        """`PackedModel.forward`'s ``context``: keys and values of a row's prefixes."""
        places = attention.tensors[READ]

        def context(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = self._memory[layer].index_select(1, places)
            return keys, values

        return context

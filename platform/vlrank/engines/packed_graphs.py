"""Passes over packed rows as CUDA graphs: a row takes one launch instead of a thousand.

Step by step a CPU needs some 50 ms to launch a pass through 28 layers, whatever the row's length. So the launches of a
shape of rows are recorded when it comes for the second time, and replayed for further rows with other numbers in the
same places. Kernels and sizes are those of a pass that is launched step by step, and so are the results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
import torch

from vlrank.cuda_graphs import Record, Recordings
from vlrank.engines import varlen
from vlrank.engines.packed_attention import Context, Kernel, RowAttention, arrays_of, documents_behind
from vlrank.engines.packed_model import PackedModel
from vlrank.engines.packed_prefixes import READ, WRITTEN, PrefixMemory
from vlrank.engines.packed_rows import Int, PackedRow, RowShape, padded

_KEPT = 32
_FEATURE_BYTES = 2**28  # pictures of longer rows, which are not held up by launching, are not copied once more


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What a row has to do with prefixes.

    Attributes:
        memory: Where their keys and values lie.
        places: Those of the row's tokens, which are prefixes; or, where the row continues prefixes, of theirs.
        context: Of the row's prompts; None where the row's tokens are prefixes.
    """

    memory: PrefixMemory
    places: Int
    context: Context | None = None


class RowPasses:
    """Forward passes over rows.

    Args:
        model: Computes them.
        kernel: For attention; without one rows are not padded.
        record: `CudaGraphs`; None launches every pass step by step.
    """

    def __init__(self, model: PackedModel, kernel: Kernel | None, record: Record | None = None) -> None:
        self._model, self._kernel = model, kernel
        self.recordings: Recordings[tuple[RowAttention, torch.Tensor | None]] = Recordings("ranking", record, _KEPT)

    def __call__(
        self, row: PackedRow, features: torch.Tensor | None = None, prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """`PackedModel.forward`."""
        shape = self._shape(row, features, prefixes)

        def inputs() -> tuple[RowAttention, torch.Tensor | None]:
            return self._attention(row, prefixes, shape), _padded_features(features, shape)

        def prepare() -> tuple[tuple[RowAttention, torch.Tensor | None], Callable[[], torch.Tensor]]:
            held = inputs()
            return held, lambda: self._compute(*held, prefixes)

        recording = None if shape is None else self.recordings.get(shape, prepare)
        if recording is None:
            return self._compute(*inputs(), prefixes)
        attention, held_features = recording.held
        context = None if prefixes is None else prefixes.context
        attention.tensors.renew(arrays_of(row, context, shape, _places(row, prefixes, shape)))
        if features is not None and held_features is not None:
            held_features[: len(features)].copy_(features)
        recording.replay()
        return recording.result.clone()  # which the next replay overwrites

    def _shape(self, row: PackedRow, features: torch.Tensor | None, prefixes: Prefixes | None) -> RowShape | None:
        context = None if prefixes is None else prefixes.context
        behind = () if context is None else (documents_behind(row, context)["context"],)
        if self._kernel is None or (shape := RowShape.of(row, *behind)) is None:
            return None
        if features is not None and shape.visual * features.shape[1] * features.element_size() > _FEATURE_BYTES:
            return None
        # FlashAttention 4 launches by the number of tokens: to it, all bounds of a document's length are one.
        if self._kernel is varlen.flash4_lse:
            return replace(shape, longest=shape.tokens, longest_prefix=shape.context, longest_behind=shape.tokens)
        return shape

    def _attention(self, row: PackedRow, prefixes: Prefixes | None, shape: RowShape | None) -> RowAttention:
        context = None if prefixes is None else prefixes.context
        more = _places(row, prefixes, shape)
        return RowAttention(row, self._model.device, self._model.scaling, self._kernel, context, shape, more)

    def _compute(
        self, attention: RowAttention, features: torch.Tensor | None, prefixes: Prefixes | None
    ) -> torch.Tensor:
        if prefixes is None:
            return self._model.forward(attention, features)
        if prefixes.context is None:
            return self._model.forward(attention, features, store=prefixes.memory.writer(attention))
        return self._model.forward(attention, features, context=prefixes.memory.reader(attention))


def _places(row: PackedRow, prefixes: Prefixes | None, shape: RowShape | None) -> dict[str, npt.NDArray[Any]]:
    """Places of prefixes by name, padded to a shape with the one that is nobody's."""
    if prefixes is None:
        return {}
    name, size = (WRITTEN, row.size) if prefixes.context is None else (READ, shape.context if shape else 0)
    return {name: prefixes.places if shape is None else padded(prefixes.places, size, prefixes.memory.nobodys)}


def _padded_features(features: torch.Tensor | None, shape: RowShape | None) -> torch.Tensor | None:
    if features is None or shape is None:
        return features
    held = features.new_zeros(shape.visual, features.shape[1])
    held[: len(features)] = features
    return held

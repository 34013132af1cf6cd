"""Passes over packed rows as CUDA graphs: a row takes one launch instead of a thousand.

Step by step a CPU needs some 50 ms to launch a pass through 28 layers, whatever the row's length. So the launches of a
shape of rows are recorded when it comes for the second time, and replayed for further rows with other numbers in the
same places. Kernels and sizes are those of a pass that is launched step by step, and so are the results.

Rows that continue prefixes, whose keys and values lie in a new place each time, are launched step by step.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vlrank.engines import varlen
from vlrank.engines.packed_attention import Kernel, RowAttention
from vlrank.engines.packed_model import PackedModel
from vlrank.engines.packed_rows import PackedRow, RowShape

Record = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""A function without arguments -> what replays its launches, and its result, which every replay renews."""

_KEPT = 16  # graphs; each takes some MB beside the memory for activations, which they share
_FEATURE_BYTES = 2**28  # pictures of longer rows, which are not held up by launching, are not copied once more


@dataclass(slots=True)
class _Recorded:
    attention: RowAttention
    features: torch.Tensor | None
    replay: Callable[[], None]
    hidden: torch.Tensor


class RowPasses:
    """Forward passes over rows without prefixes.

    Args:
        model: Computes them.
        kernel: For attention; without one rows are not padded.
        record: `CudaGraphs`; None launches every pass step by step.
    """

    def __init__(self, model: PackedModel, kernel: Kernel | None, record: Record | None = None) -> None:
        self._model, self._kernel, self._record = model, kernel, record
        self._met: set[RowShape] = set()
        self._recorded: OrderedDict[RowShape, _Recorded] = OrderedDict()

    def __call__(self, row: PackedRow, features: torch.Tensor | None = None) -> torch.Tensor:
        """`PackedModel.forward`, of rows without prefixes."""
        shape = self._shape(row, features)
        recorded = None if shape is None else self._recording(row, features, shape)
        if recorded is None:
            return self._model.forward(self._attention(row, shape), _padded(features, shape))
        recorded.attention.tensors.renew(row.arrays(shape))
        if features is not None and recorded.features is not None:
            recorded.features[: len(features)].copy_(features)
        recorded.replay()
        return recorded.hidden.clone()  # which the next replay overwrites

    def clear(self) -> None:
        """Give the memory of all recorded passes back."""
        self._recorded.clear()
        self._met.clear()

    def _shape(self, row: PackedRow, features: torch.Tensor | None) -> RowShape | None:
        if self._kernel is None or (shape := RowShape.of(row)) is None:
            return None
        if features is not None and shape.visual * features.shape[1] * features.element_size() > _FEATURE_BYTES:
            return None
        # FlashAttention 4 launches by the number of tokens: to it, all bounds of a document's length are one.
        return replace(shape, longest=shape.tokens) if self._kernel is varlen.flash4_lse else shape

    def _attention(self, row: PackedRow, shape: RowShape | None) -> RowAttention:
        return RowAttention(row, self._model.device, self._model.scaling, self._kernel, shape=shape)

    def _recording(self, row: PackedRow, features: torch.Tensor | None, shape: RowShape) -> _Recorded | None:
        """That of a shape, made when it comes for the second time; None where the pass is launched step by step."""
        if self._record is None:
            return None
        if shape not in self._met:  # what is compiled or chosen when it runs for the first time cannot be recorded
            self._met.add(shape)
            return None
        if shape in self._recorded:
            self._recorded.move_to_end(shape)
            return self._recorded[shape]
        attention, held = self._attention(row, shape), _padded(features, shape)
        try:
            replay, hidden = self._record(lambda: self._model.forward(attention, held))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            print(f"ranking is slower than it could be: a pass cannot be recorded ({error})", flush=True)
            self._record = None
            return None
        if len(self._recorded) >= _KEPT:
            self._recorded.popitem(last=False)
        self._recorded[shape] = _Recorded(attention, held, replay, hidden)
        return self._recorded[shape]


def _padded(features: torch.Tensor | None, shape: RowShape | None) -> torch.Tensor | None:
    if features is None or shape is None:
        return features
    held = features.new_zeros(shape.visual, features.shape[1])
    held[: len(features)] = features
    return held


class CudaGraphs:
    """`Record` on GPUs. All graphs share the memory of their activations: one is replayed at a time."""

    _recording = threading.Lock()

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Record what ``compute`` launches.

        Raises:
            RuntimeError: something in it cannot be recorded.
            torch.OutOfMemoryError: the GPU's memory is full.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads go on allocating and launching meanwhile.
        with self._recording, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()
        return graph.replay, result

"""CUDA graphs: what was launched kernel by kernel is launched again as one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Held = TypeVar("Held")

Record = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""A function without arguments -> what replays its launches, and its result, which every replay renews."""


@dataclass(frozen=True, slots=True)
class Recording(Generic[Held]):
    """A computation that was recorded.

    Attributes:
        held: Its inputs, in places that it goes on reading.
        replay: Launches it again.
        result: Every replay renews it.
    """

    held: Held
    replay: Callable[[], None]
    result: torch.Tensor


class Recordings(Generic[Held]):
    """Recordings of one computation by the shape of its inputs.

    Args:
        work: What is slower without them, for a message.
        record: `CudaGraphs`; None records nothing.
        most: Recordings kept; each has some MB beside the memory for what is computed in between, which they share.
    """

    def __init__(self, work: str, record: Record | None, most: int) -> None:
        self._work, self._record, self._most = work, record, most
        self._met: set[Hashable] = set()
        self.kept: OrderedDict[Hashable, Recording[Held]] = OrderedDict()

    def get(
        self, shape: Hashable, prepare: Callable[[], tuple[Held, Callable[[], torch.Tensor]]]
    ) -> Recording[Held] | None:
        """That of a shape, made when it comes for the second time; None where this computation is to be launched.

        Args:
            shape: Of the inputs.
            prepare: Gives inputs in places of their own, and what computes with them.
        """
        if self._record is None:
            return None
        if shape not in self._met:  # what is compiled or chosen when it runs for the first time cannot be recorded
            self._met.add(shape)
            return None
        if shape not in self.kept:
            held, compute = prepare()
            try:
                recording = Recording(held, *self._record(compute))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                print(f"{self._work} is slower than it could be: it cannot be recorded ({error})", flush=True)
                self._record = None
                return None
            if len(self.kept) >= self._most:
                self.kept.popitem(last=False)
            self.kept[shape] = recording
        self.kept.move_to_end(shape)
        return self.kept[shape]

    def clear(self) -> None:
        """Give the memory of all recordings back."""
        self.kept.clear()
        self._met.clear()


class CudaGraphs:
    """`Record` on GPUs. All graphs share the memory of what they compute in between: one is replayed at a time."""

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

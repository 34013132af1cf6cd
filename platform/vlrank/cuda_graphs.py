"""CUDA graphs: what was launched kernel by kernel is launched again as one."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

Record = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""A function without arguments -> what replays its launches, and its result, which every replay renews."""


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

"""What a vision tower makes of pictures, computed once per picture and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlrank.engines.families.family import VisionFamily
from vlrank.engines.packed_attention import Kernel, kernel_for, sent
from vlrank.prompting.encoding import Encoder, Grid

Patches = npt.NDArray[np.uint8]

_PASS = 16384  # patches per pass of the tower on a GPU: 83 pictures of 224x224
_FILLING = 256
_THREADS = 8
_NAME = "vlrank_flash_pictures"  # transformers hands bounds of pictures to functions that are called flash


class PictureFeatures:
    """Features of pictures, [visual tokens, (1 + D) * hidden]: the tower's output, then its deepstack layers'.

    A picture's features do not depend on its neighbours: on a GPU every pass of the tower has the same number of
    patches, elsewhere every picture has a pass of its own.

    Args:
        family: Of the model.
        visual: transformers' tower.
        on_device: Bytes kept on the tower's device; the rest goes to the host's memory.
        on_host: Bytes kept there (pinned on GPU machines); beyond it the pictures used longest ago are dropped.
    """

    def __init__(self, family: VisionFamily, visual: Any, on_device: int, on_host: int) -> None:
        self._family = family
        self._visual, self._room, self._host_room = visual, on_device, on_host
        weight = next(visual.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._prepared: dict[str, Patches | OSError | ValueError] = {}
        self._preparing = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "pictures")
        config = visual.config
        size = config.hidden_size // config.num_heads
        if kernel := kernel_for(config.num_heads, config.num_heads, size, self._device, self._dtype):
            ALL_ATTENTION_FUNCTIONS.register(_NAME, _PictureAttention(kernel))
            config._attn_implementation = _NAME

    def prepare(self, encoder: Encoder, paths: Iterable[str]) -> None:
        """Read the pictures whose features are missing, in threads; may be called from any thread."""
        with self._preparing:  # two callers would read the same pictures
            missing = [path for path in dict.fromkeys(paths) if not self._ready(path)]
            for path, patches in zip(missing, self._threads.map(lambda p: _read(encoder, p), missing), strict=True):
                self._prepared[path] = patches

    def check(self, paths: Iterable[str]) -> None:
        """Raise what `prepare` met.

        Raises:
            OSError, ValueError: a picture cannot be read.
        """
        for path in paths:
            if isinstance(error := self._prepared.get(path), Exception):
                raise error

    def __call__(self, encoder: Encoder, paths: Sequence[str]) -> torch.Tensor:
        """Features of pictures, one behind the other; repetitions are allowed.

        Raises:
            OSError, ValueError: a picture cannot be read.
        """
        missing = [path for path in dict.fromkeys(paths) if path not in self._kept]
        # Usually the callers have read them all; a caller that is reading others must not hold up the GPU.
        if unread := [path for path in missing if not self._ready(path)]:
            self.prepare(encoder, unread)
            self.check(unread)
        fresh: dict[str, torch.Tensor] = {}
        for group in self._passes(encoder, missing):
            prepared: list[Any] = [self._prepared.pop(path) for path in group]
            for path, features in zip(group, self._compute(encoder, prepared, map(encoder.grid, group)), strict=True):
                fresh[path] = features
        held = [fresh[path] if path in fresh else self._kept[path] for path in paths]
        for path in paths:
            if path in self._kept:
                self._kept.move_to_end(path)
        for path, features in fresh.items():
            self._keep(path, features)
        return torch.cat([features.to(self._device, non_blocking=True) for features in held])

    def _ready(self, path: str) -> bool:
        return path in self._kept or isinstance(self._prepared.get(path), np.ndarray)

    def _passes(self, encoder: Encoder, paths: Iterable[str]) -> Iterator[list[str]]:
        group: list[str] = []
        room = 0
        for path in paths:
            size = int(np.prod(encoder.grid(path)))
            if group and (size > room or self._device.type != "cuda"):
                yield group
                group = []
            room = (room if group else _PASS) - size
            group.append(path)
        if group:
            yield group

    def _compute(self, encoder: Encoder, patches: Sequence[Patches], grids: Iterable[Grid]) -> list[torch.Tensor]:
        stacked, shapes = np.concatenate(patches), list(grids)
        merge = encoder.image_processor.merge_size**2
        lengths = [int(np.prod(grid)) // merge for grid in shapes]
        if self._device.type == "cuda":
            rest = _PASS - len(stacked)
            while rest > 0:
                part = min(rest, _FILLING)
                shapes.append((1, 2, part // 2))
                rest -= part
            stacked = np.pad(stacked, ((0, max(0, _PASS - len(stacked))), (0, 0)))
        mean, deviation = (sent(part, self._device) for part in encoder.pixel_scale)
        pixels = (sent(stacked, self._device).float() - mean) / deviation
        with torch.no_grad():
            output = self._visual(
                pixels.to(self._dtype), grid_thw=sent(np.asarray(shapes), self._device), return_dict=True
            )
        whole = self._family.features(output)
        return [part.clone() for part in whole[: sum(lengths)].split(lengths)]

    def _keep(self, path: str, features: torch.Tensor) -> None:
        self._prepared.pop(path, None)  # another caller may have read it meanwhile
        size = features.numel() * features.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[path] = features
            return
        if self._device.type == "cuda":
            features = features.cpu().pin_memory()
        self._kept[path] = features
        self._host_room -= size
        while self._host_room < 0 and len(self._kept) > 1:
            oldest, dropped = next(iter(self._kept.items()))
            del self._kept[oldest]
            size = dropped.numel() * dropped.element_size()
            if dropped.device == self._device and self._device.type == "cuda":
                self._room += size
            else:
                self._host_room += size


class _PictureAttention:
    """Attention of the tower, all pictures of a pass in one call."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        cu_seq_lens_q: torch.Tensor,
        max_length_q: int | torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        bounds = cu_seq_lens_q.to(torch.int32)
        out, _ = self._kernel(q, k, v, bounds, bounds, int(max_length_q), int(max_length_q), scaling, False)
        return out.unsqueeze(0), None


def _read(encoder: Encoder, path: str) -> Patches | OSError | ValueError:
    try:
        return encoder.patches(path)
    except (OSError, ValueError) as error:
        return error

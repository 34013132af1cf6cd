"""Pictures for micro-batches: prepared pixels, or features of a frozen vision tower computed once and memory-mapped."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vlrank.data.tables import atomic_write_json, disk_errors
from vlrank.prompting.encoding import Encoder

if TYPE_CHECKING:
    import torch

_AT_ONCE = 16  # pictures per pass of the tower


class Pixels:
    """Prepared pictures, float32 [patches, patch values]; the encoder keeps the most recent in memory."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __call__(self, paths: Sequence[str]) -> torch.Tensor:
        """``pixel_values`` of the pictures, concatenated."""
        import torch

        return torch.from_numpy(np.concatenate([self._encoder.pixels(path) for path in paths]))


class Features:
    """Cached features, [visual tokens, (1 + D) * hidden], read from a memory-mapped file.

    Args:
        folder: Made by `compute_features`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self._spans: dict[str, tuple[int, int]] = {path: (start, end) for path, start, end in index["spans"]}
        self._width, self._dtype, self._rows = index["width"], index["dtype"], index["rows"]
        self._table: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, path: str) -> bool:
        return path in self._spans

    def __getstate__(self) -> dict[str, Any]:
        # A loader process maps the file itself instead of receiving a copy of it.
        return {**self.__dict__, "_table": None}

    def __call__(self, paths: Sequence[str]) -> torch.Tensor:
        """``pixel_values`` of the pictures, concatenated."""
        import torch

        if self._table is None:
            dtype = getattr(torch, self._dtype)
            flat = torch.from_file(
                str(self._folder / "features.bin"), shared=False, size=self._rows * self._width, dtype=dtype
            )
            self._table = flat.view(self._rows, self._width)
        return torch.cat([self._table[slice(*self._spans[path])] for path in paths])


class FeatureEncoder(Encoder):
    """An encoder whose pictures are cached features: what `score_labels` feeds a model that accepts them."""

    def __init__(self, encoder: Encoder, features: Features) -> None:
        super().__init__(encoder.tokenizer, encoder.spec, encoder.ranking, encoder.image_processor)
        self._features = features

    def pixels(self, path: str) -> npt.NDArray[np.float32]:
        """Cached features of a picture, float32 [visual tokens, (1 + D) * hidden]."""
        return self._features([path]).float().numpy()


def compute_features(model: Any, encoder: Encoder, paths: Sequence[str], folder: Path) -> tuple[Features, list[str]]:
    """The features of ``paths``: read from ``folder``, or computed and committed there by one rename.

    Args:
        model: A vision model whose tower does not change.
        encoder: Of that model.
        paths: Pictures, each once.
        folder: Named after everything the features depend on, see `vlrank.training.model.tower_key`.

    Returns:
        The features, and the pictures that could not be read.
    """
    if not (folder / "index.json").is_file():
        draft = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        try:
            with disk_errors(folder):
                draft.mkdir(parents=True)
                _write_features(model, encoder, paths, draft)
            draft.rename(folder)
        except OSError:
            if not (folder / "index.json").is_file():  # else another process was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    bad = json.loads((folder / "index.json").read_text(encoding="utf-8"))["bad"]
    return Features(folder), bad


def _write_features(model: Any, encoder: Encoder, paths: Sequence[str], folder: Path) -> None:
    import torch

    from vlrank.training.model import image_features

    spans: list[tuple[str, int, int]] = []
    row, width, dtype, bad = 0, 0, "float32", []
    with open(folder / "features.bin", "wb") as file:
        for start in range(0, len(paths), _AT_ONCE):
            readable = []
            for path in paths[start : start + _AT_ONCE]:
                try:
                    encoder.pixels(path)
                    readable.append(path)
                except (OSError, ValueError):
                    bad.append(path)
            if not readable:
                continue
            features = image_features(model, encoder, readable).cpu().contiguous()
            width, dtype = features.shape[1], str(features.dtype).removeprefix("torch.")
            file.write(features.view(torch.uint8).numpy().tobytes())
            for path in readable:
                tokens = encoder.visual_tokens(encoder.grid(path))
                spans.append((path, row, row + tokens))
                row += tokens
        file.flush()
        os.fsync(file.fileno())
    index = {"spans": spans, "width": width, "dtype": dtype, "rows": row, "bad": bad}
    atomic_write_json(folder / "index.json", index)

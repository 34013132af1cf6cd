"""From samples to tensors: rows (one prompt with its answer), and micro-batches of rows side by side or end to end.

A micro-batch is a dict of tensors:

==================  =======================================================================================
``input_ids``       int64 [B, T]; the last token of an answer is predicted and never read, so it is left out
``position_ids``    int64 [B, T] for text models; [4, B, T] for vision models: text positions, then time, row, column
``answer_index``    int64 [n]: places in the flattened [B * T] whose next token is learned
``targets``         int64 [n]: those next tokens
``pixel_values``    float [patches, patch values], or cached features [visual tokens, (1 + D) * hidden]
``image_grid_thw``  int64 [pictures, 3]
``cu_seqlens``      int32 [documents + 1], packed rows only: where documents begin and end
``longest``         int, packed rows only: no document is longer
``lengths``         int32 NumPy array [documents], instead of these two for Unsloth, which wants it on the host
==================  =======================================================================================

Rows are padded on the right and no attention mask is passed: attention is causal, so padding is never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from vlrank.prompting.encoding import Encoded, Encoder, Grid

Pictures = Callable[[Sequence[str]], "torch.Tensor"]
"""Paths -> their ``pixel_values`` (pixels or cached features), concatenated."""

MicroBatch = dict[str, Any]

ANSWER_ROOM = 16
"""Tokens that an answer may add to a prompt of the longest allowed length."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with (part of) its answer.

    Attributes:
        ids: int64 [T], what the model reads.
        positions: int64 [3, T], rotary positions (time, row, column); equal rows without pictures.
        places: int64 [n], positions in ``ids`` whose next token is learned.
        targets: int64 [n], those tokens.
        image_paths, grids: Pictures in order.
    """

    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    image_paths: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def answer_row(encoder: Encoder, encoded: Encoded, label: int, loss: Literal["answer", "all"] = "answer") -> Row:
    """A training row.

    Args:
        encoder: Made ``encoded``.
        encoded: The prompt.
        label: 1-based position of the target.
        loss: ``answer`` learns the number and the end token; ``all`` also every text token of the prompt.
    """
    answer = encoded.answer_ids(label - 1)
    row = _row(encoder, encoded, tuple(answer[:-1]))
    after = np.concatenate([row.ids[1:], [answer[-1]]])
    places = np.arange(len(encoded.ids) - 1, len(row))
    if loss == "all":
        places = np.arange(len(row))
        if encoded.grids:  # the placeholders of pictures are no text to learn
            places = places[after != encoder.image_token_id]
    return Row(row.ids, row.positions, places, after[places], row.image_paths, row.grids)


def _row(encoder: Encoder, encoded: Encoded, extra: tuple[int, ...]) -> Row:
    ids = np.asarray([*encoded.ids, *extra], dtype=np.int64)
    positions = encoder.positions(encoded)
    after = positions.max(initial=-1) + 1 + np.arange(len(extra))
    positions = np.concatenate([positions, np.tile(after, (3, 1))], axis=1)
    return Row(
        ids, positions, np.array([len(ids) - 1]), np.zeros(1, dtype=np.int64), encoded.image_paths, encoded.grids
    )


def side_by_side(rows: Sequence[Row], *, vision: bool, pad_id: int, pictures: Pictures | None = None) -> MicroBatch:
    """Rows as a padded batch [len(rows), longest]."""
    import torch

    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    rotary = np.tile(np.arange(longest), (3, len(rows), 1))
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        rotary[:, i, : len(row)] = row.positions
    # Text positions continue through the padding: a restart would mark a new packed document.
    text = np.tile(np.arange(longest), (len(rows), 1))
    batch = _batch(ids, text, rotary, vision)
    batch["answer_index"] = torch.from_numpy(np.concatenate([i * longest + row.places for i, row in enumerate(rows)]))
    batch["targets"] = torch.from_numpy(np.concatenate([row.targets for row in rows]))
    return batch | _pictures(rows, pictures)


def end_to_end(
    rows: Sequence[Row],
    *,
    vision: bool,
    pad_id: int,
    length: int | None = None,
    documents: int | None = None,
    longest: int | None = None,
    pictures: Pictures | None = None,
    lengths: bool = False,
) -> MicroBatch:
    """Rows packed back to back into one row [1, T].

    Args:
        rows: What to pack.
        vision: Whether positions are a vision model's [4, 1, T].
        pad_id: Fills the row up to ``length``; the padding is a document of its own.
        length: T; None packs without filling.
        documents: Rows that a packed row may hold: ``cu_seqlens`` is padded by empty documents to a static shape.
        longest: Length that no row exceeds, for the attention kernel; the padding is cut to it. Default T.
        pictures: Loads the rows' pictures.
        lengths: Give ``lengths`` instead of ``cu_seqlens`` and ``longest``.
    """
    import torch

    filled = sum(len(row) for row in rows)
    length = length or filled
    if filled > length:
        raise ValueError(f"{filled} tokens do not fit a packed row of {length}")
    longest = longest or length
    rest = length - filled
    filling = [min(longest, rest - start) for start in range(0, rest, longest)]
    ends = np.cumsum([*(len(row) for row in rows), *filling])
    starts = np.concatenate([[0], ends[:-1]])
    ids = np.concatenate([*(row.ids for row in rows), np.full(rest, pad_id)])[None]
    text = np.concatenate([*(np.arange(len(row)) for row in rows), *(np.arange(part) for part in filling)])[None]
    rotary = np.concatenate(
        [*(row.positions for row in rows), *(np.tile(np.arange(part), (3, 1)) for part in filling)], axis=1
    )[:, None]
    batch = _batch(ids, text, rotary, vision)
    batch["answer_index"] = torch.from_numpy(
        np.concatenate([start + row.places for start, row in zip(starts, rows, strict=False)])
    )
    batch["targets"] = torch.from_numpy(np.concatenate([row.targets for row in rows]))
    bounds = np.concatenate([[0], ends]).astype(np.int32)
    if lengths:
        return batch | {"lengths": np.diff(bounds)} | _pictures(rows, pictures)
    if documents is not None:
        most = documents + -(-length // longest) + 1
        bounds = np.pad(bounds, (0, max(0, most - len(bounds))), constant_values=length)
    batch["cu_seqlens"] = torch.from_numpy(bounds)
    batch["longest"] = longest
    return batch | _pictures(rows, pictures)


def _batch(
    ids: npt.NDArray[np.int64], text: npt.NDArray[np.int64], rotary: npt.NDArray[np.int64], vision: bool
) -> MicroBatch:
    import torch

    positions = np.concatenate([text[None], rotary]) if vision else text
    return {
        "input_ids": torch.from_numpy(np.ascontiguousarray(ids)),
        "position_ids": torch.from_numpy(np.ascontiguousarray(positions)),
    }


def _pictures(rows: Sequence[Row], pictures: Pictures | None) -> MicroBatch:
    import torch

    paths = [path for row in rows for path in row.image_paths]
    if not paths:
        return {}
    if pictures is None:
        raise ValueError("rows with pictures need a loader for them")
    grids = [grid for row in rows for grid in row.grids]
    return {"pixel_values": pictures(paths), "image_grid_thw": torch.tensor(grids, dtype=torch.int64)}

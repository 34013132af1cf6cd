"""Optimizer steps as data: which samples a step learns from, which rank reads them, and as which micro-batches.

A step depends only on (seed, epoch, step) and the global batch size. Ranks divide it among themselves, so the number of
workers, the micro-batch and the packing change nothing but speed and memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlrank.prompting.encoding import PromptTooLong
from vlrank.training.collate import ANSWER_ROOM, MicroBatch, Pictures, Row, answer_row, end_to_end, side_by_side
from vlrank.training.packing import batches, pack, share
from vlrank.training.samples import Sample, TrainingSamples

if TYPE_CHECKING:
    from vlrank.data.items import ItemMeta
    from vlrank.prompting.encoding import Encoder


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's share of one optimizer step.

    Attributes:
        micro: Micro-batches, at least one.
        answers: Learned tokens in ``micro``; 0 if all samples of the share were bad; then ``micro`` is a
            stand-in, so that this rank still takes part in collective operations.
        samples: Samples in ``micro``.
        tokens: Tokens that were read, without padding.
        padding: Tokens that were not.
        inserted: Samples whose target had to be added to a retriever's candidates.
        together: Samples of the largest micro-batch.
        halvings: Of the passes' length when it was made, see `Steps.halve`.
        bad: (user, error type, message) of samples that could not be read.
    """

    micro: list[MicroBatch]
    answers: int
    samples: int
    tokens: int
    padding: int
    inserted: int
    together: int = 1
    halvings: int = 0
    bad: list[tuple[int, str, str]] = field(default_factory=list)


class Steps(Dataset[Step]):
    """Steps by global number (epoch * steps per epoch + step).

    Args:
        samples: What is learned.
        item_meta: What prompts show.
        encoder: Prompts -> token ids, in the mode that training shows.
        batch_size: Samples of a step over all ranks.
        micro_batch_size: Rows side by side at most; ignored when packing.
        pack_tokens: Length of packed rows, or None to pad. A step with a longer prompt gets rows for the longest prompt
            that the encoder makes, so that there are two shapes at most.
        for_unsloth: Packed rows end with their last prompt, and name lengths as Unsloth takes them.
        pass_tokens: Tokens of a padded micro-batch at most, padding included; a longer prompt goes alone.
        rank, world: Which share of each step.
        vision: Whether it is a vision model.
        pad_id: Any token id that is no picture placeholder.
        pictures: Loads pictures.
        loss: See `answer_row`.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        item_meta: Mapping[int, ItemMeta],
        encoder: Encoder,
        *,
        batch_size: int,
        micro_batch_size: int,
        pack_tokens: int | None,
        rank: int,
        world: int,
        vision: bool,
        pad_id: int,
        pictures: Pictures | None,
        loss: Literal["answer", "all"] = "answer",
        pass_tokens: int | None = None,
        for_unsloth: bool = False,
    ) -> None:
        self.samples, self.item_meta, self.encoder = samples, item_meta, encoder
        self.batch_size, self.micro_batch_size, self.pack_tokens = batch_size, micro_batch_size, pack_tokens
        self.rank, self.world, self.loss, self.pass_tokens = rank, world, loss, pass_tokens
        self._halvings = torch.zeros((), dtype=torch.int64).share_memory_()  # loader processes see it
        self.for_unsloth = for_unsloth
        self._form: dict[str, Any] = {"vision": vision, "pad_id": pad_id, "pictures": pictures}
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; the last may hold fewer samples."""
        return -(-len(self.samples) // self.batch_size)

    def __len__(self) -> int:
        return self.per_epoch

    def drawn(self, number: int) -> list[Sample]:
        """All samples of a step, over all ranks."""
        epoch, step = divmod(number, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.samples.order(epoch)
        indices = self._order[1][step * self.batch_size : (step + 1) * self.batch_size]
        return [self.samples.sample(epoch, int(index)) for index in indices]

    def __getitem__(self, number: int) -> Step:
        drawn = self.drawn(number)
        own = [drawn[i] for i in share([self._weight(sample) for sample in drawn], self.rank, self.world)]
        rows, bad = self._rows(own)
        answers = sum(len(row.targets) for row in rows)
        stand_in = [] if rows else [self._stand_in()]
        groups, micro = self._micro_batches(rows or stand_in)
        read = sum(len(row) for row in rows)
        return Step(
            micro=micro,
            answers=answers,
            samples=len(rows),
            tokens=read,
            padding=sum(batch["input_ids"].numel() for batch in micro) - read,
            inserted=sum(sample.inserted for sample in own),
            together=max(map(len, groups)),
            halvings=self.halvings,
            bad=bad,
        )

    def some_lengths(self, n: int = 256) -> list[int]:
        """Tokens of the first rows of the first epoch, the same on every rank; prompts that cannot be made left out."""
        rows, _ = self._rows([self.samples.sample(0, int(index)) for index in self.samples.order(0)[:n]])
        return [len(row) for row in rows]

    def _rows(self, samples: Sequence[Sample]) -> tuple[list[Row], list[tuple[int, str, str]]]:
        """Rows, and (user, error type, message) of samples that could not be read."""
        rows: list[Row] = []
        bad: list[tuple[int, str, str]] = []
        for sample in samples:
            try:
                rows.append(self._row(sample))
            except (PromptTooLong, OSError, ValueError) as error:
                bad.append((sample.user_id, type(error).__name__, str(error)))
        return rows, bad

    def _row(self, sample: Sample) -> Row:
        history = [self.item_meta[item] for item in sample.history]
        candidates = [self.item_meta[item] for item in sample.candidates]
        return answer_row(self.encoder, self.encoder.encode(history, candidates), sample.label, self.loss)

    @property
    def halvings(self) -> int:
        """How often `halve` was called, in any process."""
        return int(self._halvings)

    def halve(self) -> None:
        """Let passes take half of the tokens from now on, in the loader's processes too."""
        self._halvings += 1

    def _micro_batches(self, rows: Sequence[Row]) -> tuple[list[list[int]], list[MicroBatch]]:
        """Which rows go together, and as what."""
        lengths = [len(row) for row in rows]
        part = 2**self.halvings
        if self.pack_tokens is None:
            tokens = math.inf if self.pass_tokens is None else self.pass_tokens
            if part > 1:
                tokens = min(tokens, self.micro_batch_size * max(lengths)) / part
            groups = batches(lengths, self.micro_batch_size, tokens)
            return groups, [side_by_side([rows[i] for i in chosen], **self._form) for chosen in groups]
        longest = self.encoder.ranking.max_prompt_tokens + ANSWER_ROOM
        budget = self.pack_tokens // part
        if max(lengths) > budget:
            budget = max(longest, *lengths) if part == 1 else -(-max(lengths) // 128) * 128
        groups = pack(lengths, budget)
        if self.for_unsloth:  # its kernels take rows of any length
            return groups, [end_to_end([rows[i] for i in chosen], lengths=True, **self._form) for chosen in groups]
        form = self._form | {"documents": min(self.batch_size, budget), "longest": min(budget, longest)}
        return groups, [end_to_end([rows[i] for i in chosen], length=budget, **form) for chosen in groups]

    def _weight(self, sample: Sample) -> float:
        # Characters approximate tokens: all ranks must compute the same shares without tokenising each other's prompts.
        recent = sample.history[-self.encoder.ranking.max_history :]
        limit = self.encoder.ranking.max_item_chars
        return float(sum(min(limit, len(self.item_meta[item]["text"]) + 16) for item in (*recent, *sample.candidates)))

    def _stand_in(self) -> Row:
        token = np.full(1, self._form["pad_id"], dtype=np.int64)
        return Row(token, np.zeros((3, 1), dtype=np.int64), np.zeros(1, dtype=np.int64), token)


class _EpochOrder(Sampler[list[int]]):
    """Step numbers of the current epoch, one per batch."""

    def __init__(self, per_epoch: int) -> None:
        self.per_epoch = per_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        return ([self.epoch * self.per_epoch + step] for step in range(self.per_epoch))


def fields_of(steps: list[Step]) -> dict[str, Any]:
    """One step as the dict that a `Trainer` takes."""
    (step,) = steps
    return {name: getattr(step, name) for name in Step.__slots__}


class StepLoader(DataLoader[Step]):
    """Loads the steps of one epoch; ``workers`` processes prepare them ahead of time."""

    def __init__(self, steps: Steps, workers: int, pin_memory: bool) -> None:
        super().__init__(
            steps,
            batch_sampler=_EpochOrder(steps.per_epoch),
            collate_fn=fields_of,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=4 if workers else None,
        )

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of an epoch."""
        self.batch_sampler.set_epoch(epoch)


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch on ``device``; copies from pinned memory overlap with computation."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }

"""What a sequential retriever learns from: samples of histories, and their order in an epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlrank.config import RetrieveConfig, SequentialConfig, Split
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Ints, Lists
from vlrank.errors import UserError

METHODS = ("sasrec", "bsarec")

_FULL_SOFTMAX = 50_000  # largest catalogue with a softmax over all of it
_NEGATIVES = 8192
_POOL = 50  # batches whose samples are put together by length
_PLACE = {"cpus", "gpus"}  # settings that do not change what is learned


@dataclass(frozen=True)
class SequenceData:
    """What a sequential retriever sees of a dataset.

    Attributes:
        n_items: Items have ids 1..n_items.
        train: Training items of each user, oldest first.
        histories: Items before the target, oldest first, of the users of each split.
        targets: int64 [U]: the targets of these users.
    """

    n_items: int
    train: Lists
    histories: Mapping[Split, Lists]
    targets: Mapping[Split, Ints]

    @classmethod
    def of(cls, dataset: Dataset, method: str) -> SequenceData:
        """The data of a dataset.

        Raises:
            UserError: no user shows what follows what, or there is nobody to validate on.
        """
        train = Lists.from_dict(dataset.train_sequences())
        if not (train.lengths >= 2).any():
            raise UserError(
                f"{method} learns which item follows which: no user of {dataset.path} has two training interactions",
                "Leave-one-out keeps the last two of a user for validation and test. popularity and item_knn need no "
                "order.",
            )
        histories: dict[Split, Lists] = {}
        targets: dict[Split, Ints] = {}
        splits: tuple[Split, ...] = ("val", "test")
        for split in splits:
            users = dataset.histories(split)
            histories[split] = Lists.from_dict({user: history for user, (history, _) in users.items()})
            targets[split] = np.fromiter((target for _, target in users.values()), np.int64, len(users))
        if not len(targets["val"]):
            raise UserError(
                f"{dataset.path} has no validation user, and {method} stops by its validation NDCG@10",
                "Prepare it with another split.",
            )
        return cls(dataset.n_items, train, histories, targets)

    @property
    def popularity(self) -> Ints:
        """int64 [n_items + 1]: training interactions of each item."""
        return np.bincount(self.train.items, minlength=self.n_items + 1)

    def cold_targets(self, split: Split) -> int:
        """Users whose target has no training interaction: no list of these retrievers can hold it."""
        return int((self.popularity[self.targets[split]] == 0).sum())


@dataclass(frozen=True)
class Task:
    """One retriever.

    Attributes:
        method: One of `METHODS`.
        settings: With ``lr`` and ``negatives`` decided; no negatives mean the softmax over the whole catalogue.
        seed: Of weights, order, dropout and draws.
        fingerprint: Of all of these and the data: a state with another one belongs to another run.
    """

    method: str
    settings: SequentialConfig
    seed: int
    fingerprint: str

    @classmethod
    def of(cls, config: RetrieveConfig, dataset: Dataset) -> Task:
        """What ``config`` asks for, with everything decided that it leaves open."""
        settings = config.sequential
        if config.method == "bsarec" and settings.samples == "histories":
            raise UserError(
                "bsarec cannot learn from all places of a history at once: its filter reads what comes after them",
                "Leave sequential.samples at prefixes, or use sasrec.",
            )
        lr = settings.lr or (1e-3 if config.method == "sasrec" else 5e-4)
        negatives = settings.negatives or (_NEGATIVES if dataset.n_items > _FULL_SOFTMAX else None)
        settings = settings.model_copy(update={"lr": lr, "negatives": negatives})
        marks = {
            "method": config.method,
            "settings": settings.model_dump(mode="json", exclude=_PLACE),
            "seed": config.seed,
            "split": dataset.manifest["split"],
            "sequences": dataset.manifest["files"]["sequences.parquet"]["sha256"],
        }
        fingerprint = hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()
        return cls(config.method, settings, config.seed, fingerprint)


def samples(train: Lists, settings: SequentialConfig) -> tuple[Ints, Ints]:
    """(starts, ends), int64 [S]: inputs are ``train.items[start:end]``, the item at ``end`` is the last target.

    Every prefix of a history, or each history once, in pieces of ``max_length`` from its end.
    """
    whole, max_length = settings.samples == "histories", settings.max_length
    first, last = train.offsets[:-1], train.offsets[1:] - 1  # the item at `last` is a target only
    inputs = (last - first).clip(0)
    counts, step = (-(-inputs // max_length), max_length) if whole else (inputs, 1)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # [2, 3] -> 0, 1, 0, 1, 2
    ends = np.repeat(last, counts) - step * number
    return np.maximum(np.repeat(first, counts), ends - max_length), ends


def batches(lengths: Ints, size: int, rng: np.random.Generator) -> list[Ints]:
    """Rows of each batch of an epoch: every row once, in a random order in which rows of like length come together.

    Rows are shuffled and, within pools of fifty batches, sorted by length: few places of a batch are empty then.

    Args:
        lengths: int64 [S].
        size: Rows of a batch; the last one may be smaller.
        rng: Of this epoch.
    """
    order = rng.permutation(len(lengths))
    found: list[Ints] = []
    for start in range(0, len(order), size * _POOL):
        pool = order[start : start + size * _POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        found += [pool[at : at + size] for at in range(0, len(pool), size)]
    return [found[row] for row in rng.permutation(len(found))]

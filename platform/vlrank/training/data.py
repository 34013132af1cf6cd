"""What a training run reads, decided and checked before any model is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlrank.config import TrainConfig
from vlrank.data.items import ItemMeta
from vlrank.errors import UserError
from vlrank.prompting.modes import ModeSpec, mode_spec
from vlrank.prompting.prior import with_popularity
from vlrank.storage import cache_folder, writable
from vlrank.training.samples import (
    HistoryAndTarget,
    Sample,
    TrainingSamples,
    Usable,
    keep_usable,
    usable_items,
    validation_samples,
)

if TYPE_CHECKING:
    from vlrank.data.dataset import Dataset


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Everything that a run learns from and validates on; plain Python, which Ray sends to any worker.

    Attributes:
        sequences: user id -> training items, oldest first.
        validation: user id -> (history, target).
        item_meta: item id -> text and what the modes show.
        pools: user id -> a retriever's items, best first; empty without a retriever.
    """

    sequences: Mapping[int, Sequence[int]]
    validation: Mapping[int, HistoryAndTarget]
    item_meta: Mapping[int, ItemMeta]
    pools: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def of_dataset(cls, dataset: Dataset, candidates: str) -> TrainingData:
        """From a dataset folder; ``candidates`` as in `TrainConfig`.

        Raises:
            UserError: no such candidates, or a dataset without items or users.
        """
        pools: dict[int, list[int]] = {}
        if candidates != "ground_truth":
            name = candidates.removeprefix("retrieval:")
            table = dataset.candidates(name)
            rows = table.filter(table["split"] == "val").select("user_id", "item_ids")
            if rows.is_empty():
                raise UserError(
                    f"candidates {name!r} of {dataset.path} hold no validation users",
                    f"Make them again: vlrank retrieve {shlex.quote(str(dataset.path))} --name {shlex.quote(name)}",
                )
            pools = dict(rows.iter_rows())
        sequences = dataset.train_sequences()
        if not sequences:
            raise UserError(f"dataset {dataset.path} has no training interactions", "Check what `vlrank prepare` kept.")
        return cls(sequences, dataset.histories("val"), dataset.item_meta(), pools)

    @classmethod
    def of_lists(
        cls,
        train: Mapping[int, Sequence[int]],
        validation: Mapping[int, Sequence[int]],
        item_meta: Mapping[int, ItemMeta],
    ) -> TrainingData:
        """From ``{user id: [item id, ...]}``, oldest first; the last validation item of a user is the target.

        Raises:
            UserError: an item without meta data.
        """
        for name, lists in (("train_data", train), ("val_data", validation)):
            for user, items in lists.items():
                unknown = next((item for item in items if item not in item_meta), None)
                if unknown is not None:
                    raise UserError(
                        f"{name}: item {unknown} of user {user} is not in item_meta", "Give every item its text."
                    )
        splits = {
            user: ([*train.get(user, ()), *items[:-1]], items[-1]) for user, items in validation.items() if len(items)
        }
        return cls(train, splits, with_popularity(item_meta, train))

    def with_pictures(self, places: Mapping[str, str | None]) -> TrainingData:
        """The same data with other picture paths; None marks a picture that cannot be used."""
        if not places:
            return self
        meta: dict[int, ItemMeta] = {
            item: (
                {**entry, "image_path": places[path]} if (path := entry.get("image_path") or "") in places else entry
            )
            for item, entry in self.item_meta.items()
        }
        return replace(self, item_meta=meta)


@dataclass(frozen=True, slots=True)
class RunSamples:
    """A run's samples.

    Attributes:
        train_spec: How training prompts show items; differs from ``spec`` under ``train_inputs: caption``.
        spec: How validation (and later ranking) prompts show items.
        samples: Training samples.
        validation: Validation samples, the same at every evaluation.
        item_meta: As given.
        usable: Items that appear.
        metric: What selects the best checkpoint.
        warnings: What the user should know.
    """

    train_spec: ModeSpec
    spec: ModeSpec
    samples: TrainingSamples
    validation: list[Sample]
    item_meta: Mapping[int, ItemMeta]
    usable: Usable
    metric: str
    warnings: tuple[str, ...]

    @property
    def picture_paths(self) -> list[str]:
        """Pictures that prompts may show, each once, in order of item id."""
        if not (self.spec.pixels or self.train_spec.pixels):
            return []
        paths = (self.item_meta[int(item)].get("image_path") for item in self.usable.item_ids)
        return list(dict.fromkeys(path for path in paths if path))


def choose_samples(config: TrainConfig, data: TrainingData) -> RunSamples:
    """Choose items, samples and the selection metric.

    Raises:
        UserError: too many items lack what the mode shows, or too few items or users to train on.
    """
    spec = mode_spec(config.mode)
    train_spec = mode_spec("caption") if config.train_inputs == "caption" else spec
    policy = config.ranking.missing
    usable = usable_items(spec, data.item_meta, policy, config.max_missing)
    warnings = []
    if train_spec is not spec:
        captioned = usable_items(train_spec, data.item_meta, policy, config.max_missing)
        usable = replace(usable, item_ids=np.intersect1d(usable.item_ids, captioned.item_ids))
    if usable.missing:
        what = "are left out" if policy == "drop" else "are shown by their text alone"
        warnings.append(f"{usable.missing:,} of {usable.total:,} items have no {spec.shown} and {what}")
    samples = TrainingSamples(
        keep_usable(data.sequences, usable),
        usable.item_ids,
        negatives=config.negatives,
        per_user=config.samples_per_user,
        seed=config.seed,
        pools=data.pools or None,
        random_share=config.random_share,
        epochs=config.epochs,
        sampling=config.negative_sampling,
    )
    validation = validation_samples(
        data.validation,
        usable.item_ids,
        negatives=config.negatives,
        users=config.val_users or default_validation_users(len(data.sequences)),
        seed=config.seed,
        pools=data.pools or None,
    )
    metric, warning = selection_metric(config)
    warnings += [warning] if warning else []
    return RunSamples(train_spec, spec, samples, validation, data.item_meta, usable, metric, tuple(warnings))


def default_validation_users(training_users: int) -> int:
    """As many validation users as 5% of the training time allows.

    Derived from the number of users and never from a measured time: every machine, every trial of a sweep and a
    continued run must validate on the same users. Reading a prompt takes a third of the operations of learning from it
    (2N per token forward, 4N backward; Kaplan et al. 2020), and an epoch learns one sample per user by default, so
    15% of the users take 5% of an epoch. LoRA on a frozen model, whose backward pass has no gradients of weights,
    pays 7.5%, and ``samples_per_user`` above 1 less. With fewer than 200 users the metric's standard error would be
    above 3.5 points; with more than 10,000 it is below half a point, and their prompts would fill the host's memory.

    >>> [default_validation_users(n) for n in (300, 1_600, 22_363, 1_000_000)]
    [200, 240, 3354, 10000]
    """
    return min(max(200, round(0.15 * training_users)), 10_000)


def selection_metric(config: TrainConfig) -> tuple[str, str | None]:
    """The metric that selects the best checkpoint, and a warning where the wanted one cannot tell models apart."""
    metric = config.metric or f"recall@{min(10, config.ranking.top_k)}"
    name, _, k = metric.partition("@")
    if name == "recall" and int(k) >= config.negatives + 1:
        return (
            "ndcg@10",
            f"{metric} is always 1 with {config.negatives + 1} candidates; checkpoints are selected by ndcg@10",
        )
    return metric, None


def display_name(metric: str) -> str:
    """``recall@10`` -> ``Recall@10``, ``ndcg@10`` -> ``NDCG@10``, as console lines show it."""
    name, _, k = metric.partition("@")
    return f"{name.capitalize() if name == 'recall' else name.upper()}@{k}"


def pictures_folder(config: TrainConfig) -> Path:
    """The folder of cached vision features: in the dataset, which runs and trials share, else in the run.

    They are memory-mapped: those of a dataset (or run) that is in a bucket or read-only lie in this node's cache.
    """
    home = config.dataset if (config.dataset / "manifest.json").is_file() else config.out
    if isinstance(home, Path) and writable(home):
        return home / ".vision_features"
    return cache_folder() / "vision_features"

"""What a reranker learns from: histories, targets and negatives, drawn as a pure function of (seed, epoch, index).

Nothing is stored between epochs, so a resumed run, another number of workers and another loader order all see the same
samples. `vlrank.prompting.negatives` says which items are negatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlrank.data.items import ItemMeta
from vlrank.errors import UserError
from vlrank.prompting.modes import ModeSpec, shows
from vlrank.prompting.negatives import draw_negatives, sampled_candidates, shuffle_in

HistoryAndTarget = tuple[list[int], int]
"""History (oldest first) and target of one user."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question with its answer.

    Attributes:
        user_id: Whose history it is.
        history: Items before the target, oldest first, not yet cut to ``max_history``.
        candidates: Target and negatives in the order in which the prompt numbers them.
        label: 1-based position of the target among the candidates; 0 when the retriever missed it (validation only).
        inserted: The negatives come from a retriever that did not list the target, which was put in by hand; a model
            could learn to pick the odd one out.
    """

    user_id: int
    history: tuple[int, ...]
    candidates: tuple[int, ...]
    label: int
    inserted: bool = False


@dataclass(frozen=True, slots=True)
class Usable:
    """Items a mode can show.

    Attributes:
        item_ids: Sorted ids, int64.
        missing: How many items lack what the mode shows.
        total: All items.
    """

    item_ids: np.ndarray
    missing: int
    total: int


def usable_items(
    spec: ModeSpec, item_meta: Mapping[int, ItemMeta], missing: Literal["drop", "text"], max_missing: float = 0.2
) -> Usable:
    """Items that may appear in histories, targets and negatives.

    Raises:
        UserError: no items, or more than ``max_missing`` of them lack what the mode shows.
    """
    if not item_meta:
        raise UserError("the dataset has no items", "Check what `vlrank prepare` printed.")
    having = np.array(sorted(item for item, meta in item_meta.items() if shows(spec, meta)), dtype=np.int64)
    lacking = len(item_meta) - len(having)
    if lacking > max_missing * len(item_meta):
        raise UserError(
            f"mode {spec.name}: {lacking:,} of {len(item_meta):,} items have no {spec.shown}, "
            f"more than the {max_missing:.0%} that a run accepts",
            f"Make them: `{spec.remedy}`. Or accept it: max_missing=1 leaves such items out, and with "
            "ranking.missing=text they are shown by their text.",
        )
    ids = having if missing == "drop" else np.array(sorted(item_meta), dtype=np.int64)
    return Usable(ids, lacking, len(item_meta))


def keep_usable(sequences: Mapping[int, Sequence[int]], usable: Usable) -> dict[int, list[int]]:
    """The sequences without items that cannot be shown; order kept, users without any item left out."""
    allowed = set(usable.item_ids.tolist())
    kept = {user: [item for item in items if item in allowed] for user, items in sequences.items()}
    return {user: items for user, items in kept.items() if items}


class TrainingSamples:
    """All training samples of an epoch, by index.

    Args:
        sequences: user id -> training items, oldest first (validation and test items already cut off).
        item_ids: Items that may be negatives.
        negatives: Candidates beside the target.
        per_user: Random split points per user and epoch, or every prefix.
        seed: Everything drawn is a function of it.
        pools: user id -> items of a retriever, best first; negatives are drawn from them first.
        random_share: Share of negatives drawn at random although there is a pool, in the first and the last epoch.
        epochs: Over how many epochs ``random_share`` moves from its first to its last value.
        sampling: Random negatives are ``uniform``, or drawn by ``popularity``: in proportion to an item's training
            interactions plus one. Popular items are targets more often, so against uniform negatives popularity alone
            is a good answer; where all candidates are popular, as a retriever's are, it is none.

    Raises:
        UserError: no user with two items, or too few items to draw the negatives from.

    >>> samples = TrainingSamples({7: [1, 2, 3]}, np.arange(1, 30), negatives=3, seed=0)
    >>> sample = samples.sample(epoch=0, index=0)
    >>> sample.candidates[sample.label - 1] in (2, 3), len(sample.candidates)
    (True, 4)
    """

    def __init__(
        self,
        sequences: Mapping[int, Sequence[int]],
        item_ids: np.ndarray,
        *,
        negatives: int = 19,
        per_user: int | Literal["every_prefix"] = 1,
        seed: int = 0,
        pools: Mapping[int, Sequence[int]] | None = None,
        random_share: tuple[float, float] = (0.0, 0.0),
        epochs: int = 1,
        sampling: Literal["uniform", "popularity"] = "uniform",
    ) -> None:
        self._items = np.asarray(item_ids, dtype=np.int64)
        self._negatives = negatives
        self._seed = seed
        self._share = random_share
        self._epochs = epochs
        users = sorted(user for user, items in sequences.items() if len(items) >= 2)
        self.skipped_users = len(sequences) - len(users)
        if not users:
            raise UserError(
                "no user has two training items, so there is no history with a target after it",
                "Prepare more interactions: under leave-one-out a user needs 4 items to be trained on.",
            )
        self._users = users
        self._sequences = {user: tuple(sequences[user]) for user in users}
        self._taken = {user: frozenset(sequences[user]) for user in users}
        known = set(self._items.tolist())
        for user in users:
            outside = len(known) - len(self._taken[user] & known)
            if outside < negatives:
                raise UserError(
                    f"user {user} leaves {outside} items to draw {negatives} negatives from",
                    f"Lower `negatives` to {outside} or less, or train on a larger catalogue.",
                )
        self._pools = {
            user: tuple(
                item
                for item in dict.fromkeys((pools or {}).get(user, ()))
                if item in known and item not in self._taken[user]
            )
            for user in users
        }
        self._listed = {user: frozenset((pools or {}).get(user, ())) for user in users}
        self._drawn_from = self._items
        if sampling == "popularity":
            bought = np.concatenate([np.asarray(items, dtype=np.int64) for items in sequences.values()])
            self._drawn_from = np.concatenate([self._items, bought[np.isin(bought, self._items)]])
        counts = [len(self._sequences[user]) - 1 for user in users]
        counts = counts if per_user == "every_prefix" else [min(per_user, count) for count in counts]
        self._every_prefix = per_user == "every_prefix"
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def users(self) -> Sequence[int]:
        """Users with samples, ascending."""
        return self._users

    def order(self, epoch: int) -> np.ndarray:
        """The indices in the order of this epoch, int64, shape (len(self),)."""
        return np.random.default_rng([self._seed, 1, epoch]).permutation(len(self))

    def random_share(self, epoch: int) -> float:
        """Share of negatives that are random in this epoch, moving linearly from the first to the last epoch's."""
        first, last = self._share
        return first + (last - first) * (min(epoch, self._epochs - 1) / max(1, self._epochs - 1))

    def sample(self, epoch: int, index: int) -> Sample:
        """Sample ``index`` of ``epoch``, the same on every machine."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        user = self._users[place]
        nth = index - (int(self._ends[place - 1]) if place else 0)
        items = self._sequences[user]
        # The split points of one user in one epoch are drawn together, so that no two of its samples are alike.
        if self._every_prefix:
            split = nth + 1
        else:
            points = np.random.default_rng([self._seed, 2, epoch, user]).permutation(len(items) - 1)
            split = int(points[nth]) + 1
        rng = np.random.default_rng([self._seed, 3, epoch, user, nth])
        target = items[split]
        negatives = self._draw(rng, user, epoch)
        candidates, label = shuffle_in(rng, target, negatives)
        return Sample(
            user, items[:split], candidates, label, bool(self._pools[user]) and target not in self._listed[user]
        )

    def _draw(self, rng: np.random.Generator, user: int, epoch: int) -> list[int]:
        pool = self._pools[user]
        n_random = self._negatives
        chosen: list[int] = []
        if pool:
            n_pool = min(len(pool), int((rng.random(self._negatives) >= self.random_share(epoch)).sum()))
            chosen = [pool[i] for i in rng.choice(len(pool), size=n_pool, replace=False)]
            n_random -= n_pool
        return chosen + draw_negatives(rng, self._drawn_from, self._taken[user] | set(chosen), n_random)


def validation_samples(
    histories: Mapping[int, HistoryAndTarget],
    item_ids: np.ndarray,
    *,
    negatives: int = 19,
    users: int = 1000,
    seed: int = 0,
    pools: Mapping[int, Sequence[int]] | None = None,
) -> list[Sample]:
    """A fixed validation set: the same users, candidates and order at every evaluation.

    Users are stratified by history length (quartiles), because short and long histories differ in difficulty and a
    plain sample of few users can miss one kind. With pools the candidates are the retriever's best, in shuffled order;
    a user whose target is not among them keeps label 0 and counts as missed.

    Args:
        histories: user id -> (history oldest first, validation item).
        item_ids: Items that can be shown; histories and targets are cut to them.
        negatives: Candidates beside the target.
        users: How many users at most.
        seed: Of the users, the candidates and their order.
        pools: user id -> a retriever's items, best first.

    Raises:
        UserError: no user with a history and a target.
    """
    allowed = set(item_ids.tolist())
    usable = {
        user: ([item for item in history if item in allowed], target)
        for user, (history, target) in histories.items()
        if target in allowed and any(item in allowed for item in history)
    }
    if not usable:
        raise UserError("no validation user has a history and a target that this mode can show")
    result = []
    for user in stratified_users({user: len(history) for user, (history, _) in usable.items()}, users, seed):
        history, target = usable[user]
        if pools is not None:
            rng = np.random.default_rng([seed, 4, user])
            listed = [item for item in pools.get(user, ()) if item in allowed][: negatives + 1]
            candidates = tuple(listed[i] for i in rng.permutation(len(listed)))
            label = candidates.index(target) + 1 if target in candidates else 0
        else:
            candidates, label = sampled_candidates(user, histories[user][0], target, item_ids, negatives, seed)
        result.append(Sample(user, tuple(history), candidates, label))
    return result


def stratified_users(lengths: Mapping[int, int], n: int, seed: int) -> list[int]:
    """At most ``n`` users, ascending, in proportion from the four quarters of history length."""
    users = sorted(lengths, key=lambda user: (lengths[user], user))
    if n >= len(users):
        return sorted(users)
    rng = np.random.default_rng([seed, 5])
    chosen: list[int] = []
    for quarter in range(4):
        low, high = len(users) * quarter // 4, len(users) * (quarter + 1) // 4
        share = n * (quarter + 1) // 4 - n * quarter // 4
        chosen += [users[low + i] for i in rng.choice(high - low, size=min(share, high - low), replace=False)]
    return sorted(chosen)

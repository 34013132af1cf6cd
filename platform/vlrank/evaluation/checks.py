"""Checks on the data behind an evaluation: what makes numbers look better, or worse, than they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
import scipy.sparse as sp

from vlrank.data.lists import Ints, Lists

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a reader of the numbers should know.

    Attributes:
        check: Name of the check.
        level: ``error``: the numbers do not mean what they seem to mean; ``warning``: they may be wrong; ``note``: good
            to know.
        message: In words, with the count.
        count, total: How many of how many.
    """

    check: str
    level: Level
    message: str
    count: int
    total: int


def check_candidates(
    lists: Lists,
    targets: Ints,
    histories: Mapping[int, Sequence[int]],
    *,
    name: str,
    expected: int,
    titles: Sequence[str] = (),
    protocol: str = "retrieval",
    n_items: int = 0,
) -> list[Finding]:
    """Checks of candidate lists.

    Args:
        lists: Candidates in the retriever's order.
        targets: int [U]; the target of each user of ``lists``.
        histories: user_id -> items before the target.
        name: Name of the lists in messages.
        expected: The number of candidates that every user should have.
        titles: Item titles at [item_id - 1], for near-duplicates.
        protocol: ``retrieval`` or ``ground_truth``.
        n_items: Size of the catalogue.
    """
    return [
        *_duplicates(lists, name),
        *_history(lists, targets, histories, name),
        *_short(lists, name, expected),
        *(_injected(lists, targets, name, n_items) if protocol == "retrieval" else ()),
        *_near_duplicates(lists, targets, titles, name),
    ]


def check_order(lists: Lists, name: str) -> list[Finding]:
    """Scores that contradict the order, that are missing, or that say nothing."""
    if lists.scores is None or not len(lists.items):
        return []
    findings = []
    segments = lists.segments()
    broken = np.unique(segments[~np.isfinite(lists.scores)])
    if len(broken):
        message = f"{name}: scores of {_users(len(broken), lists)} are not finite; the order of the list counts"
        findings.append(Finding("scores", "warning", message, len(broken), len(lists.users)))
    inner = segments[1:] == segments[:-1]
    steps = np.diff(lists.scores)
    rising = np.unique(segments[1:][inner & (steps > 1e-6)])
    if len(rising):
        message = f"{name}: scores rise along the list of {_users(len(rising), lists)}; the order of the list counts"
        findings.append(Finding("scores", "note", message, len(rising), len(lists.users)))
    mass = np.bincount(segments, np.exp(np.minimum(lists.scores, 1)), len(lists.users))
    if np.allclose(mass, 1, atol=1e-3) and lists.same_scores():  # probabilities, where ranks are alike by nature
        message = f"{name}: scores do not depend on the candidates: all users have the same ones"
        return [*findings, Finding("scores", "warning", message, len(lists.users), len(lists.users))]
    flat = np.ones(len(lists.users), bool)
    flat[segments[1:][inner & (steps != 0)]] = False
    flat &= lists.lengths > 1
    if flat.sum() > 0.05 * len(lists.users):
        message = f"{name}: all scores are equal for {_users(int(flat.sum()), lists)}: the input's order stays"
        findings.append(Finding("scores", "warning", message, int(flat.sum()), len(lists.users)))
    return findings


def check_times(sequences: pl.DataFrame, split: str, lengths: Mapping[int, int]) -> list[Finding]:
    """Time leakage: targets older than what the model trained on.

    Args:
        sequences: The sequences table.
        split: ``val`` or ``test``.
        lengths: user_id -> items before the target.
    """
    known = sequences.filter(pl.col("user_id").is_in(list(lengths)))
    position = known["user_id"].replace_strict(lengths, return_dtype=pl.Int64)

    def at(back: int) -> pl.Expr:
        # polars counts a negative place from the end of the list.
        place = pl.col("position") - back
        return pl.when(place >= 0).then(pl.col("timestamps").list.get(place, null_on_oob=True))

    times = known.with_columns(position=position).select(
        target=at(0),
        before=at(1),
        # Under leave-one-out the training part ends two items before the end of the sequence.
        train=at(2 if split == "test" else 1),
    )
    if times.is_empty():
        return []
    findings = []
    backwards = int((times["target"] < times["before"]).sum())
    if backwards:
        message = f"{backwards:,} of {len(times):,} {split} targets are older than the history before them"
        findings.append(Finding("time_leakage", "error", message, backwards, len(times)))
    newest = times["train"].drop_nulls().sort().to_numpy()
    if len(newest) and newest[-1] > newest[0]:
        target = times["target"].to_numpy()
        later = 1 - np.searchsorted(newest, target, side="right") / len(newest)
        # Some user always trains on a later day; what matters is the number of such users.
        leaking = int((later > 0.05).sum())
        if leaking > 0.01 * len(times):
            message = (
                f"time leakage: for {leaking / len(times):.0%} of the {split} targets, over 5% of all users have later "
                f"training interactions (median: {np.median(later):.0%} of the users). Leave-one-out lets models see "
                "the future of other users; `vlrank prepare --split temporal` does not"
            )
            findings.append(Finding("time_leakage", "warning", message, leaking, len(times)))
    return findings


def _duplicates(lists: Lists, name: str) -> list[Finding]:
    again = lists.duplicates()
    users = len(np.unique(lists.segments()[again]))
    if not users:
        return []
    message = f"{name}: duplicate candidates for {_users(users, lists)} ({int(again.sum()):,} items); the first counts"
    return [Finding("duplicates", "warning", message, users, len(lists.users))]


def _history(lists: Lists, targets: Ints, histories: Mapping[int, Sequence[int]], name: str) -> list[Finding]:
    past = Lists.from_dict({int(user): histories.get(int(user), ()) for user in lists.users})
    findings = []
    known = past.contains(np.repeat(lists.users, lists.lengths), lists.items)
    known &= lists.items != np.repeat(targets, lists.lengths)
    users = len(np.unique(lists.segments()[known]))
    if users:
        message = f"{name}: history items among the candidates of {_users(users, lists)}"
        findings.append(Finding("history", "warning", message, users, len(lists.users)))
    repeats = int(past.contains(lists.users, targets).sum())
    if repeats:
        message = (
            f"{repeats:,} targets are already in their user's history; retrievers that exclude it cannot find them"
        )
        findings.append(Finding("history", "note", message, repeats, len(lists.users)))
    return findings


def _short(lists: Lists, name: str, expected: int) -> list[Finding]:
    short = int((lists.lengths < expected).sum())
    if not short:
        return []
    fewest = int(lists.lengths.min())
    message = f"{name}: fewer than {expected} candidates for {_users(short, lists)} (fewest: {fewest})"
    return [Finding("short_lists", "warning", message, short, len(lists.users))]


def _injected(lists: Lists, targets: Ints, name: str, n_items: int) -> list[Finding]:
    ranks = lists.rank_of(targets)
    covered = int((ranks > 0).sum())
    total = len(ranks)
    if total >= 20 and covered == total and n_items > 2 * int(lists.lengths.max(initial=0)):
        message = (
            f"{name}: every target is among its candidates. No retriever does that, so the targets were put in. "
            "Read these numbers as ground_truth, not as retrieval"
        )
        return [Finding("target_injected", "error", message, covered, total)]
    # Targets that were put in replace the last candidate or follow it: one place has far more targets than by chance.
    places = np.bincount(ranks[ranks > 0])
    if covered >= 50 and len(places) > 3:
        place = int(places.argmax())
        if place > 2 and places[place] > 0.5 * covered:
            message = (
                f"{name}: {places[place] / covered:.0%} of the retrieved targets stand at place {place}: "
                "were they put there?"
            )
            return [Finding("target_injected", "error", message, int(places[place]), covered)]
    return []


def _near_duplicates(lists: Lists, targets: Ints, titles: Sequence[str], name: str) -> list[Finding]:
    """Candidates with nearly the target's title: no ranker can tell them apart, and all but one count as wrong."""
    if not len(titles) or not len(lists.items):
        return []
    words = [sorted(set(re.findall(r"\w+", title.casefold()))) for title in titles]
    vocabulary: dict[str, int] = {}
    index = Lists.from_dict(
        {i: [vocabulary.setdefault(word, len(vocabulary)) for word in row] for i, row in enumerate(words)}
    )
    shape = (len(titles), max(len(vocabulary), 1))
    bags = sp.csr_matrix((np.ones(len(index.items), np.float32), index.items, index.offsets), shape=shape)
    sizes = index.lengths
    covered = np.flatnonzero(lists.rank_of(targets) > 0)
    near = 0
    for start in range(0, len(covered), 4096):
        part = lists.take(covered[start : start + 4096])
        goals = np.repeat(targets[covered[start : start + 4096]], part.lengths)
        shared = np.asarray(bags[goals - 1].multiply(bags[part.items - 1]).sum(axis=1)).ravel()
        union = sizes[goals - 1] + sizes[part.items - 1] - shared
        alike = (shared >= 0.9 * union) & (shared > 0) & (part.items != goals)
        near += len(np.unique(part.segments()[alike]))
    if not near:
        return []
    message = (
        f"{name}: a near-duplicate of the target (nine in ten title words) is among the candidates of {near:,} users"
    )
    return [Finding("near_duplicates", "note", message, near, len(covered))]


def _users(count: int, lists: Lists) -> str:
    return f"{count:,} of {len(lists.users):,} users"

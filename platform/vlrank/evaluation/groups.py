"""Groups of rankings that may be compared: same split, same candidates, same users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlrank.config import Split
from vlrank.data.lists import Ints, Lists
from vlrank.evaluation.checks import Finding
from vlrank.evaluation.compare import Difference
from vlrank.evaluation.metrics import Metrics
from vlrank.evaluation.rankings import ModelRankings
from vlrank.storage import Location

Protocol = Literal["ground_truth", "retrieval"]
RETRIEVER = "identity"
"""Name of the rival that keeps the retriever's order."""
POPULARITY = "target's popularity (training interactions)"
"""Name of the slices by how often the target was bought."""
Histories = Mapping[int, tuple[list[int], int]]
"""user_id -> (history, oldest first; target)."""


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        name: As shown.
        kind: ``model`` for a rankings file, ``baseline`` for a rival.
        lists: Its rankings of the group's users.
        metrics: What it reached.
        file: Where it came from.
        expected: Exact expectation of the means, for the random baseline.
    """

    name: str
    kind: Literal["model", "baseline"]
    lists: Lists
    metrics: Metrics
    file: Location | None = None
    expected: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of the users, e.g. those with a long history."""

    by: str
    value: str
    users: int
    metrics: dict[str, Metrics]


@dataclass(frozen=True, slots=True)
class Group:
    """Rankings that may be compared: same split, same candidates, same users.

    Attributes:
        split: ``val`` or ``test``.
        protocol: ``ground_truth``: the target is among the candidates by construction; ``retrieval``: it must have been
            retrieved, and misses count.
        candidates: Name of the candidates table, or None where none fits.
        users, targets: int64 [U] each.
        base: The candidates: in the retriever's order where it is known, else in a seeded random order.
        ordered: Whether that order is the retriever's.
        methods: Models first, then baselines.
        differences: Paired comparisons of each model with every other method, corrected for their number.
        slices: The same metrics by kind of user and item.
        findings: What to know when reading the numbers.
    """

    split: Split
    protocol: Protocol
    candidates: str | None
    users: Ints
    targets: Ints
    base: Lists
    ordered: bool
    methods: list[Method]
    differences: list[Difference]
    slices: list[Slice]
    findings: list[Finding]

    @property
    def models(self) -> list[Method]:
        """The rows that come from rankings files."""
        return [method for method in self.methods if method.kind == "model"]

    def strongest_rival(self, metric: str) -> Method | None:
        """The rival with the highest mean of the metric; None without rivals."""
        rivals = [method for method in self.methods if method.kind == "baseline"]
        return max(rivals, key=lambda method: method.metrics.means[metric], default=None)

    @property
    def cold(self) -> Slice | None:
        """The users whose target nobody has bought in the training part; None where there are none, or no others."""
        return next((part for part in self.slices if (part.by, part.value) == (POPULARITY, "0")), None)

    @property
    def length(self) -> int:
        """Candidates of the user who has most."""
        return int(self.base.lengths.max(initial=0))

    @property
    def title(self) -> str:
        """``"test, retrieval (sasrec), 50 candidates, 22,363 users"``."""
        source = f" ({self.candidates})" if self.candidates and self.candidates != self.protocol else ""
        return f"{self.split}, {self.protocol}{source}, {self.length} candidates, {len(self.users):,} users"

    def method(self, name: str) -> Method:
        """The method of that name, or of that file.

        Raises:
            KeyError: there is none.
        """
        for method in self.methods:
            if name == method.name or (method.file and name in (str(method.file), method.file.name, method.file.stem)):
                return method
        raise KeyError(name)


def group_by_candidates(
    rankings: Sequence[ModelRankings], tables: Mapping[str, Lists], histories: Histories, requested: str | None
) -> list[tuple[list[ModelRankings], str | None]]:
    """Rankings of the same candidates, with the name of their candidates table; None where no table fits.

    Args:
        rankings: Of one split.
        tables: The split's candidates tables by name.
        histories: The split's users.
        requested: The table that the user names; it wins over other tables that fit equally.
    """
    groups: list[tuple[list[ModelRankings], str | None]] = []
    for ranking in rankings:
        name = _table_of(ranking, tables, histories, requested)
        for members, other in groups:
            a, b = ranking.lists, members[0].lists
            if name == other and (name or _only_ranks(a, b, {}) or _only_ranks(b, a, {})):
                members.append(ranking)
                break
        else:
            groups.append(([ranking], name))
    return groups


def _table_of(
    ranking: ModelRankings, tables: Mapping[str, Lists], histories: Histories, requested: str | None
) -> str | None:
    """The candidates table that was ranked. What the file declares comes first, if that table has the ranked items."""
    if ranking.declared == "ground_truth":
        return None
    for name in sorted(tables, key=lambda name: name != ranking.declared):
        if _made_from(ranking.lists, tables[name], histories, certain=name in (ranking.declared, requested)):
            return name
    return None


def _made_from(ranked: Lists, table: Lists, histories: Histories, *, certain: bool) -> bool:
    """Whether the rankings were made from these candidates.

    A table with nearly all of a small catalogue contains any ranking, of sampled candidates too, and rivals would then
    have to find the target among more items than the model. So a table with far longer lists must begin with the ranked
    items, unless the file or the user names the table (``certain``).
    """
    if not _only_ranks(ranked, table, histories):
        return False
    if certain:
        return True
    users = np.intersect1d(ranked.users, table.users)
    lengths = ranked.for_users(users).lengths
    if np.median(table.for_users(users).lengths) <= 2 * np.median(lengths):
        return True
    return _only_ranks(ranked, table.head(int(lengths.max())), histories)


def _only_ranks(ranked: Lists, candidates: Lists, histories: Histories) -> bool:
    """Whether all ranked items are candidates; targets aside, as a target may have been put in."""
    common = np.isin(ranked.users, candidates.users)
    if not common.any():
        return False
    part = ranked.take(np.flatnonzero(common)[:5000])
    users = np.repeat(part.users, part.lengths)
    listed = candidates.for_users(part.users).contains(users, part.items)
    if histories:
        targets = np.array([histories[int(user)][1] if int(user) in histories else 0 for user in part.users])
        listed |= part.items == np.repeat(targets, part.lengths)
    return bool(len(listed)) and bool(listed.all())

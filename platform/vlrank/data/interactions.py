"""Interactions as integer arrays: filters, k-core, order and ids.

Every function is a pure function of its input: no hash order, no randomness, no dependence on threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlrank.data.sources import Batch

# While a pass of `k_core` removes more than this share, scanning all rows is cheaper than following single ones.
_SCAN_SHARE = 1 / 20


@dataclass(frozen=True, slots=True)
class Interactions:
    """Interactions in columns; rows are in file order until `order` is called.

    Attributes:
        user: int32 [n], index into ``user_names``.
        item: int32 [n], index into ``item_names``.
        time_ms: int64 [n], milliseconds since 1970.
        rating: float32 [n], NaN where there is none.
        user_names: Arrow strings [U], ids of the source, each once.
        item_names: Arrow strings [I], ids of the source, each once.
    """

    user: np.ndarray
    item: np.ndarray
    time_ms: np.ndarray
    rating: np.ndarray
    user_names: pa.Array
    item_names: pa.Array

    def __len__(self) -> int:
        return len(self.user)

    @property
    def n_users(self) -> int:
        """Users that have interactions."""
        return int(np.count_nonzero(np.bincount(self.user, minlength=len(self.user_names))))

    @property
    def n_items(self) -> int:
        """Items that have interactions."""
        return int(np.count_nonzero(np.bincount(self.item, minlength=len(self.item_names))))

    def take(self, rows: np.ndarray) -> Interactions:
        """The rows of a mask or an index."""
        return replace(
            self, user=self.user[rows], item=self.item[rows], time_ms=self.time_ms[rows], rating=self.rating[rows]
        )


class Collector:
    """Gathers batches; ids become integers at once, so 20 million rows take 20 bytes each and every id is kept once."""

    def __init__(self) -> None:
        self._columns: dict[str, list[np.ndarray]] = {"user": [], "item": [], "time_ms": [], "rating": []}
        self._names: dict[str, list[pa.Array]] = {"user": [], "item": []}
        self._known: dict[str, int] = {"user": 0, "item": 0}

    def add(self, batch: Batch, keep: np.ndarray | None = None) -> None:
        """Append a batch, or the rows of it that the mask ``keep`` names."""
        for role, column in (("user", batch.user), ("item", batch.item)):
            encoded = (column if keep is None else column.filter(pa.array(keep))).dictionary_encode()
            self._columns[role].append(encoded.indices.to_numpy().astype(np.int32) + np.int32(self._known[role]))
            self._names[role].append(encoded.dictionary)
            self._known[role] += len(encoded.dictionary)
        self._columns["time_ms"].append(batch.time_ms if keep is None else batch.time_ms[keep])
        self._columns["rating"].append(batch.rating if keep is None else batch.rating[keep])

    def finish(self) -> Interactions:
        """All rows in the order in which they came."""
        arrays, names = {}, {}
        for role in ("user", "item"):
            # Arrow gives all chunks one common dictionary, in the order of first appearance.
            encoded = pa.chunked_array(self._names[role], pa.string()).dictionary_encode()
            final = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks] or [np.empty(0, np.int32)])
            local = np.concatenate(self._columns[role] or [np.empty(0, np.int32)])
            self._columns[role] = []
            arrays[role] = final.astype(np.int32)[local]
            names[role] = encoded.chunk(0).dictionary if encoded.num_chunks else pa.array([], pa.string())
        time_ms = np.concatenate(self._columns["time_ms"] or [np.empty(0, np.int64)])
        rating = np.concatenate(self._columns["rating"] or [np.empty(0, np.float32)])
        return Interactions(arrays["user"], arrays["item"], time_ms, rating, names["user"], names["item"])


def order(data: Interactions) -> Interactions:
    """Rows by user, within a user by time, ties in file order."""
    rows = np.argsort(data.time_ms, kind="stable")
    return data.take(rows[np.argsort(data.user[rows], kind="stable")])


def drop_duplicates(data: Interactions) -> Interactions:
    """Each (user, item) pair once, the first of the ordered rows: the user's earliest, ties in file order.

    Args:
        data: Rows as `order` leaves them.
    """
    pair = data.user.astype(np.int64) * max(1, len(data.item_names)) + data.item
    rows = np.argsort(pair, kind="stable")
    same = pair[rows[1:]] == pair[rows[:-1]]
    keep = np.ones(len(data), bool)
    keep[rows[1:][same]] = False
    return data if keep.all() else data.take(keep)


def k_core(data: Interactions, min_uc: int, min_sc: int) -> Interactions:
    """The largest subset in which every user has ``min_uc`` and every item ``min_sc`` interactions.

    That subset is unique, whatever the order of removal, because it is the union of all subsets with the property; here
    users and items below their minimum are removed together until nobody is (the k-core of the bipartite graph, as in
    Seidman 1983, with a bound for each side). Time is linear in the interactions: full scans while they remove much,
    then only the neighbours of what was removed are looked at.
    """
    while True:
        keep = (np.bincount(data.user, minlength=1) >= min_uc)[data.user]
        keep &= (np.bincount(data.item, minlength=1) >= min_sc)[data.item]
        removed = len(keep) - np.count_nonzero(keep)
        if not removed:
            return data
        few = removed < len(data) * _SCAN_SHARE
        data = data.take(keep)
        if few:
            return data.take(_peel(data.user, data.item, min_uc, min_sc))


def _peel(user: np.ndarray, item: np.ndarray, min_uc: int, min_sc: int) -> np.ndarray:
    """Mask of the rows of the core, found by following removals from node to node."""
    n = len(user)
    sides = [_Side(user, min_uc), _Side(item, min_sc)]
    alive = np.ones(n, bool)
    below = [np.flatnonzero((side.count > 0) & (side.count < side.minimum)) for side in sides]
    while len(below[0]) or len(below[1]):
        for here in (0, 1):
            rows = sides[here].rows_of(below[here])
            rows = rows[alive[rows]]
            alive[rows] = False
            sides[here].count[below[here]] = 0
            other = sides[1 - here]
            nodes, lost = np.unique(other.node[rows], return_counts=True)
            other.count[nodes] -= lost
            fallen = nodes[(other.count[nodes] > 0) & (other.count[nodes] < other.minimum)]
            below[here] = np.empty(0, np.int64)
            below[1 - here] = np.union1d(below[1 - here], fallen)
    return alive


class _Side:
    """One side of the bipartite graph: how many rows a node has, and which."""

    def __init__(self, node: np.ndarray, minimum: int) -> None:
        self.node = node
        self.minimum = minimum
        self.count = np.bincount(node, minlength=1)
        self._start = np.concatenate([[0], np.cumsum(self.count)])
        self._rows = np.argsort(node, kind="stable")

    def rows_of(self, nodes: np.ndarray) -> np.ndarray:
        """All rows of some nodes, removed or not."""
        nodes = nodes.astype(np.int64)
        start, length = self._start[nodes], self._start[nodes + 1] - self._start[nodes]
        total = int(length.sum())
        if not total:
            return np.empty(0, np.int64)
        offset = np.arange(total) - np.repeat(np.cumsum(length) - length, length)
        return self._rows[np.repeat(start, length) + offset]


@dataclass(frozen=True, slots=True)
class Sequences:
    """What becomes the sequences table, with final ids.

    Attributes:
        user_names: Arrow strings [U]; user_id is the position plus 1.
        item_names: Arrow strings [I]; item_id is the position plus 1.
        item_ids: Arrow list<int32> [U], oldest first.
        timestamps: Arrow list<int64> [U], seconds since 1970.
    """

    user_names: pa.Array
    item_names: pa.Array
    item_ids: pa.Array
    timestamps: pa.Array


def sequences(data: Interactions) -> Sequences:
    """Ordered rows as one list per user.

    Ids are dense from 1 in the byte order of the source's ids. So they depend on which users and items are in the
    dataset and on nothing else, not even on the order of the input files.
    """
    user_rank, user_names = _rank(data.user, data.user_names)
    item_rank, item_names = _rank(data.item, data.item_names)
    user = user_rank[data.user]
    rows = np.argsort(user, kind="stable")
    lengths = np.bincount(user, minlength=len(user_names))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    item_ids = pa.array((item_rank[data.item] + 1).astype(np.int32)[rows])
    seconds = pa.array((data.time_ms // 1000)[rows])
    return Sequences(
        user_names,
        item_names,
        pa.ListArray.from_arrays(offsets, item_ids),
        pa.ListArray.from_arrays(offsets, seconds),
    )


def _rank(codes: np.ndarray, names: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """(code -> rank of its name among the names in use, -1 if unused; those names in order)."""
    used = np.flatnonzero(np.bincount(codes, minlength=len(names)))
    in_use = names.take(pa.array(used))
    by_name = pc.sort_indices(in_use).to_numpy()
    rank = np.full(len(names), -1, np.int32)
    rank[used[by_name]] = np.arange(len(used), dtype=np.int32)
    return rank, in_use.take(pa.array(by_name))


def concat(batches: Iterable[Batch]) -> Interactions:
    """All batches, unfiltered."""
    collector = Collector()
    for batch in batches:
        collector.add(batch)
    return collector.finish()

"""Packed rows: many prompts, and the inner nodes of their label tries, side by side in one row of tokens.

A row is a sequence of spans. A span is a prompt's body followed by the chains of its trie (`LabelTrie.chains`)::

    body of prompt 1 | "1" | "2" | body of prompt 2 | "1" | "2" | ... | filling

Every token sees the tokens before it in its own segment (a body or a chain). A chain also sees its whole body, and
where the beginning of a prompt (its prefix) was computed in another row, body and chains see that prefix. So one pass
over the row gives the output of every node of every trie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from vlrank.prompting.labels import LabelTrie

Int = npt.NDArray[np.int64]
Documents = Mapping[str, tuple[Int, Int]]
"""Bounds of queries and of keys for each call of a kernel, by name."""

_NONE: Int = np.zeros(0, dtype=np.int64)
_FILLING = 256  # attention is quadratic in the length of a segment: short ones cost the filling little
_TOKENS_PER_DOCUMENT = 64  # a row's shape has room for a document and a tail for so many tokens,
_ROOM = 256  # at most for so many, and for more where it has more


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt, or the part of one behind its prefix.

    Attributes:
        ids: Integers [T], at least one token.
        positions: int64 [3, T], rotary positions; the last token's are the greatest.
        trie: What is read at its end; None for a prefix, of which nothing is read.
        visual: int64, places in ``ids`` of visual tokens.
        pictures: Pictures in the order of their visual tokens.
        size: Tokens in a row.
        reads: Places whose output is read: the last token and the tail.
    """

    ids: npt.NDArray[np.integer[Any]]
    positions: Int
    trie: LabelTrie | None
    visual: Int = field(default_factory=lambda: _NONE)
    pictures: tuple[str, ...] = ()
    size: int = field(init=False)
    reads: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.ids) + len(self.tail))
        object.__setattr__(self, "reads", 0 if self.trie is None else 1 + len(self.tail))

    @property
    def tail(self) -> Int:
        """Tokens of the trie's chains."""
        return _NONE if self.trie is None else self.trie.chained


@dataclass(frozen=True, slots=True)
class Span:
    """Where a prompt lies in a row: its body in [start, end), its chains in [end, stop).

    Attributes:
        chains: Lengths of the chains.
    """

    start: int
    end: int
    stop: int
    chains: tuple[int, ...]

    def visible(self, queries: Sequence[int], context: int) -> npt.NDArray[np.bool_]:
        """Whether each query (a place in the row) sees each key: ``context`` of a prefix, then those of the span."""
        own = np.arange(self.start, self.stop)
        begins = np.repeat(
            [self.start, *(self.end + np.cumsum([0, *self.chains[:-1]]).astype(int) if self.chains else ())],
            [self.end - self.start, *self.chains],
        )  # where the segment of each token begins
        places = np.asarray(queries)
        segment = begins[places - self.start]
        sees = (own <= places[:, None]) & ((own >= segment[:, None]) | (own < self.end))
        return np.concatenate([np.ones((len(places), context), dtype=bool), sees], axis=1)


@dataclass(frozen=True, slots=True)
class RowShape:
    """What rows are padded to, so that all rows of one shape are computed by the very same launches.

    Attributes:
        tokens: Of the row; the last one is filling.
        reads: Places to read; the last one is of no use.
        tails, visual: Places of chains' tokens and of visual tokens; padded with the last token.
        documents: Of every list of documents; padded with empty ones.
        longest: Bound of the length of a document.
        longest_read: Bound of the reads of a prompt.
        context: Places of tokens of the prefixes that the row continues.
        longest_prefix: Bound of the length of a prefix.
        longest_behind: Bound of the tokens of the row that continue one.
    """

    tokens: int
    reads: int
    tails: int
    visual: int
    documents: int
    longest: int
    longest_read: int
    context: int = 0
    longest_prefix: int = 0
    longest_behind: int = 0

    @classmethod
    def of(cls, row: PackedRow, context: tuple[Int, Int] | None = None) -> RowShape | None:
        """The shape of a row; None where it has no token or, if anything is read, no read to spare.

        Args:
            row: The row.
            context: Bounds of its tokens, by the prefix that they continue, and of the prefixes, if any.
        """
        reads = sum(prompt.reads for prompt in row.prompts)
        if row.filled >= row.size or 0 < len(row.reads) <= reads:
            return None
        room = min(row.size // _TOKENS_PER_DOCUMENT, _ROOM)
        behind, prefixes = context or (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
        return cls(
            tokens=row.size,
            reads=len(row.reads),
            tails=_power_of_two(len(row.tails), room),
            visual=_power_of_two(len(row.visual), room),
            documents=_power_of_two(len(row.segments) - 1, room),
            longest=_power_of_two(longest(row.segments), 1024),
            longest_read=_power_of_two(max(prompt.reads for prompt in row.prompts), 128),
            context=_power_of_two(int(prefixes[-1]), 1024),
            longest_prefix=_power_of_two(longest(prefixes), 1024),
            longest_behind=_power_of_two(longest(behind), 1024),
        )


def longest(bounds: Int) -> int:
    """The length of the longest document."""
    return int(np.diff(bounds).max(initial=0))


def _power_of_two(number: int, least: int) -> int:
    """The next power of two; 0 stays 0."""
    return max(least, 1 << (number - 1).bit_length()) if number else 0


@dataclass(frozen=True)
class PackedRow:
    """Prompts packed into one row.

    Args:
        prompts: At least one.
        length: Tokens of the row, filled up; None packs without filling.
        max_reads: Places to read, filled up with place 0; None reads what the prompts need.
    """

    prompts: Sequence[PromptTokens]
    length: int | None = None
    max_reads: int | None = None

    @cached_property
    def _chains(self) -> list[tuple[int, ...]]:
        """Lengths of each prompt's chains."""
        return [() if prompt.trie is None else prompt.trie.chain_lengths for prompt in self.prompts]

    @cached_property
    def stops(self) -> Int:
        """Where each prompt's span stops."""
        return np.cumsum([prompt.size for prompt in self.prompts])

    @cached_property
    def starts(self) -> Int:
        """Where each prompt's span starts."""
        return np.append(0, self.stops[:-1])

    @cached_property
    def ends(self) -> Int:
        """Where each prompt's body ends."""
        return self.starts + np.array([len(prompt.ids) for prompt in self.prompts])

    @cached_property
    def _tails(self) -> Int:
        """Tokens of each prompt's chains."""
        return self.stops - self.ends

    @cached_property
    def _reads(self) -> Int:
        """Reads of each prompt."""
        return np.array([prompt.reads for prompt in self.prompts])

    @property
    def spans(self) -> list[Span]:
        """One per prompt."""
        places = (array.tolist() for array in (self.starts, self.ends, self.stops))
        return [Span(*span) for span in zip(*places, self._chains, strict=True)]

    @cached_property
    def filled(self) -> int:
        """Tokens of prompts."""
        return int(self.stops[-1])

    @property
    def size(self) -> int:
        """Tokens of the row."""
        return self.length or self.filled

    @cached_property
    def ids(self) -> Int:
        """int64 [size]."""
        ids = np.zeros(self.size, dtype=np.int64)
        for prompt, start in zip(self.prompts, self.starts.tolist(), strict=True):
            ids[start : start + len(prompt.ids)] = prompt.ids
        ids[self.tails] = np.concatenate([prompt.tail for prompt in self.prompts])
        return ids

    @cached_property
    def positions(self) -> Int:
        """int64 [3, size]: rotary positions; a chain goes on behind its prompt."""
        positions = np.empty((3, self.size), dtype=np.int64)
        for prompt, start in zip(self.prompts, self.starts.tolist(), strict=True):
            positions[:, start : start + len(prompt.ids)] = prompt.positions
        chains = np.array([n for chains in self._chains for n in chains], dtype=np.int64)
        behind = positions[:, self.ends - 1].max(axis=0) + 1
        positions[:, self.tails] = np.repeat(behind, self._tails) + _ranges(np.zeros_like(chains), chains)
        positions[:, self.filled :] = np.arange(self.size - self.filled) % _FILLING
        return positions

    @cached_property
    def segments(self) -> Int:
        """Bounds of all bodies, chains and pieces of filling, from 0 to ``size``."""
        lengths = [
            n for prompt, chains in zip(self.prompts, self._chains, strict=True) for n in (len(prompt.ids), *chains)
        ]
        filling = [*range(self.filled + _FILLING, self.size, _FILLING), *([self.size] * (self.size > self.filled))]
        return np.concatenate([np.cumsum([0, *lengths]), np.array(filling, dtype=np.int64)])

    @cached_property
    def tails(self) -> Int:
        """Places of all chains' tokens."""
        return _ranges(self.ends, self._tails)

    @cached_property
    def reads(self) -> Int:
        """Places whose output is read: each prompt's last token, then its tail."""
        found = _ranges(self.ends - 1, self._reads)
        return padded(found, max(self.max_reads or 0, len(found)), 0)

    @property
    def tails_in_reads(self) -> Int:
        """Which of `reads` are the chains' tokens."""
        return _ranges(np.cumsum(self._reads) - self._tails, self._tails)

    @cached_property
    def visual(self) -> Int:
        """Places of visual tokens."""
        visual = [prompt.visual for prompt in self.prompts]
        return np.concatenate(visual) + np.repeat(self.starts, [len(places) for places in visual])

    @cached_property
    def documents(self) -> Documents:
        """Bounds of queries and of keys for each call of a kernel.

        ``self``: every segment to itself; ``tails`` and ``reads``: chains, and reads, to their bodies; ``chains``: the
        chains, taken out of the row, to themselves. Keys of chains are documents without queries.
        """
        chains = np.cumsum([0, *(n for chains in self._chains for n in chains)])
        return {
            "self": (self.segments, self.segments),
            "tails": self._behind(self._tails),
            "reads": self._behind(self._tails + 1),
            "chains": (chains, chains),
        }

    def _behind(self, queries: Int) -> tuple[Int, Int]:
        """Bounds of so many queries of each prompt and of its body; those of its chains, if any, follow."""
        documents = np.where(self._tails > 0, 2, 1)
        keys = np.repeat(self.ends, documents)
        keys[np.cumsum(documents) - 1] = self.stops
        return np.append(0, np.repeat(np.cumsum(queries), documents)), np.append(0, keys)

    def arrays(self, shape: RowShape | None = None) -> dict[str, npt.NDArray[Any]]:
        """All numbers that a pass over the row is told, padded to a shape.

        Returns:
            int64 ``ids``, ``positions`` [3, size], ``reads``, ``tails``, ``tails_in_reads`` and ``visual``; int32
            bounds of `documents`, of queries and of keys, e.g. ``self queries``.
        """
        places = {"tails": self.tails, "tails_in_reads": self.tails_in_reads, "visual": self.visual}
        bounds = bounds_of(self.documents, shape)
        if shape is not None:
            sizes = {"tails": shape.tails, "tails_in_reads": shape.tails, "visual": shape.visual}
            unused = {"tails": self.size - 1, "tails_in_reads": len(self.reads) - 1, "visual": self.size - 1}
            places = {name: padded(array, sizes[name], unused[name]) for name, array in places.items()}
            # Padded tails belong to the last document that has any: what no document holds may be no number, and goes
            # on into the next layer's keys and values.
            queries = bounds["tails queries"]
            queries[queries == queries[-1]] = shape.tails
        return {"ids": self.ids, "positions": self.positions, "reads": self.reads} | places | bounds


def bounds_of(documents: Documents, shape: RowShape | None = None) -> dict[str, npt.NDArray[np.int32]]:
    """Bounds by list and side, e.g. ``self queries``, padded to a shape."""
    return {
        f"{name} {side}": padded(
            array.astype(np.int32), len(array) if shape is None else shape.documents + 1, array[-1]
        )
        for name, both in documents.items()
        for side, array in zip(("queries", "keys"), both, strict=True)
    }


def padded(array: npt.NDArray[Any], size: int, value: int) -> npt.NDArray[Any]:
    """A one-dimensional array with the value behind it, up to a size."""
    whole = np.full(size, value, dtype=array.dtype)
    whole[: len(array)] = array
    return whole


def _ranges(starts: Int, lengths: Int) -> Int:
    """The numbers from each start on, so many of each."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)

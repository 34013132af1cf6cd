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
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from vlrank.prompting.labels import LabelTrie

Int = npt.NDArray[np.int64]
Documents = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""Bounds of queries and of keys for each call of a kernel, by name."""

_FILLING = 256  # attention is quadratic in the length of a segment: short ones cost the filling little
_TOKENS_PER_DOCUMENT = 64  # a row's shape has room for a document and a tail for so many tokens,
_ROOM = 256  # at most for so many, and for more where it has more


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt, or the part of one behind its prefix.

    Attributes:
        ids: int64 [T], at least one token.
        positions: int64 [3, T], rotary positions.
        trie: What is read at its end; None for a prefix, of which nothing is read.
        visual: int64, places in ``ids`` of visual tokens.
        pictures: Pictures in the order of their visual tokens.
    """

    ids: Int
    positions: Int
    trie: LabelTrie | None
    visual: Int = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    pictures: tuple[str, ...] = ()

    @property
    def tail(self) -> tuple[int, ...]:
        """Tokens of the trie's chains."""
        return () if self.trie is None else tuple(token for chain in self.trie.chains for token in chain)

    @property
    def size(self) -> int:
        """Tokens in a row."""
        return len(self.ids) + len(self.tail)

    @property
    def reads(self) -> int:
        """Places whose output is read: the last token and the tail."""
        return 0 if self.trie is None else 1 + len(self.tail)


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
    def of(cls, row: PackedRow, context: tuple[Sequence[int], Sequence[int]] = ((0,), (0,))) -> RowShape | None:
        """The shape of a row; None where it has no token or, if anything is read, no read to spare.

        Args:
            row: The row.
            context: Bounds of its tokens, by the prefix that they continue, and of the prefixes.
        """
        reads = sum(prompt.reads for prompt in row.prompts)
        if row.filled >= row.size or 0 < len(row.reads) <= reads:
            return None
        room = min(row.size // _TOKENS_PER_DOCUMENT, _ROOM)
        return cls(
            tokens=row.size,
            reads=len(row.reads),
            tails=_power_of_two(len(row.tails), room),
            visual=_power_of_two(len(row.visual), room),
            documents=_power_of_two(len(row.segments) - 1, room),
            longest=_power_of_two(_longest(row.segments), 1024),
            longest_read=_power_of_two(max(prompt.reads for prompt in row.prompts), 128),
            context=_power_of_two(context[1][-1], 1024),
            longest_prefix=_power_of_two(_longest(context[1]), 1024),
            longest_behind=_power_of_two(_longest(context[0]), 1024),
        )


def _longest(bounds: Sequence[int]) -> int:
    return max((end - start for start, end in pairwise(bounds)), default=0)


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
    def spans(self) -> list[Span]:
        """One per prompt."""
        spans, at = [], 0
        for prompt in self.prompts:
            end = at + len(prompt.ids)
            chains = tuple(map(len, prompt.trie.chains)) if prompt.trie else ()
            spans.append(Span(at, end, end + sum(chains), chains))
            at = spans[-1].stop
        return spans

    @property
    def filled(self) -> int:
        """Tokens of prompts."""
        return self.spans[-1].stop

    @property
    def size(self) -> int:
        """Tokens of the row."""
        return self.length or self.filled

    @cached_property
    def ids(self) -> Int:
        """int64 [size]."""
        parts = [part for prompt in self.prompts for part in (prompt.ids, np.asarray(prompt.tail, dtype=np.int64))]
        return np.concatenate([*parts, np.zeros(self.size - self.filled, dtype=np.int64)])

    @cached_property
    def positions(self) -> Int:
        """int64 [3, size]: rotary positions; a chain goes on behind its prompt."""
        parts = []
        for prompt, span in zip(self.prompts, self.spans, strict=True):
            after = np.concatenate([np.arange(n) for n in span.chains]) if span.chains else np.zeros(0, dtype=np.int64)
            tail = np.tile(prompt.positions.max() + 1 + after, (3, 1))
            parts += [prompt.positions, tail]
        filling = np.tile(np.arange(self.size - self.filled), (3, 1)) % _FILLING
        return np.concatenate([*parts, filling], axis=1).astype(np.int64, copy=False)

    @cached_property
    def segments(self) -> list[int]:
        """Bounds of all bodies, chains and pieces of filling, from 0 to ``size``."""
        bounds = [0]
        for span in self.spans:
            bounds += accumulate(span.chains, initial=span.end)
        return [
            *bounds,
            *range(self.filled + _FILLING, self.size, _FILLING),
            *([self.size] * (self.size > self.filled)),
        ]

    @cached_property
    def tails(self) -> Int:
        """Places of all chains' tokens."""
        return np.concatenate([np.arange(span.end, span.stop) for span in self.spans])

    @cached_property
    def reads(self) -> Int:
        """Places whose output is read: each prompt's last token, then its tail."""
        places = [np.arange(s.end - 1, s.stop) for p, s in zip(self.prompts, self.spans, strict=True) if p.reads]
        found = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
        return np.pad(found, (0, max(0, (self.max_reads or 0) - len(found))))

    @property
    def tails_in_reads(self) -> Int:
        """Which of `reads` are the chains' tokens."""
        starts = np.cumsum([0, *(prompt.reads for prompt in self.prompts)])
        return np.concatenate(
            [np.arange(at + 1, at + prompt.reads) for at, prompt in zip(starts, self.prompts, strict=False)]
        )

    @cached_property
    def visual(self) -> Int:
        """Places of visual tokens."""
        return np.concatenate([s.start + p.visual for p, s in zip(self.prompts, self.spans, strict=True)])

    @cached_property
    def documents(self) -> Documents:
        """Bounds of queries and of keys for each call of a kernel.

        ``self``: every segment to itself; ``tails`` and ``reads``: chains, and reads, to their bodies; ``chains``: the
        chains, taken out of the row, to themselves. Keys of chains are documents without queries.
        """
        chains = [*accumulate((n for span in self.spans for n in span.chains), initial=0)]
        return {
            "self": (self.segments, self.segments),
            "tails": self._behind(ends=False),
            "reads": self._behind(ends=True),
            "chains": (chains, chains),
        }

    def _behind(self, ends: bool) -> tuple[list[int], list[int]]:
        queries, keys = [0], [0]
        for span in self.spans:
            queries.append(queries[-1] + span.stop - span.end + ends)
            keys.append(span.end)
            if span.stop > span.end:
                queries.append(queries[-1])
                keys.append(span.stop)
        return queries, keys

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
        f"{name} {side}": array if shape is None else padded(array, shape.documents + 1, array[-1])
        for name, both in documents.items()
        for side, array in zip(("queries", "keys"), (np.asarray(of, dtype=np.int32) for of in both), strict=True)
    }


def padded(array: npt.NDArray[Any], size: int, value: int) -> npt.NDArray[Any]:
    """A one-dimensional array with the value behind it, up to a size."""
    return np.pad(array, (0, size - len(array)), constant_values=value)

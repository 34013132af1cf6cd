"""Packed rows: many prompts, and the inner nodes of their label tries, side by side in one row of tokens.

A row is a sequence of spans. A span is a prompt's body followed by the chains of its trie (`LabelTrie.chains`)::

    body of prompt 1 | "1" | "2" | body of prompt 2 | "1" | "2" | ... | filling

Every token sees the tokens before it in its own segment (a body or a chain). A chain also sees its whole body, and
where the beginning of a prompt (its prefix) was computed in another row, body and chains see that prefix. So one pass
over the row gives the output of every node of every trie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from vlrank.prompting.labels import LabelTrie

Int = npt.NDArray[np.int64]

_FILLING = 256  # attention is quadratic in the length of a segment: short ones cost the filling little


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
        return np.concatenate([*parts, filling], axis=1).astype(np.int64)

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

    def behind(self, ends: bool) -> tuple[list[int], list[int]]:
        """Bounds of queries and of keys, for attention of chains to their bodies.

        Args:
            ends: Queries are `reads` (a prompt's last token and its tail) instead of `tails`.

        Returns:
            Bounds of the queries, and those of the keys in the row. Keys of chains are documents without queries.
        """
        queries, keys = [0], [0]
        for span in self.spans:
            queries.append(queries[-1] + span.stop - span.end + ends)
            keys.append(span.end)
            if span.stop > span.end:
                queries.append(queries[-1])
                keys.append(span.stop)
        return queries, keys

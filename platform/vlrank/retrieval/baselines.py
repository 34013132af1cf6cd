"""Baselines that rank the same candidate lists as the models, and the first-stage retrievers.

Every baseline scores the candidates of `Lists`; `Lists.sorted_by` then orders them, ties in the retriever's order.
All learn from the training part of the sequences only and see of a user the history before the target.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from vlrank.config import Split
from vlrank.data.lists import Floats, Ints, Lists
from vlrank.errors import UserError

if TYPE_CHECKING:
    from vlrank.data.dataset import Dataset
    from vlrank.data.items import ItemMeta

_ROWS = 8192  # users scored at once
Pair = tuple[Sequence["ItemMeta"], "ItemMeta"]
"""A history, oldest first, and one candidate."""

_DENSE = 16_000_000  # scores held at once when the whole catalogue is ranked


@dataclass(frozen=True)
class Evidence:
    """The data that a baseline may use.

    Attributes:
        n_items: Items have ids 1..n_items.
        train: user_id -> training items, oldest first.
        histories: user_id -> items before the target, oldest first.
        texts: Item texts at [item_id - 1].
        max_history: Number of recent items that make a text query.
        seed: Seed of all random draws.
        embed: Unit-length embeddings of texts, float32 [texts, width]; None without such a model.
        ask: log P("Yes") of (history, candidate) pairs, float32 [pairs]; None without such a model.
        item_meta: Loads what modes show of the items.
    """

    n_items: int
    train: Mapping[int, Sequence[int]]
    histories: Mapping[int, Sequence[int]]
    texts: Sequence[str] = ()
    max_history: int = 20
    seed: int = 0
    embed: Callable[[Sequence[str]], NDArray[np.float32]] | None = None
    ask: Callable[[Sequence[Pair]], NDArray[np.float32]] | None = None
    item_meta: Callable[[], Mapping[int, ItemMeta]] = dict

    @classmethod
    def of(cls, dataset: Dataset, split: Split, **options: Any) -> Evidence:
        """The data before the targets of a split; ``options`` are attributes that the dataset does not hold."""
        return cls(
            n_items=dataset.n_items,
            train=dataset.train_sequences(),
            histories={user: history for user, (history, _) in dataset.histories(split).items()},
            texts=dataset.items()["text"].fill_null("").to_list(),
            item_meta=dataset.item_meta,
            **options,
        )

    @cached_property
    def train_matrix(self) -> sp.csr_matrix:
        """float32 [training users, n_items + 1], 1 where a user had an item; column 0 stays empty."""
        return self.matrix(list(self.train.values()))

    @cached_property
    def popularity(self) -> Ints:
        """int64 [n_items + 1]: training interactions of each item."""
        lists = Lists.from_dict(dict(enumerate(self.train.values())))
        return np.bincount(lists.items, minlength=self.n_items + 1)

    def matrix(self, sequences: Sequence[Sequence[int]]) -> sp.csr_matrix:
        """float32 [len(sequences), n_items + 1]: 1 where a sequence holds an item."""
        lists = Lists.from_dict(dict(enumerate(sequences)))
        shape = (len(sequences), self.n_items + 1)
        rows = sp.csr_matrix((np.ones(len(lists.items), np.float32), lists.items, lists.offsets), shape=shape)
        rows.sum_duplicates()
        rows.data[:] = 1
        return rows

    def history_matrix(self, users: Ints) -> sp.csr_matrix:
        """`matrix` of these users' histories; a user without history has an empty row."""
        return self.matrix([self.histories.get(int(user), ()) for user in users])

    @cached_property
    def item_similarity(self) -> sp.csr_matrix:
        """Item-item cosine over training users, each item's 100 nearest (Sarwar et al. 2001), from `implicit`."""
        from implicit.nearest_neighbours import CosineRecommender

        model = CosineRecommender(K=100, num_threads=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # implicit warns about its own conversion
            model.fit(self.train_matrix, show_progress=False)
        return model.similarity.tocsr().astype(np.float32)

    @cached_property
    def als(self) -> Any:
        """Weighted matrix factorisation by alternating least squares (Hu et al. 2008), from `implicit`."""
        from implicit.cpu.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        with threadpool_limits(1, "blas"):  # BLAS threads would compete with implicit's own
            model = AlternatingLeastSquares(factors=64, regularization=0.05, iterations=15, random_state=self.seed)
            model.fit(self.train_matrix, show_progress=False)
        return model

    def als_users(self, users: Ints) -> NDArray[np.float32]:
        """float32 [U, factors]: factors of users, solved from their histories against the fixed items."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):
            history = self.history_matrix(users)
            return np.asarray(self.als.recalculate_user(np.arange(len(users)), history), np.float32)

    @cached_property
    def bm25(self) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """BM25 weights (Lucene's variant, k1 1.5, b 0.75) and term counts, float32 [n_items, terms]; from `bm25s`."""
        import bm25s

        tokens = bm25s.tokenize(list(self.texts), stopwords="en", show_progress=False)
        if not any(tokens.ids):  # no text at all: everything scores 0
            nothing = sp.csr_matrix((len(self.texts), 1), dtype=np.float32)
            return nothing, nothing
        index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        index.index(tokens, show_progress=False)
        scores = index.scores
        shape = (len(self.texts), len(scores["indptr"]) - 1)
        weights = sp.csc_matrix((scores["data"], scores["indices"], scores["indptr"]), shape=shape)
        lists = Lists.from_dict(dict(enumerate(tokens.ids)))
        counts = sp.csr_matrix((np.ones(len(lists.items), np.float32), lists.items, lists.offsets), shape=shape)
        counts.sum_duplicates()
        return weights.tocsr(), counts

    @cached_property
    def embeddings(self) -> NDArray[np.float32]:
        """float32 [n_items, width]: unit-length text embeddings."""
        if self.embed is None:
            raise UserError(
                "the embedding baseline needs `embedding_model`", "Example: embedding_model=BAAI/bge-small-en-v1.5"
            )
        return self.embed(self.texts)


Scorer = Callable[[Evidence, Lists], Floats]


def identity(evidence: Evidence, lists: Lists) -> Floats:
    """The retriever's order."""
    return -lists.positions().astype(np.float64)


def random(evidence: Evidence, lists: Lists) -> Floats:
    """A seeded random order; see `vlrank.evaluation.metrics.expected_random` for its exact expectation."""
    return np.random.default_rng(evidence.seed).random(len(lists.items))


def popularity(evidence: Evidence, lists: Lists) -> Floats:
    """Training interactions of the candidate."""
    return evidence.popularity[lists.items].astype(np.float64)


def item_knn(evidence: Evidence, lists: Lists) -> Floats:
    """Sum of the candidate's cosine similarities to the items of the history."""
    similarity = evidence.item_similarity
    scores = np.zeros(len(lists.items))
    for rows, span in _blocks(lists):
        known = (evidence.history_matrix(lists.users[rows]) @ similarity).tocsr()
        scores[span] = np.asarray(known[lists.segments()[span] - rows.start, lists.items[span]]).ravel()
    return scores


def als(evidence: Evidence, lists: Lists) -> Floats:
    """Inner product of user and item factors."""
    scores = np.zeros(len(lists.items))
    for rows, span in _blocks(lists):
        users = evidence.als_users(lists.users[rows])[lists.segments()[span] - rows.start]
        scores[span] = np.einsum("nf,nf->n", users, evidence.als.item_factors[lists.items[span]])
    return scores


def bm25(evidence: Evidence, lists: Lists) -> Floats:
    """BM25 of the candidate's text for a query made of the texts of the recent history."""
    weights, counts = evidence.bm25
    scores = np.zeros(len(lists.items))
    for rows, span in _blocks(lists, users=1024):
        queries = _recent(evidence, lists.users[rows]) @ counts
        pairs = queries[lists.segments()[span] - rows.start].multiply(weights[lists.items[span] - 1])
        scores[span] = np.asarray(pairs.sum(axis=1)).ravel()
    return scores


def embedding(evidence: Evidence, lists: Lists) -> Floats:
    """Cosine of the candidate's text embedding to the mean embedding of the recent history."""
    scores = np.zeros(len(lists.items))
    for rows, span in _blocks(lists):
        profile = _recent(evidence, lists.users[rows]) @ evidence.embeddings
        profile /= np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-12)
        users = profile[lists.segments()[span] - rows.start]
        scores[span] = np.einsum("nf,nf->n", users, evidence.embeddings[lists.items[span] - 1])
    return scores


def pointwise(evidence: Evidence, lists: Lists) -> Floats:
    """Log-probability that a language model answers "Yes" when asked about the history and this candidate alone."""
    if evidence.ask is None:
        raise UserError("the pointwise baseline needs `pointwise_model`", "Example: pointwise_model=Qwen/Qwen3-0.6B")
    meta = evidence.item_meta()
    histories = [[meta[item] for item in evidence.histories.get(int(user), ())] for user in lists.users]
    pairs = [(histories[row], meta[int(item)]) for row, item in zip(lists.segments(), lists.items, strict=True)]
    return evidence.ask(pairs).astype(np.float64)


BASELINES: dict[str, Scorer] = {
    "identity": identity,
    "random": random,
    "popularity": popularity,
    "item_knn": item_knn,
    "als": als,
    "bm25": bm25,
    "embedding": embedding,
    "pointwise": pointwise,
}
"""By the name used in configs and reports."""


def rank(name: str, evidence: Evidence, lists: Lists) -> Lists:
    """The lists in the order of a baseline, with its scores.

    Raises:
        UserError: unknown baseline, or one that lacks its model.
    """
    if name not in BASELINES:
        raise UserError(f"unknown baseline {name!r}", f"Choose from: {', '.join(BASELINES)}.")
    return lists.sorted_by(BASELINES[name](evidence, lists))


def retrieve(name: str, evidence: Evidence, users: Ints, top_k: int) -> Lists:
    """The best ``top_k`` of all items for each user, history excluded; equal scores by popularity, then by item id.

    Args:
        name: ``popularity``, ``item_knn`` or ``als``.
        evidence: The data.
        users: int64 [U].
        top_k: List length; shorter where the catalogue has too few unseen items.

    Returns:
        Lists with float32 scores; items without any evidence follow by popularity with score 0 (item_knn).
    """
    # Columns are in the order of popularity and sorted stably, so popularity breaks all ties.
    order = np.lexsort((np.arange(1, evidence.n_items + 1), -evidence.popularity[1:])) + 1
    blocks = []
    step = max(1, _DENSE // (evidence.n_items + 1))
    for start in range(0, len(users), step):
        block = users[start : start + step]
        history = evidence.history_matrix(block)
        if name == "popularity":
            scores = np.broadcast_to(evidence.popularity.astype(np.float32), (len(block), evidence.n_items + 1))
        elif name == "item_knn":
            scores = (history @ evidence.item_similarity).toarray()
        elif name == "als":
            scores = evidence.als_users(block) @ np.asarray(evidence.als.item_factors, np.float32).T
        else:
            raise UserError(
                f"unknown retriever {name!r}", "Choose popularity, item_knn or als, or give a file to import."
            )
        scores = scores[:, order]
        scores[history[:, order].toarray() > 0] = -np.inf
        blocks.append(_top(scores, order, min(top_k, evidence.n_items)))
    items = np.concatenate([items for items, _ in blocks])
    values = np.concatenate([values for _, values in blocks])
    width = items.shape[1]
    lists = Lists(users, np.arange(len(users) + 1) * width, items.ravel(), values.ravel())
    return lists.keep(np.isfinite(values).ravel())


def _top(scores: NDArray[np.float32], order: Ints, k: int) -> tuple[Ints, NDArray[np.float32]]:
    """The k best columns of each row, exactly as a full stable sort would give them, but sorting only about k."""
    threshold = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k]
    above = scores > threshold[:, None]
    # Of the columns equal to the k-th score only the first (most popular) ones fit.
    equal = scores == threshold[:, None]
    fits = np.cumsum(equal, axis=1) <= (k - above.sum(axis=1))[:, None]
    _, columns = np.nonzero(above | (equal & fits))
    columns = columns.reshape(len(scores), k)
    chosen = np.take_along_axis(scores, columns, axis=1)
    best = np.argsort(-chosen, axis=1, kind="stable")
    return order[np.take_along_axis(columns, best, axis=1)], np.take_along_axis(chosen, best, axis=1)


def _recent(evidence: Evidence, users: Ints) -> sp.csr_matrix:
    """float32 [U, n_items]: which items are among a user's most recent ones."""
    recent = [evidence.histories.get(int(user), ())[-evidence.max_history :] for user in users]
    return evidence.matrix(recent)[:, 1:]


def _blocks(lists: Lists, users: int = _ROWS) -> Iterator[tuple[slice, slice]]:
    """Rows and the items' span of blocks of users."""
    for start in range(0, len(lists.users), users):
        stop = min(start + users, len(lists.users))
        yield slice(start, stop), slice(int(lists.offsets[start]), int(lists.offsets[stop]))

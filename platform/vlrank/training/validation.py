"""Validation: ranks read from the label trie (never by generating text), and the metrics made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vlrank.data.lists import rank_by_score
from vlrank.evaluation.metrics import evaluate_ranks
from vlrank.prompting.encoding import PromptTooLong
from vlrank.prompting.prior import with_prior
from vlrank.training.samples import Sample

if TYPE_CHECKING:
    from vlrank.data.items import ItemMeta
    from vlrank.prompting.encoding import Encoded, Encoder


def rank_metrics(ranks: npt.ArrayLike, metrics: Sequence[str]) -> dict[str, float]:
    """Metrics of single relevant items, by the definitions of `vlrank.evaluation.metrics`.

    Args:
        ranks: [users], from 1; infinity for a target that is not among the candidates.
        metrics: e.g. ``["recall@10", "ndcg@10", "mrr@10"]``.

    >>> rank_metrics([1, 3, float("inf"), 2], ["recall@2", "mrr@10"])
    {'recall@2': 0.5, 'mrr@10': 0.4583333333333333}
    """
    rank = np.asarray(ranks, dtype=np.float64)
    listed = np.where(np.isfinite(rank), rank, 0).astype(np.int64)
    ks = sorted({int(metric.partition("@")[2]) for metric in metrics})
    means = evaluate_ranks(listed, ks=ks, bootstrap=0).means
    return {metric: means[metric] for metric in metrics}


def encode_samples(
    samples: Sequence[Sample], item_meta: Mapping[int, ItemMeta], encoder: Encoder
) -> tuple[list[Encoded | None], list[tuple[int, str, str]]]:
    """The prompts of the samples, encoded once for all evaluations.

    Returns:
        One prompt per sample, None where there is none to score (the retriever missed the target, or the prompt cannot
        be made), and (user, error type, message) of the latter.
    """
    prompts: list[Encoded | None] = []
    bad: list[tuple[int, str, str]] = []
    for sample in samples:
        prompts.append(None)
        if not sample.label:
            continue
        history = [item_meta[item] for item in sample.history]
        candidates = [item_meta[item] for item in sample.candidates]
        try:
            prompts[-1] = encoder.encode(history, candidates)
        except (PromptTooLong, OSError, ValueError) as error:
            bad.append((sample.user_id, type(error).__name__, str(error)))
    return prompts, bad


def validation_scores(
    prompts: Sequence[Encoded | None],
    score: Callable[[list[Encoded]], list[npt.NDArray[np.float32]]],
    tokens_at_once: int,
) -> list[npt.NDArray[np.float32] | None]:
    """Log-probabilities of every prompt's labels, None where there is no prompt.

    Args:
        prompts: From `encode_samples`.
        score: Prompts -> log-probabilities of their labels, in one pass.
        tokens_at_once: Padded tokens per pass at most; a longer prompt goes alone.
    """
    scores: list[npt.NDArray[np.float32] | None] = [None] * len(prompts)
    present = [(i, prompt) for i, prompt in enumerate(prompts) if prompt is not None]
    for chunk in _passes(sorted(present, key=lambda pair: len(pair[1].ids)), tokens_at_once):
        for (i, _), answer in zip(chunk, score([prompt for _, prompt in chunk]), strict=True):
            scores[i] = answer
    return scores


def target_ranks(
    samples: Sequence[Sample],
    scores: Sequence[npt.NDArray[np.float32] | None],
    priors: Sequence[npt.NDArray[np.float64]] | None = None,
) -> npt.NDArray[np.float64]:
    """Ranks of the targets, float64 [samples]; infinity where there are no scores, so that all models face all users.

    Args:
        samples: Fixed validation samples.
        scores: From `validation_scores`.
        priors: `log_prior` of each sample's candidates.
    """
    ranks = np.full(len(samples), np.inf)
    for i, (sample, answer) in enumerate(zip(samples, scores, strict=True)):
        if answer is not None:
            ranks[i] = rank_by_score(with_prior(answer, priors[i]) if priors else answer, sample.label - 1)
    return ranks


def _passes(rising: list[tuple[int, Encoded]], tokens: int) -> Iterator[list[tuple[int, Encoded]]]:
    chunk: list[tuple[int, Encoded]] = []
    for pair in rising:
        if chunk and (len(chunk) + 1) * len(pair[1].ids) > tokens:
            yield chunk
            chunk = []
        chunk.append(pair)
    if chunk:
        yield chunk

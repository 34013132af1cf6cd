"""``vlrank evaluate`` up to the report: which rankings may be compared, their metrics, rivals, tests and findings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vlrank.config import EvaluateConfig, Split
from vlrank.console import progress
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Ints, Lists
from vlrank.errors import UserError
from vlrank.evaluation.checks import Finding, check_candidates, check_order, check_times
from vlrank.evaluation.compare import Difference, compare_ranks, corrected
from vlrank.evaluation.groups import RETRIEVER, Group, Histories, Method, Protocol, group_by_candidates
from vlrank.evaluation.metrics import evaluate_ranks, expected_random
from vlrank.evaluation.rankings import ModelRankings, read_rankings
from vlrank.evaluation.slices import slices
from vlrank.retrieval import baselines
from vlrank.storage import Location

Model = tuple[ModelRankings, Lists]
"""A model's rankings as read, and its lists of the group's users."""


def evaluate(config: EvaluateConfig, dataset: Dataset) -> list[Group]:
    """All groups of rankings, evaluated.

    Raises:
        UserError: unreadable rankings, rankings of another dataset, unknown baselines or methods to compare.
    """
    unknown = [name for name in config.baselines if name not in baselines.BASELINES]
    if unknown:
        raise UserError(f"unknown baseline {unknown[0]!r}", f"Choose from: {', '.join(baselines.BASELINES)}.")
    if "embedding" in config.baselines and config.embedding_model is None:
        raise UserError(
            "the embedding baseline needs `embedding_model`", "Example: embedding_model=BAAI/bge-small-en-v1.5"
        )
    if "pointwise" in config.baselines and config.pointwise_model is None:
        raise UserError("the pointwise baseline needs `pointwise_model`", "Example: pointwise_model=Qwen/Qwen3-0.6B")
    rankings = read_rankings(config.rankings, dataset, config.split)
    steps_each = 1 + len(config.baselines)
    groups = []
    with progress("evaluate", len(rankings) * steps_each) as bar:
        for split in sorted({ranking.split for ranking in rankings}):  # test before val
            histories = dataset.histories(split)
            tables = _candidate_tables(config, dataset, split)
            of_split = [ranking for ranking in rankings if ranking.split == split]
            for members, name in group_by_candidates(of_split, tables, histories, config.candidates):
                groups.append(_evaluate_group(config, dataset, members, name, tables, histories))
                bar.advance(len(members) * steps_each)
    return groups


def _candidate_tables(config: EvaluateConfig, dataset: Dataset, split: Split) -> dict[str, Lists]:
    """The candidates tables that may have been ranked, those of the split, by name."""
    names = [config.candidates] if config.candidates else dataset.candidate_names()
    tables = {name: dataset.candidates(name).filter(pl.col("split") == split) for name in names}
    return {name: Lists.from_frame(table) for name, table in tables.items() if not table.is_empty()}


def _evaluate_group(
    config: EvaluateConfig,
    dataset: Dataset,
    rankings: Sequence[ModelRankings],
    name: str | None,
    tables: Mapping[str, Lists],
    histories: Histories,
) -> Group:
    """Evaluate rankings of the same candidates; ``name`` is that of their candidates table."""
    split = rankings[0].split

    # The users that every model ranks, their targets, and what was ranked for them.
    users, findings = _common_users(rankings, histories, split)
    targets = np.array([histories[int(user)][1] for user in users], np.int64)
    models: list[Model] = [(ranking, ranking.lists.for_users(users)) for ranking in rankings]
    table = None if name is None else tables[name].for_users(users)
    base = _ranked_candidates(models, table, config.seed)
    protocol = config.protocol if config.protocol != "auto" else _protocol(base, targets, name)

    # What to know when reading the numbers: candidates, each model's file, order and items, and times.
    evidence = _evidence(config, dataset, split)
    findings += _candidate_findings(config, dataset, models, name, base, targets, histories, protocol)
    for ranking, lists in models:
        findings += [*ranking.findings(), *check_order(lists, ranking.name), *_shorter(lists, base, ranking.name)]
    findings += check_times(dataset.sequences(), split, {int(user): len(histories[int(user)][0]) for user in users})

    # Metrics of the models, then of their rivals on the very same candidates.
    def measured(shown: str, lists: Lists, file: Location | None = None) -> Method:
        ranks = lists.rank_of(targets)
        metrics = evaluate_ranks(ranks, users, ks=config.ks, bootstrap=config.bootstrap, seed=config.seed)
        expected = expected_random(base.lengths, base.rank_of(targets) > 0, config.ks) if shown == "random" else None
        return Method(shown, "baseline" if file is None else "model", lists, metrics, file, expected)

    # Without a candidates table nobody knows the retriever's order.
    rivals = [rival for rival in config.baselines if rival != RETRIEVER or table is not None]
    methods = [measured(ranking.name, lists, ranking.file) for ranking, lists in models]
    methods += [measured(rival, baselines.rank(rival, evidence, base)) for rival in rivals]

    return Group(
        split=split,
        protocol=protocol,
        candidates=name,
        users=users,
        targets=targets,
        base=base,
        ordered=table is not None,
        methods=methods,
        differences=_differences(config, methods),
        slices=slices(config, dataset, evidence, users, targets, methods),
        findings=findings,
    )


def _common_users(rankings: Sequence[ModelRankings], histories: Histories, split: Split) -> tuple[Ints, list[Finding]]:
    """The users with a target and a ranking by every model, and findings about those left out."""
    findings = []
    everyone = np.fromiter(histories, np.int64, len(histories))
    users = everyone
    for ranking in rankings:
        users = np.intersect1d(users, ranking.lists.users)
        strangers = int((~np.isin(ranking.lists.users, everyone)).sum())
        if strangers:
            message = f"{ranking.name}: {strangers:,} rankings of users without a {split} target are left out"
            findings.append(Finding("users", "warning", message, strangers, len(ranking.lists.users)))
    if not len(users):
        names = " and ".join(ranking.name for ranking in rankings)
        raise UserError(
            f"no {split} user has a target and a ranking by {names}", "Rank the same users with every model."
        )
    for ranking in rankings:
        missing = int((~np.isin(ranking.lists.users[np.isin(ranking.lists.users, everyone)], users)).sum())
        if missing:
            message = f"{ranking.name}: {missing:,} of its users are left out because another ranking lacks them"
            findings.append(Finding("users", "warning", message, missing, len(ranking.lists.users)))
    if len(users) < len(everyone):
        message = f"{len(users):,} of the {len(everyone):,} {split} users are evaluated; the others have no ranking"
        findings.append(Finding("users", "note", message, len(users), len(everyone)))
    return users, findings


def _ranked_candidates(models: Sequence[Model], table: Lists | None, seed: int) -> Lists:
    """The candidates of the models: in the retriever's order if the table is known, else in a seeded random order.

    A table with longer lists is cut to the longest ranking if its head holds all that is ranked. Without a table the
    longest rankings are taken for the candidates and shuffled: a model's order must not break its rivals' ties.
    """
    if table is not None:
        longest = max(int(lists.lengths.max(initial=0)) for _, lists in models)
        head = table.head(longest)
        complete = all(head.contains(np.repeat(lists.users, lists.lengths), lists.items).all() for _, lists in models)
        return head if complete else table
    most = max((lists for _, lists in models), key=lambda lists: len(lists.items))
    shuffled = most.sorted_by(np.random.default_rng(seed + 1).random(len(most.items)))
    return Lists(shuffled.users, shuffled.offsets, shuffled.items)


def _protocol(base: Lists, targets: Ints, name: str | None) -> Protocol:
    """``retrieval`` with a candidates table; without one, ``ground_truth`` if nearly every target is listed."""
    listed = base.rank_of(targets) > 0
    return "ground_truth" if name is None and listed.mean() > 0.98 else "retrieval"


def _candidate_findings(
    config: EvaluateConfig,
    dataset: Dataset,
    models: Sequence[Model],
    name: str | None,
    base: Lists,
    targets: Ints,
    histories: Histories,
    protocol: Protocol,
) -> list[Finding]:
    """Targets that were put in, candidates other than the requested ones, and the checks of the lists themselves."""
    findings = []
    retrieved = base.rank_of(targets) > 0
    for ranking, lists in models if name is not None else ():
        added = int(((lists.rank_of(targets) > 0) & ~retrieved).sum())
        if added:
            message = (
                f"{ranking.name}: {added:,} targets are ranked that candidates/{name} does not hold: they were put in"
            )
            findings.append(Finding("target_injected", "error", message, added, len(targets)))
    if config.candidates and name is None:
        first = models[0][0]
        other = "the target among sampled items" if first.declared == "ground_truth" else "other items"
        message = f"{first.name}: not made from candidates/{config.candidates}: it ranks {other}"
        findings.append(Finding("candidates", "error", message, len(targets), len(targets)))
    findings += check_candidates(
        base,
        targets,
        {user: history for user, (history, _) in histories.items()},
        name="candidates",
        expected=max(int(lists.lengths.max(initial=0)) for _, lists in models),
        titles=dataset.items()["title"].fill_null("").to_list(),
        protocol=protocol,
        n_items=dataset.n_items,
    )
    return findings


def _shorter(lists: Lists, base: Lists, name: str) -> list[Finding]:
    fewer = int((lists.lengths < base.lengths).sum())
    if not fewer:
        return []
    message = f"{name}: ranks fewer items than there are candidates for {fewer:,} of {len(lists.users):,} users"
    return [Finding("short_lists", "warning", message, fewer, len(lists.users))]


def main_metrics(ks: Sequence[int], length: int) -> tuple[str, str, str]:
    """The metrics that are tested and shown first: NDCG, Recall and MRR at 10 or the nearest useful cut-off.

    With 10 candidates Recall@10 is 1 for every order, so the cut-off stays below the length of the lists.
    """
    useful = [k for k in sorted(ks) if k < max(length, 2)] or [min(ks)]
    k = max([k for k in useful if k <= 10] or useful[:1])
    return f"ndcg@{k}", f"recall@{k}", f"mrr@{k}"


def _differences(config: EvaluateConfig, methods: Sequence[Method]) -> list[Difference]:
    """Every model against every other method; the retriever first."""
    length = max(int(method.lists.lengths.max(initial=0)) for method in methods)
    metrics = main_metrics(config.ks, length)
    rivals = sorted(methods, key=lambda method: (method.name != RETRIEVER, method.kind == "model"))
    result: list[Difference] = []
    for place, model in enumerate(methods):
        if model.kind != "model":
            continue
        earlier = {method.name for method in methods[:place] if method.kind == "model"}
        for rival in rivals:
            if rival is model or rival.name in earlier:
                continue
            result += compare_methods(config, model, rival, metrics)
    return corrected(result)


def compare_methods(config: EvaluateConfig, a: Method, b: Method, metrics: Sequence[str]) -> list[Difference]:
    """The paired differences of two methods of one group."""
    return compare_ranks(
        a.metrics.ranks,
        b.metrics.ranks,
        names=(a.name, b.name),
        metrics=metrics,
        ks=config.ks,
        bootstrap=config.bootstrap,
        seed=config.seed,
    )


def _evidence(config: EvaluateConfig, dataset: Dataset, split: Split) -> baselines.Evidence:
    """What rivals may look at; the rooms of their models are imported only if a model is given."""
    embed: Callable[[Sequence[str]], NDArray[np.float32]] | None = None
    ask: Callable[[Sequence[baselines.Pair]], NDArray[np.float32]] | None = None
    if config.embedding_model is not None:
        from vlrank.reranking.embeddings import embed_texts

        embed = partial(embed_texts, config.embedding_model)
    if config.pointwise_model is not None:
        from vlrank.reranking.pointwise import yes_log_probs

        ask = partial(yes_log_probs, config.pointwise_model, config.pointwise_mode, max_history=config.max_history)
    return baselines.Evidence.of(dataset, split, seed=config.seed, max_history=config.max_history, embed=embed, ask=ask)

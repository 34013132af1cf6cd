"""Reading rankings, finding out what they were made from, and computing everything a report shows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vlrank.config import EvaluateConfig, Split
from vlrank.console import console, progress
from vlrank.data import schemas
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Ints, Lists
from vlrank.data.tables import read_parquet
from vlrank.errors import UserError
from vlrank.evaluation.checks import Finding, check_candidates, check_order, check_times
from vlrank.evaluation.compare import Difference, compare_ranks, corrected
from vlrank.evaluation.metrics import Metrics, evaluate_ranks, expected_random
from vlrank.retrieval import baselines
from vlrank.retrieval.importing import read_candidates
from vlrank.storage import Location, fetch

Protocol = Literal["ground_truth", "retrieval"]
RETRIEVER = "identity"


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


@dataclass(frozen=True, slots=True)
class _Run:
    """One split of one source of one file."""

    name: str
    split: Split
    lists: Lists
    file: Location
    declared: str | None
    repeated: Ints  # users whose list named an item again, once per item that was dropped
    rejected: dict[str, int]  # what its file holds beside it, by kind of error


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
    runs = read_rankings(config.rankings, dataset, config.split)
    groups = []
    steps = len(runs) * (1 + len(config.baselines))
    with progress("evaluate", steps) as bar:
        for split in sorted({run.split for run in runs}):  # test before val
            histories = dataset.histories(split)
            candidates = _candidate_tables(config, dataset, split)
            same_split = [run for run in runs if run.split == split]
            for members, name in _alike(same_split, candidates, histories, config.candidates):
                groups.append(_evaluate_group(config, dataset, members, name, candidates, histories))
                bar.advance(len(members) * (1 + len(config.baselines)))
    return groups


def read_rankings(files: Sequence[Location], dataset: Dataset, split: Split = "test") -> list[_Run]:
    """The files' rankings, one entry per split and source, with distinct names.

    Besides Parquet files of `vlrank rerank` these may be what `read_candidates` reads: TREC runs, JSONL, text.

    Args:
        files: The rankings.
        dataset: Gives the ids.
        split: The split of files that do not say it, nor what `vlrank rerank` wrote beside them.

    Raises:
        UserError: unreadable, empty, of another dataset, or with two rankings of one user.
    """
    found: list[tuple[str, Split, Lists, Location, Ints, dict[str, int]]] = []
    for file in files:
        table, rejected = _read_table(file, dataset, split)
        if table.is_empty():
            raise UserError(f"rankings {file} are empty", "Make them with `vlrank rerank`.")
        for (part_of, source), part in table.group_by(["split", "source"], maintain_order=True):
            if part_of not in ("val", "test"):
                raise UserError(f"rankings {file} have the split {part_of!r}; val or test is expected")
            if part["user_id"].n_unique() != len(part):
                raise UserError(f"rankings {file} hold several rankings of a user of {part_of} by {source}")
            lists = Lists.from_frame(part.sort("user_id"))
            if len(lists.items) and not (lists.items.min() >= 1 and lists.items.max() <= dataset.n_items):
                raise UserError(
                    f"rankings {file} hold items that {dataset.path} lacks (its ids are 1 to {dataset.n_items})",
                    "They were made from another dataset.",
                )
            # An item that is named again would push the others down, and the list has no more places than candidates.
            again = lists.duplicates()
            repeated = lists.users[lists.segments()[again]]
            found.append((str(source or file.stem), part_of, lists.keep(~again), file, repeated, rejected))
    names = _names([(source, part_of, file) for source, part_of, _, file, *_ in found])
    return [
        _Run(name, part_of, lists, file, _declared(source), repeated, rejected)
        for name, (source, part_of, lists, file, repeated, rejected) in zip(names, found, strict=True)
    ]


def _read_table(file: Location, dataset: Dataset, split: Split) -> tuple[pl.DataFrame, dict[str, int]]:
    """The rankings of a file, and how much of it could not be used, by kind of error."""
    if not file.is_file():
        raise UserError(f"rankings {file} do not exist", "Make them with `vlrank rerank`.")
    local = fetch(file)
    if file.suffix == ".parquet" and _is_ours(local):
        return read_parquet(local, schemas.RANKINGS), {}
    said = _said_beside(file)
    split = said["split"] if said.get("split") in ("val", "test") else split
    source = str(said.get("source") or file.stem)
    read = read_candidates(local, dataset, split=split)
    for note in (f"{label} {text}" for label, text in read.notes.items() if label != "read as"):
        console.print(f"{file.name}: {note}", markup=False)
    return read.table.with_columns(source=pl.lit(source)), Counter(row["error_type"] for row in read.rejected)


def _said_beside(file: Location) -> dict[str, Any]:
    """What `vlrank rerank` wrote to ``OUT.json``: a TREC run cannot say its split and candidates itself."""
    beside = file.with_name(file.name + ".json")
    try:
        said = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _is_ours(file: Path) -> bool:
    try:
        return "source" in pl.read_parquet_schema(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"rankings {file} are not a readable Parquet file: {error}") from None


def _declared(source: str) -> str | None:
    """What `vlrank rerank` says it ranked: ``sasrec`` of ``qwen3vl/caption candidates=sasrec windows=20/10``.

    ``ground_truth`` of sampled candidates, which it did not say in earlier versions.
    """
    said = [word.removeprefix("candidates=") for word in source.split() if word.startswith("candidates=")]
    return said[0] if said else None


def _names(found: Sequence[tuple[str, Split, Location]]) -> list[str]:
    """Short and distinct: without what all sources share (``qwen3vl/``) and what the protocol says."""
    words = [[word for word in source.split() if not word.startswith("candidates=")] for source, _, _ in found]
    families = {head.partition("/")[0] if "/" in head else None for head, *_ in words}
    shared = len(families) == 1 and None not in families
    named = [" ".join([head.partition("/")[2] if shared else head, *options]) for head, *options in words]
    keys = [
        (name, split, _declared(source) or "ground_truth")
        for name, (source, split, _) in zip(named, found, strict=True)
    ]
    names: list[str] = []
    used: set[tuple[str, str]] = set()
    for key, (_, split, file) in zip(keys, found, strict=True):
        name = key[0]
        alike = [other.stem for its_key, (_, _, other) in zip(keys, found, strict=True) if its_key == key]
        if len(alike) > 1 and len(set(alike)) == len(alike) and file.stem not in baselines.BASELINES:
            name = file.stem  # one mode several times, as before and after training: the files say which is which
        elif len(alike) > 1 or name in baselines.BASELINES:
            name = f"{name} ({file.stem})"
        while (name, split) in used:
            name += "'"
        used.add((name, split))
        names.append(name)
    return names


def _candidate_tables(config: EvaluateConfig, dataset: Dataset, split: Split) -> dict[str, Lists]:
    names = [config.candidates] if config.candidates else dataset.candidate_names()
    tables = {name: dataset.candidates(name).filter(pl.col("split") == split) for name in names}
    return {name: Lists.from_frame(table) for name, table in tables.items() if not table.is_empty()}


def _alike(
    runs: Sequence[_Run],
    candidates: Mapping[str, Lists],
    histories: Mapping[int, tuple[list[int], int]],
    asked: str | None,
) -> list[tuple[list[_Run], str | None]]:
    """Runs with the same candidates, and the candidates table they come from."""
    groups: list[tuple[list[_Run], str | None]] = []
    for run in runs:
        # What the rankings say comes first; it is believed only if the table holds their items.
        tables = {} if run.declared == "ground_truth" else candidates
        names = sorted(tables, key=lambda name, run=run: name != run.declared)  # type: ignore[misc]
        said = (run.declared, asked)
        name = next((name for name in names if _made_from(run.lists, tables[name], histories, name in said)), None)
        for members, other in groups:
            one, two = run.lists, members[0].lists
            if name == other and (name or _within(one, two, {}) or _within(two, one, {})):
                members.append(run)
                break
        else:
            groups.append(([run], name))
    return groups


def _made_from(ranked: Lists, table: Lists, histories: Mapping[int, tuple[list[int], int]], said: bool) -> bool:
    """Whether the rankings are of these candidates, for certain if somebody said so.

    Otherwise a table with nearly all of a small catalogue would claim any ranking, sampled candidates among them, and
    rivals would have to find the target among more items than the model: longer lists must begin with what is ranked.
    """
    if not _within(ranked, table, histories):
        return False
    if said:
        return True
    users = np.intersect1d(ranked.users, table.users)
    lengths = ranked.for_users(users).lengths
    if np.median(table.for_users(users).lengths) <= 2 * np.median(lengths):
        return True
    return _within(ranked, table.head(int(lengths.max())), histories)


def _within(inner: Lists, outer: Lists, histories: Mapping[int, tuple[list[int], int]]) -> bool:
    """Whether the lists hold only candidates of the others (targets aside: they may have been put in)."""
    common = np.isin(inner.users, outer.users)
    if not common.any():
        return False
    part = inner.take(np.flatnonzero(common)[:5000])
    users = np.repeat(part.users, part.lengths)
    inside = outer.for_users(part.users).contains(users, part.items)
    if histories:
        targets = np.array([histories[int(user)][1] if int(user) in histories else 0 for user in part.users])
        inside |= part.items == np.repeat(targets, part.lengths)
    return bool(len(inside)) and bool(inside.all())


def _evaluate_group(
    config: EvaluateConfig,
    dataset: Dataset,
    runs: Sequence[_Run],
    name: str | None,
    candidates: Mapping[str, Lists],
    histories: Mapping[int, tuple[list[int], int]],
) -> Group:
    split = runs[0].split
    users, findings = _common_users(runs, histories, split)
    targets = np.array([histories[int(user)][1] for user in users], np.int64)
    models = [(run, run.lists.for_users(users)) for run in runs]
    longest = max(int(lists.lengths.max(initial=0)) for _, lists in models)
    if name is not None:
        base, ordered = candidates[name].for_users(users), True
        if all(_inside(lists, base.head(longest)) for _, lists in models):
            base = base.head(longest)
    else:
        base, ordered = (
            _neutral(max((lists for _, lists in models), key=lambda lists: len(lists.items)), config.seed),
            False,
        )
    protocol, injected = _protocol(config, base, targets, models, name)
    findings += injected
    if config.candidates and name is None:
        other = "the target among sampled items" if runs[0].declared == "ground_truth" else "other items"
        message = f"{runs[0].name}: not made from candidates/{config.candidates}: it ranks {other}"
        findings.append(Finding("candidates", "error", message, len(users), len(users)))
    titles = dataset.items()["title"].fill_null("").to_list()
    past = {user: history for user, (history, _) in histories.items()}
    findings += check_candidates(
        base,
        targets,
        past,
        name="candidates",
        asked=longest,
        titles=titles,
        protocol=protocol,
        n_items=dataset.n_items,
    )
    for run, lists in models:
        if run.rejected:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in run.rejected.items())
            message = f"{run.name}: {run.file.name} holds what is not of this dataset, or not usable: {kinds}"
            findings.append(Finding("rejected", "warning", message, sum(run.rejected.values()), len(run.lists.users)))
        if len(run.repeated):
            bad, total = len(np.unique(run.repeated)), len(run.lists.users)
            message = (
                f"{run.name}: repeated items in the rankings of {bad:,} of {total:,} users "
                f"({len(run.repeated):,} items); the first place counts"
            )
            findings.append(Finding("duplicates", "warning", message, bad, total))
        findings += check_order(lists, run.name)
        findings += _dropped(lists, base, run.name)
    known = {int(user): len(past[int(user)]) for user in users}
    findings += check_times(dataset.sequences(), split, known)

    def method(label: str, lists: Lists, file: Location | None = None) -> Method:
        ranks = lists.rank_of(targets)
        metrics = evaluate_ranks(ranks, users, ks=config.ks, bootstrap=config.bootstrap, seed=config.seed)
        return Method(label, "baseline" if file is None else "model", lists, metrics, file)

    methods = [method(run.name, lists, run.file) for run, lists in models]
    evidence = baselines.Evidence.of(
        dataset,
        split,
        seed=config.seed,
        max_history=config.max_history,
        embed=_embedder(config),
        ask=_questioner(config),
    )
    for rival in config.baselines:
        if rival == RETRIEVER and not ordered:
            continue  # nobody knows the order these candidates had
        row = method(rival, baselines.rank(rival, evidence, base))
        if rival == "random":
            expected = expected_random(base.lengths, base.rank_of(targets) > 0, config.ks)
            row = Method(row.name, row.kind, row.lists, row.metrics, None, expected)
        methods.append(row)
    return Group(
        split=split,
        protocol=protocol,
        candidates=name,
        users=users,
        targets=targets,
        base=base,
        ordered=ordered,
        methods=methods,
        differences=_differences(config, methods),
        slices=_slices(config, dataset, evidence, users, targets, methods),
        findings=findings,
    )


def _common_users(
    runs: Sequence[_Run], histories: Mapping[int, tuple[list[int], int]], split: Split
) -> tuple[Ints, list[Finding]]:
    findings = []
    everyone = np.fromiter(histories, np.int64, len(histories))
    users = everyone
    for run in runs:
        users = np.intersect1d(users, run.lists.users)
        strangers = int((~np.isin(run.lists.users, everyone)).sum())
        if strangers:
            message = f"{run.name}: {strangers:,} rankings of users without a {split} target are left out"
            findings.append(Finding("users", "warning", message, strangers, len(run.lists.users)))
    if not len(users):
        names = " and ".join(run.name for run in runs)
        raise UserError(
            f"no {split} user has a target and a ranking by {names}", "Rank the same users with every model."
        )
    for run in runs:
        missing = int((~np.isin(run.lists.users[np.isin(run.lists.users, everyone)], users)).sum())
        if missing:
            message = f"{run.name}: {missing:,} of its users are left out because another ranking lacks them"
            findings.append(Finding("users", "warning", message, missing, len(run.lists.users)))
    if len(users) < len(everyone):
        message = f"{len(users):,} of the {len(everyone):,} {split} users are evaluated; the others have no ranking"
        findings.append(Finding("users", "note", message, len(users), len(everyone)))
    return users, findings


def _inside(lists: Lists, base: Lists) -> bool:
    return bool(base.contains(np.repeat(lists.users, lists.lengths), lists.items).all())


def _neutral(lists: Lists, seed: int) -> Lists:
    """A seeded random order: the order that a model made must not break the ties of its rivals."""
    shuffled = lists.sorted_by(np.random.default_rng(seed + 1).random(len(lists.items)))
    return Lists(shuffled.users, shuffled.offsets, shuffled.items)


def _protocol(
    config: EvaluateConfig, base: Lists, targets: Ints, models: Sequence[tuple[_Run, Lists]], name: str | None
) -> tuple[Protocol, list[Finding]]:
    findings = []
    listed = base.rank_of(targets) > 0
    if name is not None:
        for run, lists in models:
            added = int(((lists.rank_of(targets) > 0) & ~listed).sum())
            if added:
                message = (
                    f"{run.name}: {added:,} targets are ranked that candidates/{name} does not hold: they were put in"
                )
                findings.append(Finding("target_injected", "error", message, added, len(targets)))
    if config.protocol != "auto":
        return config.protocol, findings
    if name is not None:
        return "retrieval", findings
    return ("ground_truth" if listed.mean() > 0.98 else "retrieval"), findings


def _dropped(lists: Lists, base: Lists, name: str) -> list[Finding]:
    fewer = int((lists.lengths < base.lengths).sum())
    if not fewer:
        return []
    message = f"{name}: ranks fewer items than there are candidates for {fewer:,} of {len(lists.users):,} users"
    return [Finding("short_lists", "warning", message, fewer, len(lists.users))]


def main_metrics(ks: Sequence[int], length: int) -> tuple[str, str, str]:
    """The metrics that are tested and shown first: NDCG, Recall and MRR at 10, or at the nearest sensible cut-off.

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


def _slices(
    config: EvaluateConfig,
    dataset: Dataset,
    evidence: baselines.Evidence,
    users: Ints,
    targets: Ints,
    methods: Sequence[Method],
) -> list[Slice]:
    items = dataset.items()
    histories = np.array([len(evidence.histories[int(user)]) for user in users])
    popularity = evidence.popularity[targets]
    pictured = items["image_path"].is_not_null().to_numpy()[targets - 1]
    category = _categories(items)[targets - 1]
    labels = {
        "history length (items)": _bins(histories, (3, 5, 10, 20, 50)),
        "target's popularity (training interactions)": _bins(popularity, (1, 5, 20, 100)),
        "target's picture": [(label, pictured == value) for label, value in (("yes", True), ("no", False))],
        "target's category": [(str(name), category == name) for name in _frequent(category, 10)],
    }
    result = []
    for by, parts in labels.items():
        kept = [(value, mask) for value, mask in parts if mask.any()]
        if len(kept) < 2:
            continue  # one slice is the whole
        for value, mask in kept:
            metrics = {
                method.name: evaluate_ranks(
                    method.metrics.ranks[mask], users[mask], ks=config.ks, bootstrap=config.bootstrap, seed=config.seed
                )
                for method in methods
            }
            result.append(Slice(by, value, int(mask.sum()), metrics))
    return result


def _bins(values: Ints, edges: Sequence[int]) -> list[tuple[str, np.ndarray]]:
    """Labelled masks of values from one edge up to the next: ``0–2``, ``3–4``, ``50+``."""
    parts = [
        (str(low) if high == low + 1 else f"{low}–{high - 1}", (values >= low) & (values < high))
        for low, high in pairwise((0, *edges))
    ]
    return [*parts, (f"{edges[-1]}+", values >= edges[-1])]


def _categories(items: pl.DataFrame) -> np.ndarray:
    """str [I]: each item's category at the first level that tells items apart (no category holds nine in ten)."""
    deepest = int(items["categories"].list.len().max() or 0)  # type: ignore[arg-type]
    names = pl.Series(["(none)"] * len(items))
    for level in range(deepest):
        names = items["categories"].list.get(level, null_on_oob=True).fill_null("(none)")
        if names.value_counts()["count"].max() < 0.9 * len(items):  # type: ignore[operator]
            break
    return names.to_numpy()


def _frequent(values: np.ndarray, count: int) -> list[str]:
    names, sizes = np.unique(values.astype(str), return_counts=True)
    return [str(name) for name in names[np.argsort(-sizes, kind="stable")][:count]]


def _embedder(config: EvaluateConfig) -> Callable[[Sequence[str]], NDArray[np.float32]] | None:
    if config.embedding_model is None:
        return None
    from vlrank.reranking.embeddings import embed_texts

    return partial(embed_texts, config.embedding_model)


def _questioner(config: EvaluateConfig) -> Callable[[Sequence[baselines.Pair]], NDArray[np.float32]] | None:
    if config.pointwise_model is None:
        return None
    from vlrank.reranking.pointwise import yes_log_probs

    return partial(yes_log_probs, config.pointwise_model, config.pointwise_mode, max_history=config.max_history)

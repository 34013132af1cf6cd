"""``vlrank retrieve``: candidate lists for validation and test, from a retriever, from other lists or from a file."""

from __future__ import annotations

import re
import shlex

import numpy as np
import polars as pl
from scipy.stats import binomtest

from vlrank.config import RetrieveConfig, Split
from vlrank.console import Summary, console
from vlrank.data.dataset import Dataset, check_candidates_name
from vlrank.data.lists import Lists
from vlrank.errors import UserError
from vlrank.retrieval import baselines, ensemble
from vlrank.retrieval.importing import read_candidates
from vlrank.retrieval.sequential import job as sequential
from vlrank.retrieval.sequential.data import METHODS as SEQUENTIAL
from vlrank.storage import Location, fetch, location, require_writable

COUNTING = ("popularity", "item_knn", "als")
RETRIEVERS = (*COUNTING, *SEQUENTIAL)
SPLITS: tuple[Split, ...] = ("val", "test")
Tables = dict[Split, Lists]

_KS = (1, 5, 10, 20)


def dry_run(config: RetrieveConfig) -> Summary:
    """What `run` would do."""
    dataset = Dataset.open(config.dataset)
    name = _name(config)
    users = {split: len(dataset.histories(split)) for split in SPLITS}
    lines: dict[str, object] = {
        "method": config.method,
        **_plan(dataset, config, name),
        "users": ", ".join(f"{split} {count:,}" for split, count in users.items()),
        "items": dataset.n_items,
        "candidates per user": config.top_k,
        "replaces": f"candidates/{name}" if name in dataset.candidate_names() else "nothing",
    }
    return Summary(f"retrieve (dry run): {name}", lines, dataset.path / "candidates" / f"{name}.parquet")


def run(config: RetrieveConfig) -> Summary:
    """Write ``candidates/NAME`` and measure how many targets they hold.

    Retrievers learn from the training part only. What the user already had before the target is excluded: for val the
    training part, for test the training part and the validation item.

    Raises:
        UserError: unknown method, unreadable file, tables that cannot be mixed, or no user to retrieve for.
    """
    dataset = Dataset.open(config.dataset)
    name = _name(config)
    require_writable(dataset.path / "candidates", "Lists become part of their dataset: retrieve for a copy of it.")
    rejected: list[dict[str, str]] = []
    if config.method in COUNTING:
        tables, lines = _count(dataset, config)
    elif config.method in SEQUENTIAL:
        tables, lines = sequential.retrieve(dataset, config, name)
    elif config.method.startswith(ensemble.PREFIX):
        names = ensemble.members(config.method, dataset, name)
        tables, lines = ensemble.retrieve(dataset, names, config.top_k)
    else:
        tables, rejected, lines = _import(dataset, config)
    if not any(len(table.users) for table in tables.values()):
        raise UserError(f"{dataset.path} has no user to retrieve for", "Users need at least three interactions.")
    frame = pl.concat([lists.to_frame(split=split) for split, lists in tables.items()])
    path = dataset.write_candidates(name, frame.select("split", "user_id", "item_ids", "scores"))
    if rejected:
        dataset.add_quarantine(f"retrieve-{name}", rejected, replace=True)
    for split, lists in tables.items():
        lines |= _facts(dataset, split, lists, config.top_k)
    counts = {"users": len(frame), "candidates": int(frame["item_ids"].list.len().sum()), "quarantined": len(rejected)}
    return Summary(f"retrieve: {name}", lines, path, counts)


def _name(config: RetrieveConfig) -> str:
    if config.name is None and config.method.startswith(ensemble.PREFIX):
        return re.sub(r"[^\w.-]+", "-", config.method).strip("-")
    if config.name is None and config.method not in RETRIEVERS:
        return re.sub(r"[^\w.-]+", "_", location(config.method).stem).strip("_.-") or "imported"
    name = config.name or config.method
    check_candidates_name(name)
    return name


def _plan(dataset: Dataset, config: RetrieveConfig, name: str) -> dict[str, object]:
    """What a dry run says of the method, after the checks that `run` makes before its work."""
    if config.method in SEQUENTIAL:
        return sequential.plan(dataset, config)
    if config.method.startswith(ensemble.PREFIX):
        ensemble.members(config.method, dataset, name)
    elif config.method not in COUNTING:
        _file(dataset, config)
    return {}


def _count(dataset: Dataset, config: RetrieveConfig) -> tuple[Tables, dict[str, object]]:
    tables: Tables = {}
    for split in SPLITS:
        evidence = baselines.Evidence.of(dataset, split, seed=config.seed)
        users = np.fromiter(evidence.histories, np.int64, len(evidence.histories))
        if len(users):
            console.print(f"{config.method}: {len(users):,} {split} users, {dataset.n_items:,} items")
            tables[split] = baselines.retrieve(config.method, evidence, users, config.top_k)
    return tables, {"method": config.method}


def _file(dataset: Dataset, config: RetrieveConfig) -> Location:
    """The file that the method names.

    Raises:
        UserError: the method is neither known nor a file.
    """
    path = location(config.method)
    if not path.is_file():
        raise UserError(
            f"retrieval method {config.method!r} is neither {', '.join(RETRIEVERS)}, {ensemble.PREFIX}A,B nor a file",
            f"Example: vlrank retrieve {shlex.quote(str(dataset.path))} --method item_knn",
        )
    return path


def _import(dataset: Dataset, config: RetrieveConfig) -> tuple[Tables, list[dict[str, str]], dict[str, object]]:
    path = _file(dataset, config)
    imported = read_candidates(fetch(path), dataset, split=config.split, ids=config.ids)
    tables: Tables = {}
    without_target: list[dict[str, str]] = []
    duplicates = seen = 0
    for split in SPLITS:
        table = imported.table.filter(pl.col("split") == split)
        if table.is_empty():
            continue
        histories = dataset.histories(split)
        without_target += [
            {"key": str(user), "error_type": "NoTarget", "message": f"user_id {user} has no {split} target"}
            for user in table["user_id"].to_list()
            if user not in histories
        ]
        lists = Lists.from_frame(table.filter(pl.col("user_id").is_in(list(histories))))
        again = lists.duplicates()
        duplicates += int(again.sum())
        lists = lists.keep(~again)
        if config.exclude_history:
            past = Lists.from_dict({user: history for user, (history, _) in histories.items()})
            known = past.contains(np.repeat(lists.users, lists.lengths), lists.items)
            seen += int(known.sum())
            lists = lists.keep(~known)
        tables[split] = lists.head(config.top_k)
    lines: dict[str, object] = {
        "imported": str(path),
        **imported.notes,
        "duplicates removed": duplicates,
        "history items removed": seen if config.exclude_history else "kept (exclude_history=false)",
    }
    rejected = [*imported.rejected, *without_target]
    if rejected:
        lines["not used (see quarantine)"] = len(rejected)
    return tables, rejected, lines


def _facts(dataset: Dataset, split: Split, lists: Lists, top_k: int) -> dict[str, object]:
    """Recall of the candidates over all users of the split; users without a list are misses.

    The interval is Wilson's (1927): recall of single targets is a proportion.
    """
    histories = dataset.histories(split)
    if not histories:
        return {}
    users = np.fromiter(histories, np.int64, len(histories))
    targets = np.fromiter((target for _, target in histories.values()), np.int64, len(histories))
    ranks = lists.for_users(users).rank_of(targets)
    hits = {k: int(((ranks > 0) & (ranks <= k)).sum()) for k in _KS if k <= top_k}
    k = max(hits)
    interval = binomtest(hits[k], len(users)).proportion_ci(method="wilson")
    facts: dict[str, object] = {
        f"{split} users": f"{len(users):,} ({len(lists.users):,} with candidates)",
        f"{split} Recall": "  ".join(f"@{k} {count / len(users):.4f}" for k, count in hits.items()),
        f"{split} Recall@{k} 95% interval": f"{interval.low:.4f} to {interval.high:.4f}",
    }
    short = int((lists.lengths < top_k).sum())
    if short:
        facts[f"{split} lists shorter than {top_k}"] = short
    return facts

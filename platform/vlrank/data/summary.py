"""A dataset in numbers, for the end of `vlrank prepare` and for `vlrank inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from vlrank.console import Summary
from vlrank.data.dataset import Dataset
from vlrank.data.quarantine import by_error


def describe(dataset: Dataset, title: str, seconds: float | None = None) -> Summary:
    """Counts before and after each filter, sparsity, history lengths, coverage, and what is in quarantine."""
    counts = dataset.manifest["counts"]
    lines: dict[str, object] = {}
    for stage in dataset.manifest.get("stages", []):
        lines[stage["stage"]] = (
            f"{stage['interactions']:,} interactions, {stage['users']:,} users, {stage['items']:,} items"
        )
    if times := dataset.manifest.get("impossible_times"):
        lines["impossible times"] = _times(times)
    users, items, interactions = (counts[key] for key in ("users", "items", "interactions"))
    lines["dataset"] = f"{interactions:,} interactions, {users:,} users, {items:,} items"
    lines["sparsity"] = f"{1 - interactions / (users * items):.4%}"
    lines["history length"] = _quantiles(dataset.sequences()["item_ids"].list.len())
    lines["split"] = _split(dataset)
    lines |= _coverage(dataset) | _untitled(dataset.items())
    quarantined = {stage: len(dataset.quarantine(stage)) for stage in dataset.quarantine_stages()}
    for stage in quarantined:
        lines[f"quarantine: {stage}"] = by_error(dataset.quarantine(stage))
    if seconds is not None:
        lines["time"] = f"{seconds:.1f} s"
    machine = {key: int(counts[key]) for key in ("users", "items", "interactions")}
    machine |= {f"quarantined_{stage}": n for stage, n in quarantined.items()}
    return Summary(title, lines, dataset.path, machine)


def _times(found: Mapping[str, Any]) -> str:
    counted = {"before 1990": found["before_1990"], "in the future": found["in_the_future"]}
    text = ", ".join(f"{n:,} {where}" for where, n in counted.items() if n)
    hint = "in quarantine" if found["quarantined"] else "kept (impossible_times=quarantine puts them aside)"
    return f"{text}, such as {found['example']}; {hint}"


def _quantiles(lengths: pl.Series) -> str:
    points = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
    return ", ".join(f"{name} {lengths.quantile(at, 'nearest'):g}" for name, at in points.items())


def _split(dataset: Dataset) -> str:
    split = dataset.manifest["split"]
    val, test = dataset.count_targets("val"), dataset.count_targets("test")
    text = f"{split['method']}: {val:,} validation and {test:,} test users"
    if split["method"] == "temporal":
        text += f"; validation from {split['val_from']}, test from {split['test_from']}"
    return text


def _coverage(dataset: Dataset) -> dict[str, object]:
    items = dataset.items()
    n = len(items)
    have = {
        "title": (items["title"].fill_null("") != "").sum(),
        "brand": items["brand"].is_not_null().sum(),
        "categories": (items["categories"].list.len() > 0).sum(),
        "description": items["description"].is_not_null().sum(),
        "picture": items["image_path"].is_not_null().sum(),
    }
    for what in ("caption", "semantic_summary"):
        table = dataset.generated(what)
        have[what] = 0 if table is None else (table["text"].fill_null("") != "").sum()
    shown = {name: _share(count, n) for name, count in have.items()}
    text = ", ".join(f"{name} {shown[name]}" for name in ("title", "brand", "categories", "description"))
    rest = {"pictures": shown["picture"], "captions": shown["caption"], "summaries": shown["semantic_summary"]}
    sources = dataset.manifest.get("pictures", {})
    if sources.get("sources") and not sources.get("asked"):
        rest["pictures"] += f" ({sources['sources']:,} items name one: --use_image)"
    elif sources.get("failed"):
        rest["pictures"] += f" ({sources['failed']:,} failed: --use_image --retry_failed tries them again)"
    return {"items with text": text, **{f"items with {name}": value for name, value in rest.items()}}


def _untitled(items: pl.DataFrame) -> dict[str, object]:
    """How items without a title are shown; nothing where all have one."""
    untitled = items.filter(pl.col("title").fill_null("") == "")
    brand, description = (pl.col(name).fill_null("") != "" for name in ("brand", "description"))
    told = len(untitled.filter(brand | description | (pl.col("categories").list.len() > 0)))
    counted = {"by brand, categories or description": told, "by their id": len(untitled) - told}
    text = ", ".join(f"{n:,} shown {how}" for how, n in counted.items() if n)
    return {"items without a title": text} if text else {}


def _share(count: Any, n: int) -> str:
    return f"{count / n:.0%}" if count in (0, n) else f"{count:,.0f} ({count / n:.1%})"

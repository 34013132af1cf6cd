"""``vlrank evaluate``: metrics with intervals and rivals on stdout, in ``metrics.json`` and in ``report.html``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlrank.config import EvaluateConfig
from vlrank.console import PlainConsole, Summary, announce
from vlrank.data.dataset import Dataset
from vlrank.data.tables import atomic_write_json, atomic_write_text
from vlrank.errors import UserError
from vlrank.evaluation.compare import Difference
from vlrank.evaluation.evaluate import compare_methods, evaluate, main_metrics
from vlrank.evaluation.groups import RETRIEVER, Group
from vlrank.evaluation.metrics import Metrics, label
from vlrank.evaluation.rankings import read_rankings
from vlrank.evaluation.report import p_value, render
from vlrank.version import __version__


def dry_run(config: EvaluateConfig) -> Summary:
    """The rankings that `run` would evaluate, against which rivals; computes nothing."""
    dataset = Dataset.open(config.dataset)
    rankings = read_rankings(config.rankings, dataset, config.split)
    lines = {one.name: f"{one.split}, {len(one.lists.users):,} users, {one.file}" for one in rankings}
    lines["baselines"] = ", ".join(config.baselines) or "none"
    lines["candidates tables"] = ", ".join(dataset.candidate_names()) or "none"
    return Summary("evaluate (dry run)", lines, config.out)


def run(config: EvaluateConfig) -> Summary:
    """Evaluate rankings and write ``metrics.json`` and ``report.html`` to ``config.out``.

    Raises:
        UserError: unreadable rankings, rankings of another dataset, an unknown baseline or method to compare.
    """
    dataset = Dataset.open(config.dataset)
    groups = evaluate(config, dataset)
    compared = _compared(config, groups)
    atomic_write_json(config.out / "metrics.json", as_json(config, dataset, groups, compared))
    atomic_write_text(config.out / "report.html", render(config, dataset, groups))
    _print(groups, compared)
    first = groups[0]
    metric = main_metrics(config.ks, first.length)[0]
    lines: dict[str, object] = {"metrics": config.out / "metrics.json"}
    for method in first.models:
        lines[method.name] = Text.assemble(f"{label(metric)} ", _interval(method.metrics, metric))
    warnings = [f for group in groups for f in group.findings if f.level != "note"]
    counts = {
        "groups": len(groups),
        "rankings": sum(len(group.models) for group in groups),
        "users": len(first.users),
        "warnings": len(warnings),
    }
    return Summary(f"evaluate: {first.title}", lines, config.out / "report.html", counts)


def as_json(
    config: EvaluateConfig, dataset: Dataset, groups: Sequence[Group], compared: Sequence[Difference] = ()
) -> dict[str, Any]:
    """What ``metrics.json`` holds: every number of the report, each under its protocol."""
    return {
        "vlrank": __version__,
        "dataset": {
            "name": dataset.path.resolve().name,
            "counts": dataset.manifest.get("counts", {}),
            "split": dataset.manifest.get("split", {}),
            "files": dataset.manifest.get("files", {}),
        },
        "settings": {"ks": list(config.ks), "bootstrap": config.bootstrap, "seed": config.seed},
        "groups": [_group_json(group) for group in groups],
        "compare": [dataclasses.asdict(difference) for difference in compared],
        "stage_seconds": dict(config.stage_times),
    }


def _group_json(group: Group) -> dict[str, Any]:
    covered = group.base.rank_of(group.targets) > 0
    return {
        "protocol": {
            "name": group.protocol,
            "split": group.split,
            "users": len(group.users),
            "candidates": group.candidates,
            "candidates_per_user": group.length,
            "coverage": float(covered.mean()),
            "retriever_order_known": group.ordered,
        },
        "methods": [
            {
                "name": method.name,
                "kind": method.kind,
                "file": None if method.file is None else method.file.name,
                "coverage": method.metrics.coverage,
                "metrics": {
                    name: {
                        "mean": mean,
                        "low": method.metrics.intervals[name][0],
                        "high": method.metrics.intervals[name][1],
                        "retrieved_only": _number(method.metrics.retrieved[name]),
                        **({"expected": method.expected[name]} if method.expected else {}),
                    }
                    for name, mean in method.metrics.means.items()
                },
            }
            for method in group.methods
        ],
        "differences": [dataclasses.asdict(difference) for difference in group.differences],
        "slices": [
            {
                "by": part.by,
                "value": part.value,
                "users": part.users,
                "metrics": {name: metrics.means for name, metrics in part.metrics.items()},
                "intervals": {name: metrics.intervals for name, metrics in part.metrics.items()},
            }
            for part in group.slices
        ],
        "findings": [dataclasses.asdict(finding) for finding in group.findings],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _compared(config: EvaluateConfig, groups: Sequence[Group]) -> list[Difference]:
    """The differences that ``--compare A B`` asks for, in every metric of the first group that has both."""
    if not config.compare:
        return []
    for group in groups:
        try:
            a, b = (group.method(name) for name in config.compare)
        except KeyError:
            continue
        # With one target HitRate is Recall and MAP is MRR.
        metrics = [name for name in a.metrics.means if not name.startswith(("hit_rate", "map"))]
        return compare_methods(config, a, b, metrics)
    names = "; ".join(f"{group.title}: {', '.join(method.name for method in group.methods)}" for group in groups)
    raise UserError(
        f"no table holds both {config.compare[0]!r} and {config.compare[1]!r}",
        f"Methods that can be compared: {names}.",
    )


def _print(groups: Sequence[Group], compared: Sequence[Difference]) -> None:
    """The tables on stdout; warnings on stderr."""
    out = PlainConsole()
    for group in groups:
        ceiling = float((group.base.rank_of(group.targets) > 0).mean())
        _print_means(
            out,
            group,
            f"{group.title}, ceiling {ceiling:.1%}",
            {method.name: method.metrics for method in group.methods},
        )
        if cold := group.cold:  # apart: rivals that count interactions know nothing of them
            title = f"of them {cold.users:,} whose target has no training interaction"
            if any(metrics.coverage for metrics in cold.metrics.values()):
                _print_means(out, group, title, cold.metrics)
            else:
                out.print(Text(f"{title}: no list holds it", style="bold"), Text(), sep="\n")
        _print_differences(out, _shown(group), f"paired differences in {label(_main(group))}")
        for finding in group.findings:
            if finding.level != "note":
                colour = "red" if finding.level == "error" else "yellow"
                announce(f"{finding.level}:", finding.message, colour)
    if compared:
        _print_differences(out, compared, f"{compared[0].a} against {compared[0].b}", metrics=True)


def _print_means(out: Console, group: Group, title: str, found: Mapping[str, Metrics]) -> None:
    """A row of means with intervals for each of the group's methods: name -> metrics of the users in the title."""
    metrics = _columns(group)
    narrow = out.width < 120
    heads = [label(name).replace("Recall", "R") if narrow else label(name) for name in metrics]
    table = _table(title, "method", *heads)
    if narrow:  # the interval goes below its mean
        for column in table.columns[1:]:
            column.min_width = column.max_width = 8
    best = {name: max(one.means[name] for one in found.values()) for name in metrics}
    for method in group.methods:
        own = found[method.name]
        cells = [_interval(own, name, style="bold" if own.means[name] == best[name] else "") for name in metrics]
        table.add_row(method.name, *cells, style=None if method.kind == "model" else "dim")
    out.print(table)


_PAIRED = 4
"""With more models the terminal leaves out their pairs."""


def _shown(group: Group) -> list[Difference]:
    """Comparisons with the retriever or chance, with the strongest rival, and between few models.

    The report has all comparisons.
    """
    models = {method.name for method in group.models}
    rivals = (models if len(models) <= _PAIRED else set()) | {RETRIEVER if group.ordered else "random"}
    if strongest := group.strongest_rival(_main(group)):
        rivals.add(strongest.name)
    return [d for d in group.differences if d.metric == _main(group) and d.b in rivals]


def _print_differences(out: Console, differences: Sequence[Difference], title: str, *, metrics: bool = False) -> None:
    if not differences:
        return
    first = "metric" if metrics else "comparison"
    table = _table(title, first, "A - B", "95% interval", "p" if metrics else "p (Holm)")
    for d in differences:
        name = label(d.metric) if metrics else f"{d.a} - {d.b}"
        numbers = (f"{d.difference:+.4f}", f"{d.low:+.4f}, {d.high:+.4f}", p_value(d.p_holm))
        table.add_row(name, *numbers, style="dim" if d.verdict == "unclear" else None)
    out.print(table)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    table.add_column(first, min_width=12)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _main(group: Group) -> str:
    return main_metrics(group.methods[0].metrics.ks, group.length)[0]


def _columns(group: Group) -> list[str]:
    """Recall at the cut-offs up to 10, and the main NDCG and MRR."""
    ndcg, recall, mrr = main_metrics(group.methods[0].metrics.ks, group.length)
    last = int(recall.partition("@")[2])
    return [*(f"recall@{k}" for k in sorted(group.methods[0].metrics.ks) if k <= last), ndcg, mrr]


def _interval(metrics: Metrics, name: str, style: str = "") -> Text:
    low, high = metrics.intervals[name]
    return Text.assemble(f"{metrics.means[name]:.4f} ", (f"±{(high - low) / 2:.4f}", "dim"), style=style)

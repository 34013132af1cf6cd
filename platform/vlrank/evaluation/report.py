"""The report: one HTML file that needs no network, written for readers who have never seen the project.

Python renders numbers and tables; ``templates/report.js`` draws the charts with Plotly, which is embedded in the file,
and lets readers browse users. Jinja and `_script_json` escape everything that comes from the data.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from vlrank.config import EvaluateConfig
from vlrank.console import progress
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Ints, Lists
from vlrank.data.picture import UnreadablePicture, read_rgb
from vlrank.data.tables import read_json, read_json_lines
from vlrank.errors import UserError
from vlrank.evaluation.checks import Finding
from vlrank.evaluation.compare import Difference
from vlrank.evaluation.evaluate import main_metrics
from vlrank.evaluation.groups import RETRIEVER, Group, Method
from vlrank.evaluation.metrics import LABELS, label
from vlrank.storage import Location
from vlrank.version import __version__

_NAMES = {
    "identity": "retriever's order",
    "random": "random order",
    "popularity": "popularity",
    "item_knn": "item-kNN",
    "als": "ALS",
    "bm25": "BM25 on texts",
    "embedding": "text embeddings",
    "pointwise": "yes/no questions",
}
_PICTURE_BYTES = 6_000_000
_PICTURE_SIZE = 128  # pixels, twice the size on the page: sharp on dense screens
_HISTORY = 12
_TEXT = 220


def render(config: EvaluateConfig, dataset: Dataset, groups: Sequence[Group]) -> str:
    """The whole page.

    Raises:
        UserError: a run or sweep folder of the config does not exist.
    """
    items, runs = _Items(dataset), [_run_curves(path) for path in config.runs]
    times = [("Where the time went", _stages(config.stage_times))] if config.stage_times else []
    for path in config.runs:
        if seconds := _run_phases(path):
            times.append((f"Where the time of {path.name} went", _stages(seconds)))
    views = [_view(config, dataset, group, items) for group in groups]
    data = {
        "groups": [view.pop("data") for view in views],
        "items": items.table(),
        "pictures": items.has_pictures,
        "runs": runs,
        "curves": sorted({name for run in runs for name in run["series"] if "@" in name}, key=_curve_order),
        "sweep": None if config.sweep is None else _sweep(config.sweep),
    }
    return _page(
        title=dataset.path.resolve().name,
        counts=dataset.manifest.get("counts", {}),
        split_method=dataset.manifest.get("split", {}).get("method", "leave_one_out"),
        config=config,
        groups=list(zip(groups, views, strict=True)),
        times=times,
        data=data,
    )


def render_sweep(title: str, sweep: Path) -> str:
    """A page with the trials of a sweep alone.

    Raises:
        UserError: the folder holds no sweep.
    """
    return _page(title=title, groups=[], times=[], data={"groups": [], "runs": [], "sweep": _sweep(sweep)})


def _page(data: Mapping[str, Any], **more: Any) -> str:
    import jinja2
    from plotly.offline import get_plotlyjs

    templates = files("vlrank.evaluation") / "templates"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(label=label, display=display, percent=percent, number=number, p_value=p_value)
    environment.globals.update(soft=soft)
    page = environment.from_string((templates / "report.html.j2").read_text(encoding="utf-8"))
    return page.render(
        **more,
        version=__version__,
        data=data,
        data_json=_script_json(data),
        css=(templates / "report.css").read_text(encoding="utf-8"),
        js=(templates / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        labels=LABELS,
    )


def display(name: str) -> str:
    """A method's name in words."""
    return _NAMES.get(name, name)


def soft(name: str) -> Any:
    """`display` for HTML, where long names may break after an underscore."""
    from markupsafe import Markup, escape

    return escape(display(name)).replace("_", Markup("_<wbr>"))


def percent(value: float) -> str:
    """``0.1234`` -> ``12.3%``."""
    return f"{value:.1%}"


def number(value: float) -> str:
    """Four decimals; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def p_value(value: float) -> str:
    """``< 0.001`` or three decimals."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _script_json(value: Any) -> str:
    """JSON for a script element: no text of the data can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _view(config: EvaluateConfig, dataset: Dataset, group: Group, items: _Items) -> dict[str, Any]:
    """A group's values for the template and, under ``data``, for the charts."""
    ndcg, recall, mrr = main_metrics(config.ks, group.length)
    k = int(recall.partition("@")[2])
    columns = [*(f"recall@{cut}" for cut in sorted(config.ks) if cut <= k), ndcg, mrr]
    covered = group.base.rank_of(group.targets) > 0
    every = [name for name in group.methods[0].metrics.means if not name.startswith("hit_rate")]
    return {
        "columns": columns,
        "best": {name: max(method.metrics.means[name] for method in group.methods) for name in every},
        "every": every,
        "main": (ndcg, recall, mrr),
        "coverage": float(covered.mean()),
        "headline": _headline(group, ndcg, recall),
        "findings": sorted(group.findings, key=_severity),
        "pairs": [(m, _differences_of(method.name, group)) for m, method in enumerate(group.models)],
        "data": {
            "methods": [_method_data(method, group) for method in group.methods],
            "columns": columns,
            "length": group.length,
            "users": len(group.users),
            "ordered": group.ordered,
            "main": [ndcg, recall, mrr],
            "slices": _slice_data(group, (ndcg, recall)),
            "models": [_model_data(method, group) for method in group.models],
            "browse": _browse(config, dataset, group, items),
        },
    }


def _curve_order(name: str) -> tuple[bool, str]:
    """NDCG@10 first, as it tells more than Recall; the others by name."""
    return "ndcg@10" not in name, name


def _severity(finding: Finding) -> int:
    return ("error", "warning", "note").index(finding.level)


def _headline(group: Group, ndcg: str, recall: str) -> list[str]:
    """The result in two or three sentences."""
    best = max(group.models, key=lambda method: method.metrics.means[ndcg])
    k = recall.partition("@")[2]
    where = "first" if k == "1" else f"among the first {k}"
    sentences = [f"{best.name} puts the target {where} for {percent(best.metrics.means[recall])} of the users."]
    strongest = group.strongest_rival(ndcg)
    compared = {
        RETRIEVER if group.ordered else "random": "",
        strongest.name if strongest else "": ", the strongest rival",
    }
    for name, note in compared.items():
        difference = _difference(group.differences, best.name, name, ndcg)
        if difference is None:
            continue
        relation = {"better": "better than", "worse": "worse than", "unclear": "not clearly different from"}
        sentences.append(
            f"It is {relation[difference.verdict]} {'the ' if name == RETRIEVER else ''}{display(name)}{note}: "
            f"{label(ndcg)} {difference.mean_a:.4f} against {difference.mean_b:.4f} "
            f"(difference {difference.difference:+.4f}, 95% interval {difference.low:+.4f} to {difference.high:+.4f})."
        )
    return sentences


def _differences_of(name: str, group: Group) -> list[Difference]:
    """A model's comparisons with all other methods, the model first, in the order of the table."""
    order = {method.name: place for place, method in enumerate(group.methods)}
    own = [d if d.a == name else d.flipped() for d in group.differences if name in (d.a, d.b)]
    return sorted(own, key=lambda d: order[d.b])


def _difference(differences: Sequence[Difference], a: str, b: str, metric: str) -> Difference | None:
    return next((d for d in differences if (d.a, d.b, d.metric) == (a, b, metric)), None)


def _method_data(method: Method, group: Group) -> dict[str, Any]:
    ranks = method.metrics.ranks
    histogram = np.bincount(ranks, minlength=group.length + 1)[1 : group.length + 1]
    return {
        "name": method.name,
        "label": display(method.name),
        "kind": method.kind,
        "means": {name: round(mean, 6) for name, mean in method.metrics.means.items()},
        "intervals": {name: [round(low, 6), round(high, 6)] for name, (low, high) in method.metrics.intervals.items()},
        "curve": [round(float(value), 6) for value in np.cumsum(histogram) / len(ranks)],
    }


def _model_data(method: Method, group: Group) -> dict[str, Any]:
    """Rank changes, position bias and calibration of one model."""
    length = group.length
    old, new = group.base.rank_of(group.targets), method.metrics.ranks
    both = (old > 0) & (new > 0)
    heat = np.zeros((length, length), np.int64)
    np.add.at(heat, (new[both] - 1, old[both] - 1), 1)
    return {
        "name": method.name,
        "label": display(method.name),
        "heat": heat.tolist() if group.ordered else None,
        "up": int((new[both] < old[both]).sum()),
        "down": int((new[both] > old[both]).sum()),
        "same": int((new[both] == old[both]).sum()),
        "position": _position_bias(method.lists, group) if group.ordered else None,
        "ranks": np.bincount(new[new > 0], minlength=length + 1)[1 : length + 1].tolist(),
        "calibration": _calibration(method.lists, group.targets),
    }


def _position_bias(lists: Lists, group: Group) -> dict[str, Any]:
    """By place in the retriever's order: how often a model puts that place first, and how often the target is there.

    Both are shares of the same users: those whose target was retrieved.
    """
    wanted = group.base.rank_of(group.targets)
    rows = np.flatnonzero((wanted > 0) & (lists.lengths > 0))
    chosen = group.base.take(rows).rank_of(lists.items[lists.offsets[rows]])
    shares = {"chosen": chosen, "target": wanted[rows]}
    return {
        name: (np.bincount(places, minlength=group.length + 1)[1:] / max(len(rows), 1)).round(6).tolist()
        for name, places in shares.items()
    }


def _calibration(lists: Lists, targets: Ints) -> dict[str, Any] | None:
    """Predicted probability of a candidate against how often it is the target, over users whose target is listed.

    Ten bins of equal width in probability; the expected calibration error weighs them by their candidates (Guo et al.
    2017). None where a list's scores do not sum to 1 and so are no probabilities, as after sliding windows or fusion.
    """
    listed = np.flatnonzero(lists.rank_of(targets) > 0)
    if lists.scores is None or not len(listed):
        return None
    part = lists.take(listed)
    assert part.scores is not None
    with np.errstate(over="ignore"):
        probability = np.exp(part.scores.astype(np.float64))
    sums = np.bincount(part.segments(), probability, minlength=len(listed))
    if not np.isfinite(probability).all() or (np.abs(sums - 1) < 0.02).mean() < 0.95:
        return None
    hit = part.items == np.repeat(targets[listed], part.lengths)
    bins = np.minimum((probability * 10).astype(np.int64), 9)
    counts = np.bincount(bins, minlength=10)
    predicted = np.bincount(bins, probability, minlength=10)
    observed = np.bincount(bins, hit, minlength=10)
    used = counts > 0
    error = float(np.abs(predicted - observed).sum() / counts.sum())
    return {
        "predicted": (predicted[used] / counts[used]).round(6).tolist(),
        "observed": (observed[used] / counts[used]).round(6).tolist(),
        "counts": counts[used].tolist(),
        "error": round(error, 6),
    }


def _slice_data(group: Group, metrics: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "by": part.by,
            "value": part.value,
            "users": part.users,
            "metrics": {
                metric: {
                    name: [round(value, 6) for value in (m.means[metric], *m.intervals[metric])]
                    for name, m in part.metrics.items()
                }
                for metric in metrics
            },
        }
        for part in group.slices
    ]


class _Items:
    """The items that a report shows, each once, with thumbnails up to a total size."""

    def __init__(self, dataset: Dataset) -> None:
        table = dataset.items()
        self._titles = [
            title or text or source for title, text, source in table["title", "text", "source_id"].iter_rows()
        ]
        self._images = table["image_path"].to_list()
        self._root = dataset.path
        self._texts = {what: _generated(dataset, what) for what in ("caption", "semantic_summary")}
        self._used: dict[int, dict[str, Any]] = {}
        self._bytes = 0
        self.has_pictures = any(self._images)

    def use(self, item: int, picture: bool) -> int:
        """Put an item on the page."""
        entry = self._used.setdefault(item, {"t": _cut(self._titles[item - 1])})
        for what, texts in self._texts.items():
            if item in texts:
                entry[what[0]] = _cut(texts[item])
        if picture and "p" not in entry and self._bytes < _PICTURE_BYTES and self._images[item - 1]:
            thumbnail = _thumbnail(self._root / self._images[item - 1])
            if thumbnail:
                entry["p"] = thumbnail
                self._bytes += len(thumbnail)
        return item

    def table(self) -> dict[int, dict[str, Any]]:
        """item_id -> title ``t``, caption ``c``, summary ``s``, picture ``p``."""
        return self._used


def _generated(dataset: Dataset, what: Any) -> dict[int, str]:
    table = dataset.generated(what)
    return {} if table is None else dict(zip(table["item_id"].to_list(), table["text"].to_list(), strict=True))


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


def _thumbnail(path: Location) -> str | None:
    try:
        small = read_rgb(path, at_least=_PICTURE_SIZE)
    except UnreadablePicture:
        return None  # a damaged picture must not cost the report
    small.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=68)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _browse(config: EvaluateConfig, dataset: Dataset, group: Group, items: _Items) -> dict[str, Any]:
    """A seeded sample of users, in equal parts if there are enough: helped by the first model, hurt, equal, missed."""
    model = group.models[0]
    old = group.base.rank_of(group.targets)
    new = model.metrics.ranks
    middle = (group.base.lengths + 1) // 2  # without a retriever's order the better half of the list is a win
    reference = old if group.ordered else np.where(old > 0, middle, 0)
    kinds = [(new > 0) & (new < reference), (new > 0) & (new > reference), (new > 0) & (new == reference), new == 0]
    rng = np.random.default_rng(config.seed)
    pools = [rng.permutation(np.flatnonzero(kind)).tolist() for kind in kinds]
    chosen: list[int] = []
    while len(chosen) < min(config.sample_users, len(group.users)):
        for pool in pools:
            if pool and len(chosen) < config.sample_users:
                chosen.append(pool.pop())
    histories = dataset.histories(group.split)
    rows = []
    with progress("pictures for the report", len(chosen)) as bar:
        for row in chosen:
            rows.append(_user(group, int(row), histories[int(group.users[row])][0], items))
            bar.advance(1)
    return {"users": rows, "ordered": group.ordered}


def _user(group: Group, row: int, history: Sequence[int], items: _Items) -> dict[str, Any]:
    def listed(lists: Lists) -> list[int]:
        return [int(item) for item in lists.items[lists.offsets[row] : lists.offsets[row + 1]]]

    base = listed(group.base)
    target = int(group.targets[row])
    orders = [listed(method.lists) for method in group.models]
    pictured = {target, *history[-_HISTORY:], *base[:10], *(item for order in orders for item in order[:10])}
    for item in dict.fromkeys([*history[-_HISTORY:], target, *base, *(item for order in orders for item in order)]):
        items.use(item, item in pictured)
    return {
        "id": int(group.users[row]),
        "history": history[-_HISTORY:],
        "earlier": max(len(history) - _HISTORY, 0),
        "target": target,
        "base": base,
        "orders": orders,
        "probabilities": [_probabilities(method.lists, row) for method in group.models],
    }


def _probabilities(lists: Lists, row: int) -> list[float] | None:
    if lists.scores is None:
        return None
    with np.errstate(over="ignore"):
        values = np.exp(lists.scores[lists.offsets[row] : lists.offsets[row + 1]].astype(np.float64))
    return values.round(4).tolist() if len(values) and abs(values.sum() - 1) < 0.02 else None


def _stages(times: Mapping[str, float]) -> list[tuple[str, float, float]]:
    longest = max(times.values(), default=1.0) or 1.0
    return [(name, seconds, seconds / longest) for name, seconds in times.items()]


def _run_curves(folder: Location) -> dict[str, Any]:
    """Validation metrics and losses by epoch (or step) from ``RUN/history.jsonl``."""
    path = folder / "history.jsonl"
    if not path.is_file():
        raise UserError(f"run {folder} has no history.jsonl", "Give the folder that `vlrank train --out` made.")
    rows = read_json_lines(path)
    axis = next((name for name in ("epoch", "step", "global_step") if rows and name in rows[0]), None)
    series: dict[str, list[list[float]]] = {}
    for place, row in enumerate(rows, start=1):
        x = row.get(axis, place) if axis else place
        flat = {**row, **row["metrics"]} if isinstance(row.get("metrics"), dict) else row
        for name, value in flat.items():
            if ("@" in name or "loss" in name) and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append([x, value])
    return {"name": folder.name, "axis": axis or "evaluation", "series": series}


def _run_phases(folder: Location) -> dict[str, float]:
    """Seconds by phase from ``RUN/result.json``; empty for a run that is not finished."""
    path = folder / "result.json"
    phases = read_json(path).get("phases", {}) if path.is_file() else {}
    return {name: float(seconds) for name, seconds in phases.items() if seconds >= 0.5}


def _sweep(folder: Path) -> list[dict[str, Any]]:
    """Trials of ``SWEEP/trials.jsonl``."""
    path = folder / "trials.jsonl"
    if not path.is_file():
        raise UserError(f"sweep {folder} has no trials.jsonl", "Give the folder that `vlrank tune --out` made.")
    return [
        {
            "mode": str(row.get("mode", "")),
            "name": str(row.get("trial_id", "")),
            "config": {
                key: value for key, value in row.get("config", {}).items() if isinstance(value, int | float | str)
            },
            "metric": str(row.get("metric", "")),
            "status": str(row.get("status", "")),
            "seconds": row.get("seconds", 0.0),
            "gpus": row.get("gpus", 0.0),
            "points": [
                [entry["epoch"], entry["metric"], entry.get("seconds", 0.0)]
                for entry in row.get("epochs", [])
                if math.isfinite(entry.get("metric", math.nan))
            ],
        }
        for row in read_json_lines(path)
    ]

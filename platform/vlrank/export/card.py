"""The model card of an exported model: data, protocol, metrics, training recipe, agreement with its run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlrank.config import TrainConfig
from vlrank.data.dataset import Dataset
from vlrank.engines.models import ModelFolder
from vlrank.evaluation.metrics import label
from vlrank.prompting.modes import mode_spec
from vlrank.reranking.ranker import describe_agreement
from vlrank.version import __version__

_LOCAL = ("dataset", "out", "model", "ray", "report_to", "resume")
"""Settings that name places and machines of whoever trained the model."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card is written from.

    Attributes:
        model: The run's model.
        name: Of the exported folder.
        merged: Whether an adapter was merged.
        quantization: ``fp8``, or None.
        settings: ``config.yaml`` of the run; empty where there is none.
        result: ``result.json`` of the run, with ``best``.
        dataset: Of the run, where it is at hand.
        metrics: ``metrics.json`` of `vlrank evaluate`; empty where none was given.
        agreed: Sums of `agreement`; empty where nothing was compared.
    """

    model: ModelFolder
    name: str
    merged: bool
    quantization: str | None
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    dataset: Dataset | None
    metrics: Mapping[str, Any]
    agreed: Mapping[str, int]


def card(facts: Facts) -> str:
    """Markdown with the hub's YAML header; names no folder of this machine."""
    model, ranking = facts.model, facts.model.ranking
    base = str(facts.settings.get("model") or model.base) if not model.is_adapter else model.base
    on_hub = not Path(base).exists() and base.count("/") == 1 and not base.startswith((".", "~"))
    header: dict[str, Any] = {
        "library_name": "transformers" if facts.merged or not model.is_adapter else "peft",
        "pipeline_tag": "image-text-to-text" if model.family == "vision" else "text-generation",
        "tags": ["vlrank", "reranker", "listwise-reranking", "recommendation"],
        **({"base_model": base} if on_hub else {}),
    }
    spec = mode_spec(str(model.mode))
    shown = f"its text and its {spec.shown}"
    method = f"{model.details.get('method', 'full')} fine-tuning"
    form = ", ".join(
        [
            *(["adapter merged in float32"] if facts.merged else []),
            *(["decoder in FP8 (compressed-tensors, dynamic activations)"] if facts.quantization else []),
        ]
    )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {facts.name}",
        f"A listwise reranker for recommendation, made by vlrank {__version__}: it "
        f"reads a user's history and up to {ranking.window} numbered candidates, of each {shown}, and answers with the "
        f"number of the next item. The probabilities of all numbers are the ranking. "
        f"Base model: {base if on_hub else Path(base).name}, {method}{f' ({form})' if form else ''}.",
        _USE.format(name=facts.name, mode=model.mode),
        *_data(facts),
        *_metrics(facts.metrics),
        *_recipe(facts),
        *_agreement(facts),
    ]
    return "\n\n".join(parts) + "\n"


_USE = """## Use

```python
from vlrank import Qwen3VLReranker, load_item_meta

reranker = Qwen3VLReranker.load("{name}", item_meta=load_item_meta("data/shop"))
reranker.rerank(history, candidates)  # [(item_id, log-probability), ...], best first
```

`vlrank.json` holds the mode (`{mode}`) and the settings that prompts are made with. transformers and vLLM load the
folder as any model of its architecture; a ranking is read from the next-token probabilities of the numbers."""


def _data(facts: Facts) -> Iterator[str]:
    if facts.dataset is None:
        return
    manifest = facts.dataset.manifest
    counts = ", ".join(f"{count:,} {what}" for what, count in manifest.get("counts", {}).items())
    options, split = manifest.get("options", {}), manifest.get("split", {})
    kept = ", ".join(f"{key} {options[key]}" for key in ("min_rating", "min_uc", "min_sc") if key in options)
    method = str(split.get("method", "unknown")).replace("_", "-")
    files = ", ".join(f"`{file['name']}`" for role in manifest.get("inputs", {}).values() for file in role)
    made = "; ".join([counts, f"split {method}", *([f"filters: {kept}"] if kept else [])])
    yield f"## Data\n\n{made}.{f' Raw files: {files}.' if files else ''}"


def _metrics(metrics: Mapping[str, Any]) -> Iterator[str]:
    if not metrics:
        return
    yield "## Metrics\n\nMeans over users with 95% bootstrap intervals; a target that is not in the list is a miss."
    for group in metrics["groups"]:
        protocol = group["protocol"]
        names = _columns(group)
        head = (
            f"{protocol['name']} protocol, {protocol['split']}, {protocol['users']:,} users, "
            f"{protocol['candidates_per_user']} candidates"
            f"{' of ' + protocol['candidates'] if protocol['candidates'] else ''}; "
            f"{protocol['coverage']:.1%} of the targets are among them:"
        )
        rows = [f"| method | {' | '.join(label(name) for name in names)} |", "| --- " * (len(names) + 1) + "|"]
        for method in group["methods"]:
            cells = [method["metrics"][name] for name in names]
            values = [f"{cell['mean']:.4f} [{cell['low']:.4f}, {cell['high']:.4f}]" for cell in cells]
            rows.append(f"| {method['name']}{'' if method['kind'] == 'model' else ' (rival)'} | {' | '.join(values)} |")
        yield head + "\n\n" + "\n".join(rows)


def _columns(group: Mapping[str, Any]) -> list[str]:
    """Recall, NDCG and MRR at 10, or at the largest cut-off below."""
    known = group["methods"][0]["metrics"]
    cuts = sorted({int(name.partition("@")[2]) for name in known if name.startswith("ndcg@")})
    k = max((cut for cut in cuts if cut <= 10), default=cuts[0])
    return [f"{kind}@{k}" for kind in ("recall", "ndcg", "mrr")]


def _recipe(facts: Facts) -> Iterator[str]:
    if not facts.settings:
        return
    defaults = {name: _plain(field.default) for name, field in TrainConfig.model_fields.items()}
    used = _changed({key: value for key, value in facts.settings.items() if key not in _LOCAL}, defaults)
    best, text = facts.result.get("best", {}), ""
    if best:
        chosen = f"{label(best['metric'])} on validation users: {best['value']:.4f}, step {best['step']:,}"
        text = f" Best checkpoint by {chosen}."
    yield (
        f"## Training\n\n`vlrank train` with these settings; the others are its defaults.{text}\n\n"
        f"```yaml\n{yaml.safe_dump(used, sort_keys=False)}```"
    )


def _changed(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults, of nested ones too."""
    changed = {}
    for key, value in settings.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value = _changed(value, default) or None
        if value is not None and value != default:
            changed[key] = value
    return changed


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def _agreement(facts: Facts) -> Iterator[str]:
    if facts.agreed.get("compared"):
        yield (
            "## Agreement with the trained checkpoint\n\nRankings of this folder and of the checkpoint that it was "
            f"made from, for {facts.agreed['compared']} validation users: {describe_agreement(facts.agreed)}."
        )

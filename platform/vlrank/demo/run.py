"""`vlrank demo`: the embedded shop through every stage, with tiny models.

Only the shop and the models are special to the demo; its recipe is ``configs/recipes/demo.yaml``.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from vlrank.config import MODES, DemoConfig, Mode, config_dir, merge, read_yaml, validate
from vlrank.console import Summary, console
from vlrank.data.dataset import Dataset
from vlrank.data.tables import atomic_write_json
from vlrank.demo.captions import caption_accuracy
from vlrank.demo.shop import make_products, write_raw_shop
from vlrank.errors import UserError
from vlrank.recipes.recipe import RunConfig, name_of
from vlrank.recipes.run import run as run_recipe

N_ITEMS, N_USERS = 480, 480
_UNTRAINED = "_zero_shot"
"""End of the name of the rankings that a mode's base model made."""


def run(config: DemoConfig) -> Summary:
    """Run the demo; a second run in the same folder does only what is missing.

    Raises:
        UserError: a package that the demo needs is not installed, or the folder holds something else.
    """
    _check(config)
    out = config.out
    marker = out / "demo.json"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise UserError(f"{out} holds files that are not of a demo", "Choose another folder with --out.")
    if config.fresh and out.exists():
        shutil.rmtree(out)
    if marker.exists() and read_yaml(marker) != _identity(config):
        raise UserError(f"{out} holds a demo with other options", "Add --fresh to replace it, or choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_json(marker, _identity(config))

    summary = run_recipe(_recipe(config))
    _print_gains(read_yaml(out / "report" / "metrics.json"), config.modes)
    lines = {**summary.lines, "captions": _captions(config), "metrics": out / "report" / "metrics.json"}
    return Summary("demo: all stages ran", lines, summary.output, summary.counts, summary.failure)


def _captions(config: DemoConfig) -> str:
    """How many of the demo's captions are right, e.g. ``right kind 99.0%, ..., all three 97.2% of 288 items``."""
    dataset = Dataset.open(config.out / "shop")
    source_ids = dict(dataset.items().select("item_id", "source_id").iter_rows())
    kept = set(source_ids.values())
    products = [product for product in make_products(N_ITEMS, config.seed) if product.source_id in kept]
    generated = dataset.generated("caption")
    captions = {} if generated is None else dict(generated.select("item_id", "text").iter_rows())
    right = caption_accuracy(products, {source_ids[item]: text for item, text in captions.items()})
    return "right " + ", ".join(f"{part} {share:.1%}" for part, share in right.items()) + f" of {len(products)} items"


def _identity(config: DemoConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"out", "fresh"})


def _check(config: DemoConfig) -> None:
    needs = ["ray", "torch", "transformers", "peft"]
    if "semantic_summary_small" in config.modes:
        needs += ["unsloth", "bitsandbytes"]
    if config.engine == "vllm":
        needs.append("vllm")
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        raise UserError(f"the demo needs {', '.join(missing)}", "`vlrank doctor` shows how to install what is missing.")


def _recipe(config: DemoConfig) -> RunConfig:
    """The demo's recipe for the chosen modes, with the shop and the models that it starts from."""
    from vlrank.demo.base_models import make_demo_models  # imports torch, which takes seconds

    console.print("drawing the shop and making the tiny models")
    write_raw_shop(config.out / "raw", n_items=N_ITEMS, n_users=N_USERS, seed=config.seed)
    models = make_demo_models(config.out / "models")

    recipe = read_yaml(config_dir() / "recipes" / "demo.yaml")
    settings = {
        "raw": str(config.out / "raw"),
        "seed": config.seed,
        **{kind: str(path) for kind, path in models.items()},
    }
    common = merge(recipe["common"], {"engine": {"name": config.engine}})
    absent = {name for mode in MODES if mode not in config.modes for name in (mode, mode + _UNTRAINED, f"{mode}_model")}
    if not config.trials:
        absent.add("sweep")
    stages = [stage for stage in recipe["stages"] if name_of(stage) not in absent]
    for stage in stages:
        if "generate" in stage and config.engine != "auto":
            stage.pop("engine", None)  # the chosen engine writes everything
        if "rerank" in stage and stage["model"] in absent:  # the retriever's lists are there for any mode
            stage["model"] = f"{config.modes[0]}_model"
        if "tune" in stage:
            stage["trials"] = config.trials
        if "evaluate" in stage:
            stage |= {key: [name for name in stage[key] if name not in absent] for key in ("rankings", "runs")}
            stage |= {"sweep": None if "sweep" in absent else "sweep"}
    return validate(RunConfig, {"out": config.out, "settings": settings, "common": common, "stages": stages})


def _print_gains(metrics: dict[str, Any], modes: Sequence[Mode]) -> None:
    """What training added to the modes whose base model ranked too, user by user."""
    found = {(d["a"], d["b"]): d for d in metrics["groups"][0]["differences"] if d["metric"] == "ndcg@10"}
    table = Table("mode", "NDCG@10", "95% interval", "p (Holm)", title="What training added", title_justify="left")
    for mode in modes:
        if gain := found.get((mode, mode + _UNTRAINED)):
            interval = f"{gain['low']:+.3f}, {gain['high']:+.3f}"
            table.add_row(mode, f"{gain['difference']:+.3f}", interval, f"{gain['p_holm']:.3f}")
    if table.row_count:
        console.print(table)

"""`vlrank demo`: the embedded shop through every stage, with tiny models.

Only the shop and the sizes are special to the demo; the stages are the same as on a cluster.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

from vlrank.config import (
    Config,
    DemoConfig,
    EvaluateConfig,
    GenerateConfig,
    Mode,
    PrepareConfig,
    RayConfig,
    RerankConfig,
    TrainConfig,
    TuneConfig,
    config_dir,
    merge,
    read_yaml,
    validate,
)
from vlrank.console import Summary, console
from vlrank.data.tables import atomic_write_json
from vlrank.errors import UserError
from vlrank.prompting.modes import mode_spec
from vlrank.runtime import ray_session

C = TypeVar("C", bound=Config)
_UNTRAINED = "_zero_shot"
"""End of the name of the rankings that a mode's base model made."""


class _Clock:
    """Announces each stage and measures its time."""

    def __init__(self, total: int) -> None:
        self.seconds: dict[str, float] = {}
        self._total = total

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        console.rule(Text(f"{len(self.seconds) + 1}/{self._total} {name}", "bold"), align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run(config: DemoConfig) -> Summary:
    """Run the demo; a second run in the same folder does only what is missing.

    Raises:
        UserError: a package that the demo needs is not installed, or the folder holds something else.
    """
    settings = read_yaml(config_dir() / "demo.yaml")
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

    clock = _Clock(total=5 + 2 * len(config.modes) + (config.trials > 0))
    with ray_session(RayConfig()):
        dataset, rankings = _stages(config, settings, out, clock)
    with clock.stage("evaluate"):
        from vlrank.evaluation.run import run as evaluate

        runs = [out / "runs" / mode for mode in config.modes]
        sweep = out / "sweep" if config.trials else None
        summary = evaluate(
            EvaluateConfig(
                dataset=dataset,
                rankings=tuple(rankings),
                out=out / "report",
                runs=tuple(runs),
                sweep=sweep,
                seed=config.seed,
            )
        )
    _print_gains(read_yaml(out / "report" / "metrics.json"), config.modes)
    _print_times(clock.seconds)
    return Summary(
        "demo: all stages ran",
        lines={"metrics": out / "report" / "metrics.json", "total": f"{sum(clock.seconds.values()) / 60:.1f} minutes"},
        output=summary.output,
        counts=summary.counts,
    )


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


def _stages(config: DemoConfig, settings: dict[str, Any], out: Path, clock: _Clock) -> tuple[Path, list[Path]]:
    """All stages from drawing the shop to rankings of the test users."""
    # Imported here, as torch and Ray take seconds to load.
    from vlrank.data.prepare import run as prepare
    from vlrank.demo.base_models import make_demo_models
    from vlrank.demo.shop import write_raw_shop
    from vlrank.generation.pipeline import run as generate
    from vlrank.reranking.pipeline import run as rerank
    from vlrank.training.run import run as train
    from vlrank.tuning.run import run as tune

    dataset = out / "shop"  # the report is titled after the folder
    engine = {"name": config.engine, **settings["engine"]}

    def build(kind: type[C], *layers: dict[str, Any], **keys: Any) -> C:
        values: dict[str, Any] = {}
        for layer in layers:
            values = merge(values, layer)
        return validate(kind, values | keys)

    with clock.stage("draw the shop, prepare the dataset"):
        raw = write_raw_shop(out / "raw", seed=config.seed, **settings["shop"])
        keys: dict[str, Any] = {"reviews": (raw.reviews,), "meta": (raw.meta,), "out": dataset}
        prepare(build(PrepareConfig, settings["prepare"], **keys)).show()

    with clock.stage("make the tiny base models"):
        models = make_demo_models(out / "models")

    for what in ("caption", "semantic_summary"):
        with clock.stage(f"generate: {what}"):
            keys = {"dataset": dataset, "what": what, "model": str(models["vision"]), "engine": engine}
            generate(build(GenerateConfig, settings["generate"], **keys)).show()

    def training(mode: Mode) -> dict[str, Any]:
        base = {"model": str(models[mode_spec(mode).family]), "seed": config.seed}
        return merge(merge(settings["train"]["common"], settings["train"][mode]), base)

    for mode in config.modes:
        with clock.stage(f"train: {mode}"):
            train(build(TrainConfig, training(mode), dataset=dataset, out=out / "runs" / mode, mode=mode)).show()

    if config.trials:
        tuned = settings["tune"]["mode"]
        with clock.stage(f"tune: {tuned}"):
            keys = {"dataset": dataset, "out": out / "sweep", "modes": [tuned], "trials": config.trials}
            shared = {"train": merge(training(tuned), settings["tune"]["train"]), "seed": config.seed}
            tune(build(TuneConfig, settings["tune"]["sweep"], shared, **keys)).show()

    rankings = []
    for mode in config.modes:
        shape = training(mode)
        # The base model on the same lists, before it has seen a user of this shop.
        before = {"model": shape["model"], "as_mode": mode, "ranking": shape["ranking"]}
        chosen_models = {mode: {"model": str(out / "runs" / mode)}, mode + _UNTRAINED: before}
        with clock.stage(f"rerank: {mode}, trained and not"):
            for name, chosen in chosen_models.items():
                path = out / "rankings" / f"{name}.parquet"
                keys = {"dataset": dataset, "out": path, "seed": config.seed, **chosen}
                rerank(build(RerankConfig, {"engine": engine}, settings["rerank"], **keys)).show()
                rankings.append(path)
    return dataset, rankings


def _print_gains(metrics: dict[str, Any], modes: Sequence[Mode]) -> None:
    """What training added to each mode, user by user."""
    found = {(d["a"], d["b"]): d for d in metrics["groups"][0]["differences"] if d["metric"] == "ndcg@10"}
    table = Table("mode", "NDCG@10", "95% interval", "p (Holm)", title="What training added", title_justify="left")
    for mode in modes:
        gain = found[mode, mode + _UNTRAINED]
        interval = f"{gain['low']:+.3f}, {gain['high']:+.3f}"
        table.add_row(mode, f"{gain['difference']:+.3f}", interval, f"{gain['p_holm']:.3f}")
    console.print(table)


def _print_times(seconds: dict[str, float]) -> None:
    table = Table("stage", "seconds", title="Where the time went", title_justify="left")
    table.columns[1].justify = "right"
    for name, value in seconds.items():
        table.add_row(name, f"{value:.0f}")
    console.print(table)

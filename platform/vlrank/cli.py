"""The `vlrank` command: one subcommand per stage. Thin: a stage's work lives in its room, its options in its config."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from vlrank import __version__
from vlrank.config import (
    DemoConfig,
    EvaluateConfig,
    GenerateConfig,
    PrepareConfig,
    RerankConfig,
    RetrieveConfig,
    TrainConfig,
    TuneConfig,
)
from vlrank.console import Summary
from vlrank.options import main as run_command
from vlrank.options import stage_command


def _lazy(target: str) -> Callable[[Any], Summary]:
    """``"module:function"``, imported when called: `vlrank --help` loads neither torch nor Ray."""
    module, _, function = target.partition(":")
    return lambda config: getattr(import_module(module), function)(config)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vlrank")
def cli() -> None:
    """Train, tune and run multimodal listwise rerankers on Ray.

    A dataset goes through prepare, generate, retrieve, train, tune, rerank and evaluate; each stage can be run alone,
    stopped, and run again. Start with `vlrank demo`.
    """


cli.add_command(stage_command("demo", DemoConfig, _lazy("vlrank.demo.run:run")))
cli.add_command(stage_command("prepare", PrepareConfig, _lazy("vlrank.data.prepare:run")))
cli.add_command(
    stage_command(
        "generate",
        GenerateConfig,
        _lazy("vlrank.generation.pipeline:run"),
        plan=_lazy("vlrank.generation.pipeline:plan"),
        positional=["dataset"],
    )
)
cli.add_command(
    stage_command("retrieve", RetrieveConfig, _lazy("vlrank.evaluation.retrieve:run"), positional=["dataset"])
)
cli.add_command(stage_command("train", TrainConfig, _lazy("vlrank.training.run:run"), positional=["dataset"]))
cli.add_command(
    stage_command(
        "tune", TuneConfig, _lazy("vlrank.tuning.run:run"), plan=_lazy("vlrank.tuning.run:plan"), positional=["dataset"]
    )
)
cli.add_command(stage_command("rerank", RerankConfig, _lazy("vlrank.reranking.pipeline:run"), positional=["dataset"]))
cli.add_command(stage_command("evaluate", EvaluateConfig, _lazy("vlrank.evaluation.run:run"), positional=["dataset"]))


@cli.command()
def doctor() -> int:
    """Versions, devices, memory, Ray address, engines and extras; for what is missing, the command that installs it."""
    from vlrank.doctor import doctor as examine

    return examine()


@cli.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--user", type=int, help="Show this user's history.")
@click.option("--item", type=int, help="Show this item: picture, text, caption, summary.")
def inspect(dataset: Path, user: int | None, item: int | None) -> None:
    """Show a dataset, one user's history, or one item."""
    from vlrank.data.inspect import inspect_dataset

    inspect_dataset(dataset, user=user, item=item)


def main() -> None:
    """Entry point of the console script."""
    run_command(cli)


if __name__ == "__main__":
    main()

"""The `vlrank` command: one subcommand per stage. Thin: a stage's work lives in its room, its options in its config."""

from __future__ import annotations

import click

from vlrank.config import DemoConfig, ExportConfig, ListsConfig
from vlrank.options import main as run_command
from vlrank.options import print_end, stage_command
from vlrank.recipes.recipe import JOBS
from vlrank.stages import Stage, lazy
from vlrank.submit import jobs_command, submit_command
from vlrank.supervisor import supervised
from vlrank.version import __version__


class _InOrder(click.Group):
    """Lists commands in the order of the work instead of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands as they were added."""
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vlrank")
def cli() -> None:
    """Train, tune and run multimodal listwise rerankers on Ray.

    A dataset goes through prepare, generate, retrieve, train, tune, rerank and evaluate; each stage can be run alone,
    stopped, and run again; `vlrank run` takes them from a recipe. Start with `vlrank demo`.
    """


_COMMANDS: dict[str, Stage] = {
    "demo": (DemoConfig, "vlrank.demo.run:run", None),
    **JOBS,
    "export": (ExportConfig, "vlrank.export.run:run", None),
    "lists": (ListsConfig, "vlrank.retrieval.exporting:run", None),
}
for name, (config_type, run, dry_run) in _COMMANDS.items():
    cli.add_command(
        stage_command(
            name,
            config_type,
            lazy(run),
            dry_run=lazy(dry_run) if dry_run else None,
        )
    )


@cli.command()
def doctor() -> int:
    """Show what is installed, what is missing, and how to install it."""
    from vlrank.doctor import doctor as examine

    return examine()


@cli.command()
@click.argument("dataset")
@click.option("--user", help="Show this user's history; an id, or the source's own name for the user.")
@click.option("--item", help="Show this item: picture, text, caption, summary; an id, or the source's (ASIN).")
def inspect(dataset: str, user: str | None, item: str | None) -> None:
    """Show a dataset, one user's history, or one item."""
    from vlrank.data.inspect import inspect_dataset

    inspect_dataset(dataset, user=user, item=item)


cli.add_command(submit_command)
cli.add_command(jobs_command)


def main() -> None:
    """Entry point of the console script."""
    supervised(lambda: run_command(cli), print_end)


if __name__ == "__main__":
    main()

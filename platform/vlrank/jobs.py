"""What every script in ``jobs/`` shares: the stage's own flags in, one JSON last line and an exit code out.

A job prints ``{"status", "output", "counts", "message"}`` as the last line of its standard output and exits with
0 (done), 2 (something the user can mend, see `UserError`) or 1 (anything else). ``ray job`` keeps the end of the output
as the message of a failed job, so the reason stands in its status.

``python -m vlrank.jobs STAGE ...`` is the same for any stage; `vlrank.submit` starts its jobs this way.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from vlrank.config import Config, validate
from vlrank.console import Summary, print_anything
from vlrank.errors import UserError, user_error_in
from vlrank.options import check_out, stage_command
from vlrank.paths import WORKDIR
from vlrank.recipes.recipe import JOBS, absolute_recipe
from vlrank.stages import lazy
from vlrank.storage import Location
from vlrank.supervisor import INTERRUPTED, supervised

C = TypeVar("C", bound=Config)


def main(
    stage: Callable[[C], Summary],
    config_type: type[C],
    argv: Sequence[str] | None = None,
    *,
    dry_run: Callable[[C], Summary] | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    extra: Sequence[click.Parameter] = (),
) -> NoReturn:
    """Parse the arguments as ``vlrank STAGE`` does, run the stage, report, exit: the whole body of a job script.

    Args:
        stage: The stage's ``run``.
        config_type: The stage's config; its fields are the flags.
        argv: Arguments, by default the process's own.
        dry_run: What ``--dry_run`` calls instead of ``stage``.
        aliases, adapt, extra: Historic flags, see `vlrank.options.stage_command`.
    """

    def at_home(work: Callable[[C], Summary]) -> Callable[[C], Summary]:
        def staged(config: C) -> Summary:
            config = _in_workdir(config)
            if work is stage:
                check_out(config)
            return work(config)

        return staged

    name = config_type.__name__.removesuffix("Config").lower()
    command = stage_command(
        name,
        config_type,
        at_home(stage),
        dry_run=at_home(dry_run) if dry_run else None,
        aliases=aliases,
        adapt=adapt,
        extra=extra,
    )

    def work() -> NoReturn:
        run_and_exit(lambda: command.main(args=None if argv is None else list(argv), standalone_mode=False))

    if argv is None:
        supervised(work, _last_line)
    work()


def run_and_exit(work: Callable[[], Summary | int | None]) -> NoReturn:
    """Run ``work``, print the JSON last line and exit; for jobs that are no single stage."""
    print_anything()
    try:
        summary = work()
    except (UserError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        _last_line("error", message)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, click.Abort):
        _last_line("interrupted", INTERRUPTED)
        raise SystemExit(130) from None
    except Exception as error:
        # A UserError raised in a Ray worker arrives wrapped in the exception of the task that raised it.
        cause = user_error_in(error)
        if cause is None:
            traceback.print_exc()
        inner = getattr(error, "cause", None) or error  # a RayTaskError's text is a traceback
        _last_line("error", str(cause) if cause else f"{type(inner).__name__}: {inner}")
        raise SystemExit(2 if cause else 1) from None
    if isinstance(summary, Summary):
        summary.show()
        if summary.failure:
            _last_line("error", summary.failure, summary.output, summary.counts)
            raise SystemExit(2)
        facts = "; ".join([summary.title, *(f"{key}: {value}" for key, value in summary.lines.items())])
        _last_line("ok", facts, summary.output, summary.counts)
    raise SystemExit(0)


def _in_workdir(config: C) -> C:
    """The config with paths that mean the same on every node: in a job, relative ones are taken from `WORKDIR`.

    Raises:
        UserError: no such folder; or none is given, a path is relative, and the current folder goes away with the job.
    """
    folder = os.environ.get(WORKDIR)
    if not folder and _UPLOADED not in Path.cwd().parts:
        return config
    try:
        values = absolute_recipe(config, folder)
        if folder:
            os.chdir(folder)  # for what is a path or a name: `model`, a file as `method`
    except UserError as error:
        remedy = f"Give absolute paths on storage that every node sees, or set {WORKDIR}=/FOLDER in the job's env_vars."
        raise UserError(error.problem, remedy) from None
    except OSError as error:
        raise UserError(
            f"{WORKDIR} {folder} cannot be entered on this node: {error.strerror}",
            "Give a folder on storage that every node has mounted at the same place.",
        ) from None
    return validate(type(config), values)


_UPLOADED = "working_dir_files"
"""Ray unpacks a job's working directory into a folder of this name."""


def _last_line(
    status: str, message: str, output: Location | None = None, counts: Mapping[str, int] | None = None
) -> None:
    sys.stderr.flush()
    place = None if output is None else str(output)
    print(json.dumps({"status": status, "output": place, "counts": dict(counts or {}), "message": message}), flush=True)


def _stage_main(argv: Sequence[str]) -> NoReturn:
    if not argv or argv[0] not in JOBS:
        raise SystemExit(f"usage: python -m vlrank.jobs {'|'.join(JOBS)} [OPTIONS]")
    config_type, run, dry_run = JOBS[argv[0]]
    main(lazy(run), config_type, argv[1:], dry_run=lazy(dry_run) if dry_run else None)


if __name__ == "__main__":
    supervised(lambda: _stage_main(sys.argv[1:]), _last_line)

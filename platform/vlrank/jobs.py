"""What every script in ``jobs/`` shares: flags of a stage's config in, one JSON last line and an exit code out.

A job prints ``{"status", "output", "counts", "message"}`` as the last line of its standard output and exits with
0 (done), 2 (something the user can mend, see `UserError`) or 1 (anything else). ``ray job`` keeps the end of the output
as the message of a failed job, so the reason stands in its status.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml

from vlrank.config import Config, load_config
from vlrank.console import Summary
from vlrank.errors import UserError

C = TypeVar("C", bound=Config)


def main(
    stage: Callable[[C], Summary],
    config_type: type[C],
    argv: Sequence[str] | None = None,
    *,
    plan: Callable[[C], Summary] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> NoReturn:
    """Parse the arguments, run the stage, report, exit: the whole body of a job script.

    Args:
        stage: The stage's ``run``.
        config_type: The stage's config; its fields are the flags.
        argv: Arguments, by default the process's own.
        plan: What ``--dry_run`` calls instead of ``stage``.
        aliases: Other spellings of flags, e.g. ``{"rerank_lr": "lr"}``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def work() -> Summary:
        dry_run = "--dry_run" in arguments or "--dry-run" in arguments
        rest = [argument for argument in arguments if argument not in ("--dry_run", "--dry-run")]
        config = parse(config_type, rest, aliases=aliases)
        if not dry_run:
            return stage(config)
        if plan is None:
            raise UserError("this job has no dry run", "Leave --dry_run away.")
        return plan(config)

    run_and_exit(work)


def run_and_exit(work: Callable[[], Summary]) -> NoReturn:
    """Run ``work``, print the JSON last line and exit; for jobs whose flags need more than `main` offers."""
    try:
        summary = work()
    except UserError as error:
        _last_line("error", str(error))
        raise SystemExit(2) from None
    except Exception as error:
        traceback.print_exc()
        # A UserError raised in a Ray worker arrives wrapped in the exception of the task that raised it.
        cause = _user_error(error)
        _last_line("error", str(cause) if cause else f"{type(error).__name__}: {error}")
        raise SystemExit(2 if cause else 1) from None
    summary.show()
    _last_line("ok", _message(summary), summary.output, summary.counts)
    raise SystemExit(0)


def parse(config_type: type[C], argv: Sequence[str], *, aliases: Mapping[str, str] | None = None) -> C:
    """``DATASET --key value ... key=value`` and ``--config FILE`` as the stage's config.

    A flag of a list takes every value up to the next flag, or one value with commas; a flag of a switch takes none (or
    true/false); all others take exactly one. ``--engine.name vllm`` reaches into nested configs.

    Raises:
        UserError: an unknown flag or a value of the wrong type; the message names the key.
    """
    overrides: list[str] = []
    flags: dict[str, Any] = {}
    file: Path | None = None
    pending = list(argv)
    while pending:
        token = pending.pop(0)
        if not token.startswith("--"):
            if "=" in token:
                overrides.append(token)
            elif "dataset" in config_type.model_fields and "dataset" not in flags:
                flags["dataset"] = token
            else:
                raise UserError(f"unexpected argument {token!r}", "Options are of the form --key value or key=value.")
            continue
        name, equals, value = token[2:].partition("=")
        key = name.replace("-", "_")
        key = (aliases or {}).get(key, key)
        kind = _annotation(config_type, key)
        if kind is bool:
            if not equals:
                takes_value = bool(pending) and pending[0].lower() in ("true", "false")
                value = pending.pop(0) if takes_value else "true"
            _put(flags, key, value)
            continue
        if equals:
            values = [value]
        elif get_origin(kind) is tuple:
            values = []
            while pending and not pending[0].startswith("--"):
                values.append(pending.pop(0))
        else:
            values = [pending.pop(0)] if pending and not pending[0].startswith("--") else []
        if not values:
            raise UserError(f"flag --{name} needs a value")
        if key == "config":
            file = Path(values[0])
        elif get_origin(kind) is tuple:
            _put(flags, key, values[0].split(",") if len(values) == 1 else values)
        else:
            _put(flags, key, yaml.safe_load(values[0]) if get_origin(kind) is dict else values[0])
    return load_config(config_type, file=file, overrides=overrides, **flags)


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def _annotation(config_type: type[Config], dotted: str) -> Any:
    """The type of a (nested) field without its ``| None``; None where the key is unknown: `load_config` says so."""
    kind: Any = config_type
    for name in dotted.split("."):
        if not (isinstance(kind, type) and issubclass(kind, Config)) or name not in kind.model_fields:
            return None
        kind = kind.model_fields[name].annotation
        if get_origin(kind) in (Union, UnionType):
            kind = next(option for option in get_args(kind) if option is not type(None))
    return kind


def _user_error(error: BaseException) -> UserError | None:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, UserError):
            return link
        inner = getattr(link, "cause", None)  # ray.exceptions.RayTaskError
        link = link.__cause__ or link.__context__ or (inner if isinstance(inner, BaseException) else None)
    return None


def _message(summary: Summary) -> str:
    return "; ".join([summary.title, *(f"{key}: {value}" for key, value in summary.lines.items())])


def _last_line(status: str, message: str, output: Path | None = None, counts: Mapping[str, int] | None = None) -> None:
    sys.stderr.flush()
    place = None if output is None else str(output)
    print(json.dumps({"status": status, "output": place, "counts": dict(counts or {}), "message": message}), flush=True)

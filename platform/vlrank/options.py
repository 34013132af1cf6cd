"""Command-line options made from a stage's config model, for `vlrank STAGE` and for ``jobs/STAGE.py`` alike.

Every scalar field becomes ``--field``, with the help text, choices and default of the model; nested keys are given as
``engine.replicas=2``. So a key has one name in YAML, on the command line and in an override.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from vlrank.config import Config, load_config
from vlrank.console import Summary, announce, console, print_anything, quiet_libraries
from vlrank.errors import UserError, user_error_in
from vlrank.storage import require_writable
from vlrank.supervisor import INTERRUPTED

C = TypeVar("C", bound=Config)


class StageCommand(click.Command):
    """A click command whose repeatable options take several values at once: ``--meta A B`` = ``--meta A --meta B``."""

    nested_keys: Sequence[tuple[str, str]] = ()
    """Keys without an option of their own, as they are given, with their help texts."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, then the nested keys."""
        super().format_options(ctx, formatter)
        if self.nested_keys:
            with formatter.section("Nested keys, given as KEY=VALUE or in the YAML file"):
                formatter.write_dl(self.nested_keys)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spread such values before click sees them; a ``key=value`` word ends a list."""
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread: list[str] = []
        current: str | None = None
        fresh = False
        for arg in args:
            if arg.startswith("-"):
                current, fresh = (arg, True) if arg in several else (None, False)
                spread.append(arg)
            elif current is None or fresh:
                spread.append(arg)
                fresh = False
            elif _is_override(arg):
                current = None
                spread.append(arg)
            else:
                spread += [current, arg]
        return super().parse_args(ctx, spread)


def stage_command(
    name: str,
    config_type: type[C],
    run: Callable[[C], Summary],
    *,
    dry_run: Callable[[C], Summary] | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    hidden: Sequence[str] = (),
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    extra: Sequence[click.Parameter] = (),
) -> StageCommand:
    """A command that builds ``config_type`` from its options and calls ``run`` with it.

    `Config.positional` and `Config.file_argument` say what is given by position.

    Args:
        name: Command name.
        config_type: The stage's config model.
        run: The stage; gets a checked config, returns what it did.
        dry_run: What ``--dry_run`` calls instead of ``run``: says what ``run`` would do.
        aliases: Other option names of a field, e.g. ``{"lr": ["--rerank_lr"]}``.
        hidden: Fields without an option of their own.
        adapt: Rewrites the given values (options of ``extra`` included) before the config is built.
        extra: Further click parameters, consumed by ``adapt``.
    """
    positional = [key for key in (config_type.positional,) if key in config_type.model_fields]
    params: list[click.Parameter] = list(extra)
    nested: list[tuple[str, str]] = []
    for field_name, field in config_type.model_fields.items():
        if field_name in positional:
            params.append(click.Argument([field_name], required=False, metavar=field_name.upper()))
        elif _is_nested(field.annotation):
            nested += _nested_keys(field_name, field)
        elif field_name not in hidden:
            params.append(_option(field_name, field, (aliases or {}).get(field_name, ())))
            if config_type.file_argument:  # the file has what is required
                params[-1].help = _help(field).removesuffix(" [required]")
    if config_type.file_argument:
        file = click.Path(path_type=Path)
        params.append(click.Argument(["config_file"], type=file, metavar=config_type.file_argument))
    else:
        params.append(
            click.Option(["--config", "config_file"], type=click.Path(path_type=Path), help="YAML file of these keys.")
        )
    params.append(click.Option(["--dry_run", "dry"], is_flag=True, help="Say what would run, and on how much data."))
    params.append(click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE]..."))

    def callback(config_file: Path | None, dry: bool, overrides: tuple[str, ...], **given: Any) -> Summary:
        # An override given where a positional is expected (`vlrank train lr=1e-3 --config c.yaml`) is an override.
        moved = [given.pop(key) for key in positional if isinstance(given.get(key), str) and _is_override(given[key])]
        values = adapt(given) if adapt else given
        with _naming(config_file if config_type.file_argument else None):
            config = load_config(config_type, file=config_file, overrides=[*moved, *overrides], **values)
        if dry:
            return dry_run(config) if dry_run else _generic_dry_run(name, config)
        check_out(config)
        return run(config)

    params.sort(key=lambda param: "[required]" not in (getattr(param, "help", None) or ""))  # required ones first
    command = StageCommand(
        name, params=params, callback=callback, help=_first_upper((config_type.__doc__ or "").partition(": ")[2])
    )
    command.nested_keys = nested
    return command


@contextmanager
def _naming(file: Path | None) -> Iterator[None]:
    """Messages about a file's content that begin with its name."""
    try:
        yield
    except UserError as error:
        if file is None or str(file) in error.problem:
            raise
        raise UserError(f"{file}: {error.problem}", error.remedy) from None


def check_out(config: Config) -> None:
    """Refuse a stage whose output could not be written.

    Raises:
        UserError: ``out`` is on a read-only file system, or permission is missing.
    """
    out = getattr(config, "out", None) or getattr(config, "folder", None)
    if isinstance(out, Path):
        require_writable(out, "Choose another --out.")


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _is_override(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and key.replace(".", "_").isidentifier() and not Path(word).exists()


def _generic_dry_run(name: str, config: Config) -> Summary:
    keys = {key: value for key, value in config.model_dump(mode="json").items() if value is not None}
    return Summary(f"{name} (dry run): the config is valid", lines=keys)


def _is_nested(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return True
    return get_origin(annotation) is dict or (
        get_origin(annotation) is tuple and get_origin(get_args(annotation)[0]) is dict
    )


def _nested_keys(name: str, field: FieldInfo) -> list[tuple[str, str]]:
    """``("ranking.top_k", help)`` for each key of a nested config; one row for a free mapping or a list of them."""
    if get_origin(field.annotation) is tuple:
        return [(name, field.description or "")]
    if get_origin(field.annotation) is dict:
        return [(f"{name}.KEY", field.description or "")]
    inner: type[Config] = field.annotation  # type: ignore[assignment]
    return [(f"{name}.{key}", _help(one)) for key, one in inner.model_fields.items()]


def _option(name: str, field: FieldInfo, aliases: Sequence[str]) -> click.Option:
    annotation, multiple = _value_type(field)
    if annotation is bool:
        return click.Option([f"--{name}/--no_{name}", *aliases], default=None, help=_help(field))
    # pydantic converts and reports in the config's own words
    return click.Option(
        [f"--{name}", *aliases], type=click.STRING, multiple=multiple, default=None, help=_help(field), metavar="VALUE"
    )


def _help(field: FieldInfo) -> str:
    """The field's description, its choices and its default."""
    annotation, _ = _value_type(field)
    text = field.description or ""
    if get_origin(annotation) is Literal and all(isinstance(value, str) for value in get_args(annotation)):
        text += f" One of: {', '.join(get_args(annotation))}."
    if field.is_required():
        text += " [required]"
    elif field.default_factory is None and field.default not in (None, ()) and field.default is not False:
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        text += f" [default: {' '.join('true' if value is True else str(value) for value in default)}]"
    return text.strip()


def _value_type(field: FieldInfo) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several."""
    annotation: Any = field.annotation
    members = [member for member in get_args(annotation) if member is not type(None)]
    if get_origin(annotation) in (Union, types.UnionType) and len(members) == 1:
        annotation = members[0]
    return (get_args(annotation)[0], True) if get_origin(annotation) is tuple else (annotation, False)


def main(command: click.Command, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 130 interrupted, 2 for what the user can mend (one message, no traceback).

    Args:
        command: What to run; a returned `Summary` is shown.
        argv: Words after the program's name; default ``sys.argv[1:]``.
    """
    quiet_libraries()
    print_anything()
    try:
        result = command.main(args=None if argv is None else list(argv), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print_end("interrupted", INTERRUPTED)
        sys.exit(130)
    except Exception as error:
        found = user_error_in(error)  # one raised in a Ray worker arrives wrapped
        if found is None:
            raise
        print_end("error", str(found))
        sys.exit(2)
    if isinstance(result, Summary):
        result.show()
        if result.failure:
            announce("error:", result.failure, "bold red")
            sys.exit(2)
    sys.exit(result if isinstance(result, int) else 0)


def print_end(status: str, message: str) -> None:
    """The one message of a command that did not come to its end.

    Args:
        status: ``"interrupted"``, or ``"error"`` in front of what is one.
        message: What happened and, in the lines below, what to do.
    """
    if status == "error":
        announce("error:", message, "bold red")
    else:
        console.print(message, soft_wrap=True)

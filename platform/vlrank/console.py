"""What people see while a stage runs and when it ends."""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from vlrank.errors import UserError
from vlrank.storage import Location


class PlainConsole(Console):
    """A console that prints text as it is: names, paths and commands may hold ``[v2]``, ``[/b]`` or ``:key:``.

    Rich's markup and emoji codes are off, in tables too; styles come in `rich.text.Text`. Titles of panels and columns
    of progress bars parse markup whatever the console says: give them a `Text`, or ``markup=False``. Cells that are
    too long for the terminal are wrapped, never cut.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As Rich's, without the ellipsis that would hide the end of a path."""
        if isinstance(renderable, Table):
            for column in renderable.columns:
                if column.overflow == "ellipsis" and not column.no_wrap:
                    column.overflow = "fold"
        return super().render(renderable, options)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.on_broken_pipe()
            if not self.stderr:  # results that are lost are an error, messages are not
                raise UserError(f"cannot write the output: {error.strerror}", "Send it to another place.") from None

    def on_broken_pipe(self) -> None:
        """Nobody reads any more (``| head``): the work goes on in silence. Rich would end the program here."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


_LOOKALIKES = str.maketrans(
    {"\u00b1": "+-", "\u00d7": "x", "\u2013": "-", "\u2014": "-", "\u2026": "...", "\u2192": "->", "\u2265": ">="}
)


def _lookalike(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_LOOKALIKES)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error("vlrank", _lookalike)


def print_anything() -> None:
    """Let stdout and stderr take every text, whatever encoding the terminal or ``PYTHONIOENCODING`` asks for.

    Our own signs are replaced by look-alikes, other characters that the encoding lacks by their escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vlrank")


console = PlainConsole(stderr=True)
"""Progress and messages go to stderr, so that stdout stays fit for pipes: results and the jobs' JSON line."""


def announce(label: str, text: str, style: str) -> None:
    """A message with a coloured label before it, on stderr; as long as it is, so that it can be searched and copied."""
    console.print(Text.assemble((label, style), " ", text), soft_wrap=True)


_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
}
_CHATTY = ("torchao", "torch.utils._pytree", "ray._private.worker", "ray.llm", "vllm")


def quiet_libraries() -> None:
    """One progress display is enough: ours. ``VLRANK_VERBOSE=1`` leaves the libraries' own chatter on.

    Call it before they are imported; processes started later inherit it.
    """
    if os.environ.get("VLRANK_VERBOSE") == "1":
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a sweep says why a trial failed, without tracebacks
    llm = logging.getLogger("ray.llm")
    if not llm.handlers:  # each module of ray.llm logs at INFO unless the package has a handler
        llm.addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class Summary:
    """What a stage did; every stage returns one.

    Attributes:
        title: The stage and what it worked on, e.g. ``"prepare: Gift_Cards_5.json.gz"``.
        lines: Facts to show, in order: label -> value.
        output: The place of the result.
        counts: Machine-readable counts, e.g. ``{"items": 148, "quarantined": 2}``.
        failure: Why the result is not good enough to go on as if all were well; the command ends with exit code 2.
        next: A command that goes on from here, printed last and in one piece, to be copied.
    """

    title: str
    lines: Mapping[str, object] = field(default_factory=dict)
    output: Location | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    failure: str | None = None
    next: str | None = None

    def show(self) -> None:
        """Print to stderr for people."""
        grid = Table.grid(padding=(0, 2))
        for label, value in self.lines.items():
            grid.add_row(Text(label, "dim"), _format(value))
        if self.output is not None:
            grid.add_row(Text("output", "dim"), Text(str(self.output), "bold"))
        console.print(Panel(grid, title=Text(self.title), title_align="left", expand=False, border_style="green"))
        if self.next is not None:
            console.print(self.next, soft_wrap=True)


def _format(value: object) -> str | Text:
    if isinstance(value, Text):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def duration(seconds: float) -> str:
    """``8.5 s``, ``3 min 07 s`` or ``2 h 05 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


class ProgressBar:
    """A running progress bar; see `progress`."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self._bar = bar
        self._task = task

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """``n`` more are done; ``note`` replaces the text behind the bar (rates, metrics)."""
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self._bar.update(self._task, advance=n, **fields)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[ProgressBar]:
    """A progress bar with counts, elapsed and remaining time; in a log file it prints a line at the end only."""
    line = Column(no_wrap=True)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=line),
        BarColumn(),
        MofNCompleteColumn(table_column=line),
        TimeElapsedColumn(table_column=line),
        TimeRemainingColumn(table_column=line),
        TextColumn("{task.fields[note]}", markup=False, table_column=line),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        yield ProgressBar(bar, bar.add_task(description, total=total, note=""))

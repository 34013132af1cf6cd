"""What is printed is what there is: a path with ``[v2]``, a name with ``[/b]``, a title with ``:key:``."""

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.table import Table

from vlrank.console import PlainConsole, Summary, announce, console, progress
from vlrank.errors import UserError
from vlrank.storage import location

HOSTILE = "runs/[v2]/[/b] :key: [red]"


def test_values_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 200)
    Summary(HOSTILE, {HOSTILE: HOSTILE}, location(HOSTILE)).show()
    announce("Note:", HOSTILE, "yellow")
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE, table)
    console.rule(HOSTILE)
    with progress(HOSTILE, 2) as bar:
        bar.advance(1, note=HOSTILE)
    printed = capsys.readouterr().err
    places = {"summary": 4, "note": 1, "line": 1, "table": 3, "rule": 1, "progress": 2}
    assert printed.count(HOSTILE) == sum(places.values()), printed


def test_there_is_no_other_console() -> None:
    """Rich's own would take brackets for markup."""
    root = Path(__file__).resolve().parents[1] / "platform/vlrank"
    made = [
        str(path)
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Console", "TextColumn")
    ]
    assert [Path(name).name for name in made] == ["console.py"] * 2


def test_an_output_of_any_encoding_takes_every_text() -> None:
    """`evaluate` had done its work and ended in a UnicodeEncodeError for the sign between a mean and its interval."""
    code = "from vlrank.console import print_anything; print_anything(); print('0.5 ±0.1 … é 茶 \\udcff')"
    for encoding, printed in {
        "ascii": rb"0.5 +-0.1 ... \xe9 \u8336 \udcff",
        "latin-1:strict": b"0.5 \xb10.1 ... \xe9 \\u8336 \\udcff",
        "utf-8": "0.5 ±0.1 … é 茶 \\udcff".encode(),
    }.items():
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        assert done.stdout.rstrip() == printed


def test_a_narrow_terminal_cuts_no_path(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 40)
    path = "/data/" + "/".join(f"folder-{n:02d}" for n in range(12))
    Summary("evaluate", {"report": f"{path}/report.html"}, location(path)).show()
    printed = capsys.readouterr().err
    assert "…" not in printed
    inside = [line.strip("│ ").split("  ")[-1].strip() for line in printed.splitlines()[1:-1]]
    assert "".join(inside).count(path) == 2


def test_a_closed_pipe_does_not_end_the_work() -> None:
    code = """
from vlrank.console import PlainConsole, progress
with progress("work", 2) as bar:
    bar.advance(2)
out = PlainConsole()
for _ in range(3):
    out.print("x" * 100_000)
open("done", "w").close()
"""
    with tempfile.TemporaryDirectory() as folder:
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, stdout=writer, stderr=writer, check=False)
        os.close(writer)
        assert (done.returncode, os.listdir(folder)) == (0, ["done"])


def test_a_full_disk_behind_stdout_is_one_message_and_behind_stderr_none() -> None:
    with open("/dev/full", "w", buffering=1) as full, pytest.raises(UserError, match="cannot write the output"):
        PlainConsole(file=full).print("result")
    with open("/dev/full", "w", buffering=1) as full:
        messages = PlainConsole(file=full, stderr=True)
        messages.print("message")
        messages.print("another")


def test_libraries_print_neither_bars_nor_notes_and_their_errors_still_show() -> None:
    code = """
import logging
from vlrank.console import quiet_libraries
quiet_libraries()
from tqdm.auto import tqdm
from ray.llm._internal.common.observability.logging import get_logger
list(tqdm(range(3), desc="Compressing model"))
get_logger("downloads").info("no mirror")
logging.getLogger("vllm.triton_utils").warning("no backend")  # before vLLM sets up its logging
get_logger("downloads").error("no network")
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("VLRANK_VERBOSE", "TQDM_DISABLE")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.strip().endswith("no network")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr

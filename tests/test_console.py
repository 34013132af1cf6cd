"""What is printed is what there is: a path with ``[v2]``, a name with ``[/b]``, a title with ``:key:``."""

import ast
from pathlib import Path

import pytest
from rich.table import Table

from vlrank.console import Summary, announce, console, progress
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

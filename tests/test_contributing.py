"""CONTRIBUTING.md sends newcomers to files: they exist, and hold what is looked for."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ANSWERS = re.findall(r"^\| Where .*\? \| `([\w/.]+)` \| `(\w+)` \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("file", "name"), ANSWERS)
def test_the_answer_to_where_is_true(file: str, name: str) -> None:
    assert re.search(rf"\b{name}\b", (ROOT / "platform" / "vlrank" / file).read_text(encoding="utf-8"))


def test_every_question_has_an_answer() -> None:
    assert len(ANSWERS) == len(re.findall(r"^\| Where ", TEXT, re.MULTILINE)) == 17


def test_every_room_is_in_the_list() -> None:
    packages = ROOT / "platform" / "vlrank"
    rooms = [path.name for path in packages.glob("*.py")] + [f"{path.parent.name}/" for path in packages.glob("*/*.py")]
    missing = {room for room in rooms if f"`{room}`" not in TEXT} - {"__init__.py", "__main__.py", "version.py"}
    assert not missing

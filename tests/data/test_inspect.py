"""`vlrank inspect` shows what a person asks for."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from vlrank.cli import cli
from vlrank.data.dataset import Dataset, write_dataset
from vlrank.data.inspect import inspect_dataset
from vlrank.data.schemas import PICTURES
from vlrank.data.tables import write_parquet_atomic
from vlrank.errors import UserError

from .test_dataset import make_items, make_sequences

HISTORIES = {1: ([1, 2, 3, 4], [86_400 * n for n in (1, 2, 3, 4)]), 2: ([4], [5])}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    made = write_dataset(
        tmp_path / "ds",
        items=make_items(4, brand="Alva", categories=["Home", "Mugs"], image_url="http://e.com/a.jpg"),
        sequences=make_sequences(HISTORIES),
        options={},
        quarantine={"reviews": [{"key": "r.json:3", "error_type": "BadInteraction", "message": "no user id"}]},
    )
    made.add_generated(
        "caption", [{"item_id": 2, "text": "A red mug.", "model": "m", "prompt_id": "p", "input_hash": "h"}]
    )
    failed = {"error_type": "HttpStatus", "message": "HTTP 404"}
    rows = [{"item_id": 1, "source": "http://e.com/a.jpg", "image_path": None, **failed}]
    write_parquet_atomic(rows, made.path / "pictures.parquet", PICTURES)
    return made


def shown(dataset: Dataset, **options: int | str) -> str:
    out = io.StringIO()
    inspect_dataset(dataset.path, **options, out=Console(file=out, width=140))  # type: ignore[arg-type]
    return out.getvalue()


def test_the_dataset_in_numbers(dataset: Dataset) -> None:
    text = shown(dataset)
    for part in ("5 interactions, 2 users, 4 items", "sparsity", "median", "1 BadInteraction", "captions", "1 (25.0%)"):
        assert part in text


def test_a_user_with_what_each_interaction_is_used_for(dataset: Dataset) -> None:
    lines = shown(dataset, user=1).splitlines()
    assert "user 1 (u1): 4 interactions" in lines[0]
    rows = [line for line in lines if "1970-" in line]
    assert [next(use for use in ("train", "validation", "test") if use in row) for row in rows] == [
        "train", "train", "validation", "test",
    ]  # fmt: skip
    assert "title 3" in rows[2]
    assert shown(dataset, user="u2").count("1970-") == 1


def test_an_item_with_its_texts_and_why_it_has_no_picture(dataset: Dataset) -> None:
    text = shown(dataset, item=2)
    for part in ("item 2 (i2)", "Alva", "Home > Mugs", "A red mug.", "text 2"):
        assert part in text
    assert "HttpStatus: HTTP 404" in shown(dataset, item="i1")


def test_unknown_users_and_items(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="there is no user 9"):
        shown(dataset, user=9)
    with pytest.raises(UserError, match="there is no item nope"):
        shown(dataset, item="nope")


def test_the_command_takes_the_names_of_the_source(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["inspect", str(dataset.path), "--user", "u2"], standalone_mode=False)
    assert "user 2 (u2)" in capsys.readouterr().out
    cli.main(["inspect", str(dataset.path), "--item", "3"], standalone_mode=False)
    assert "title 3" in capsys.readouterr().out

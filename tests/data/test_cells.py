"""Text of lists and dictionaries in flat tables is what it means, and other text with brackets stays text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_sources import read_items
from vlrank.data.cells import parse_cell
from vlrank.data.metadata import Item


@pytest.mark.parametrize(
    ("cell", "meaning"),
    [
        ("['A', \"it's\"]", ["A", "it's"]),
        ("['A' \"it's\"]", ["A", "it's"]),
        ("['A'\n 'B' ... 'Z']", ["A", "B", "Z"]),
        ('["A", null, "\\u00e9\\/"]', ["A", None, "é/"]),
        ("[['A' 'B']\n ['C' 'D']]", [["A", "B"], ["C", "D"]]),
        ("[list(['A', 'B']) list(['C'])]", [["A", "B"], ["C"]]),
        ("array(['A', None], dtype=object)", ["A", None]),
        ("array(['A', ..., 'B'], shape=(6000,), dtype='<U1')", ["A", "B"]),
        ("[np.str_('A'), np.float64(nan)]", ["A", None]),
        ("('A', 'B')", ["A", "B"]),
        ("{'A'}", ["A"]),
        ("{'hi_res': array(['h', None], dtype=object), 'n': 2}", {"hi_res": ["h", None], "n": 2}),
        ("[{'large': 'l', 'hi_res': None}\n {'large': \"m\"}]", [{"large": "l", "hi_res": None}, {"large": "m"}]),
        ("{'when': Timestamp('2020-01-01'), 'price': Decimal('9.99')}", {"when": "2020-01-01", "price": "9.99"}),
    ],
)
def test_a_cell_is_what_it_means(cell: str, meaning: Any) -> None:
    assert parse_cell(cell) == meaning


@pytest.mark.parametrize(
    "cell", ["[]", "{}", " nan", "None", "null", "<NA>", "NaT", "[nan]", "[None, '']", "array([])"]
)
def test_a_cell_without_a_value_is_missing(cell: str) -> None:
    assert parse_cell(cell) is None


@pytest.mark.parametrize(
    "cell",
    [
        "[NEW] Soap",
        "[2 Pack]",
        "[1984]",
        "(500)",
        "{brand}",
        "['open",
        "nan bread",
        "[A, B]",
        "'A'",
        "[f'A']",
        "[[" * 500,
    ],
)
def test_other_text_stays_as_it_is(cell: str) -> None:
    assert parse_cell(cell) == cell


texts = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda t: t.strip() and t.strip() not in ("nan", "None", "null")
)


@given(st.lists(texts, min_size=1, max_size=5))
def test_what_python_and_numpy_write_comes_back(values: list[str]) -> None:
    assert parse_cell(str(values)) == values
    assert parse_cell(str(np.array(values, object))) == values
    assert parse_cell(repr(np.array(values, object))) == values
    assert parse_cell(str({"k": values})) == {"k": values}


def test_metadata_exported_by_pandas_is_what_its_parquet_form_is(tmp_path: Path) -> None:
    pictures = {"hi_res": np.array(["http://e.com/h.jpg", None], object), "variant": np.array(["MAIN"], object)}
    table = pd.DataFrame(
        {
            "parent_asin": ["a", "b", "c"],
            "title": ["T", "[2 Pack] T", "[1984]"],
            "store": ["X", None, "nan"],
            "categories": [np.array(["Beauty & Care", "Hair"], object), np.array([], object), None],
            "description": [np.array(["Nice", "it's good"], object), np.array([], object), np.array(["x"], object)],
            "imageURLHighRes": [np.array([], object), None, np.array(["http://e.com/c.jpg"], object)],
            "images": [pictures, {"hi_res": np.array([], object)}, None],
        }
    )
    table.to_parquet(tmp_path / "m.parquet")
    table.to_csv(tmp_path / "m.csv", index=False)
    expected = [
        Item("a", "T", "X", ("Beauty & Care", "Hair"), "Nice it's good", "http://e.com/h.jpg"),
        Item("b", "[2 Pack] T", None, (), None, None),
        Item("c", "[1984]", None, (), "x", "http://e.com/c.jpg"),
    ]
    for name in ("m.parquet", "m.csv"):
        assert read_items(tmp_path / name, {"a", "b", "c"}) == (expected, [])


@pytest.mark.parametrize(
    ("cell", "image"),
    [
        ("[1].jpg", "{folder}/[1].jpg"),
        ("{'hi_res': array(['http://e.com/a.jpg', 'http://e.c", "http://e.com/a.jpg"),
        ("['pics/a.jpg' 'pics/b", None),
        ("nan", None),
        ("['pics/a [1].jpg']", "{folder}/pics/a [1].jpg"),
    ],
)
def test_a_list_is_never_the_path_of_a_picture(tmp_path: Path, cell: str, image: str | None) -> None:
    pd.DataFrame({"item": ["a"], "title": ["T"], "image": [cell]}).to_csv(tmp_path / "m.csv", index=False)
    found, _ = read_items(tmp_path / "m.csv", {"a"})
    assert found[0].image == (image and image.format(folder=tmp_path))

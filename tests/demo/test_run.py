"""The demo's summary is what a newcomer believes: it must count what is in the dataset."""

from pathlib import Path

import polars as pl
import pytest

from vlrank.config import DemoConfig
from vlrank.demo import run as demo
from vlrank.demo.shop import make_products, make_shop
from vlrank.recipes.recipe import name_of


def test_the_summary_says_how_many_captions_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "N_ITEMS", 4)
    dataset = make_shop(tmp_path / "shop", n_items=4, n_users=20, seed=7)
    config = DemoConfig(out=tmp_path, seed=7)
    assert demo._captions(config).endswith("all three 0.0% of 4 items")
    texts = [f"A {p.colour} {p.pattern} {p.kind.lower()}.".replace(" plain", "") for p in make_products(4, seed=7)]
    texts[0] = texts[0].replace("A ", "A pink or red or blue ")
    rows = [
        {"item_id": number, "text": text, "model": "m", "prompt_id": "caption/v1", "input_hash": ""}
        for number, text in enumerate(texts[:3], start=1)
    ]
    dataset.add_generated("caption", pl.DataFrame(rows, schema_overrides={"item_id": pl.Int32}))
    assert demo._captions(config) == "right kind 75.0%, colour 50.0%, pattern 75.0%, all three 50.0% of 4 items"


def test_modes_that_nobody_asked_for_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "N_ITEMS", 4)
    monkeypatch.setattr(demo, "N_USERS", 4)
    recipe = demo._recipe(DemoConfig(out=tmp_path, modes=("caption",), trials=0))
    names = ["shop", "captions", "summaries", "caption_model", "caption", "caption_zero_shot", "report"]
    assert [name_of(stage) for stage in recipe.stages] == names
    assert recipe.stages[-1]["rankings"] == ["caption", "caption_zero_shot"]
    assert recipe.stages[-1]["runs"] == ["caption_model"]

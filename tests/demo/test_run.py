"""The demo's summary is what a newcomer believes: it must count what is in the dataset."""

from pathlib import Path

import polars as pl
import pytest

from vlrank.config import DemoConfig
from vlrank.demo import run as demo
from vlrank.demo.shop import make_products, make_shop
from vlrank.recipes.recipe import name_of, steps_of


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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shop that is drawn at once."""
    monkeypatch.setattr(demo, "N_ITEMS", 4)
    monkeypatch.setattr(demo, "N_USERS", 4)


@pytest.mark.usefixtures("small")
def test_modes_that_nobody_asked_for_are_left_out(tmp_path: Path) -> None:
    recipe = demo._recipe(DemoConfig(out=tmp_path, modes=("caption",), trials=0))
    made = ["shop", "captions", "summaries", "knn", "caption_model"]
    ranked = ["caption", "caption_zero_shot", "reranked", "fused"]
    assert [name_of(stage) for stage in recipe.stages] == [*made, *ranked, "report"]
    assert recipe.stages[-1]["rankings"] == ranked
    assert recipe.stages[-1]["runs"] == ["caption_model"]


@pytest.mark.usefixtures("small")
def test_a_demo_without_captions_reranks_lists_with_the_first_mode_that_it_trains(tmp_path: Path) -> None:
    recipe = demo._recipe(DemoConfig(out=tmp_path, modes=("semantic_summary_small", "raw_image"), trials=0))
    models = {name_of(stage): stage["model"] for stage in recipe.stages if "rerank" in stage}
    assert models["reranked"] == models["fused"] == "semantic_summary_small_model"
    steps_of(recipe)  # raises where a name is missing


@pytest.mark.usefixtures("small")
def test_an_engine_that_is_asked_for_writes_captions_and_summaries(tmp_path: Path) -> None:
    for engine in ("vllm", "transformers"):
        steps = steps_of(demo._recipe(DemoConfig(out=tmp_path, engine=engine)))
        assert {step.config.engine.name for step in steps if step.stage == "generate"} == {engine}

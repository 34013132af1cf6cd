"""A base that lacks weights is refused: what transformers fills in at random would be trained and saved."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlrank.engines.models import open_model
from vlrank.engines.transformers_scorer import load_model
from vlrank.engines.weights import check_whole, load_whole
from vlrank.errors import UserError


def changed(folder: Path, place: Path, *, without: str = "", config: dict[str, object] | None = None) -> Path:
    shutil.copytree(folder, place)
    file = place / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items() if name != without}
    save_file(weights, file, metadata={"format": "pt"})
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(settings | (config or {})))
    return place


def test_a_vision_base_tied_in_its_text_config_alone_is_refused(tiny_vision_model: Path, tmp_path: Path) -> None:
    """Its output head would be drawn at random."""
    assert "lm_head.weight" not in load_file(tiny_vision_model / "model.safetensors")
    folder = changed(tiny_vision_model, tmp_path / "m", config={"tie_word_embeddings": False})
    for load in (lambda: load_whole(AutoModelForImageTextToText, str(folder)), lambda: load_model(open_model(folder))):
        with pytest.raises(UserError, match=r"lacks weights: lm_head\.weight") as caught:
            load()
        assert "tie_word_embeddings" in str(caught.value.remedy)


def test_a_lost_layer_is_refused_and_a_tied_head_is_whole(tiny_text_model: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = changed(tiny_text_model, tmp_path / "m", without=name)
    with pytest.raises(UserError, match=name):
        load_whole(AutoModelForCausalLM, str(folder))
    model = load_whole(AutoModelForCausalLM, str(tiny_text_model))
    check_whole(model, str(tiny_text_model))
    with pytest.raises(UserError, match=name):
        check_whole(model, str(folder))

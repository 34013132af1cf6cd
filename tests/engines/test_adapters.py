"""An adapter that loads in part, or not at all, lets the base model answer under the adapter's name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vlrank.config import EngineConfig
from vlrank.engines.adapters import check_adapter, lora_rank
from vlrank.engines.models import ModelFolder, open_model
from vlrank.engines.scoring import open_scorer
from vlrank.engines.transformers_scorer import load_model
from vlrank.errors import UserError

ENGINES = ("transformers", "vllm")


def make(base: Path, folder: Path, **changes: Any) -> ModelFolder:
    """An adapter on ``base``, saved as training saves it."""
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | changes
    get_peft_model(load_model(open_model(base)), LoraConfig(**options)).save_pretrained(folder)
    return open_model(folder)


def change_keys(folder: str, change: Any) -> None:
    file = Path(folder) / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def test_an_adapter_on_its_own_base_passes_in_every_engine(
    tiny_text_model: Path, tiny_vision_model: Path, tmp_path: Path
) -> None:
    for name, base in (("text", tiny_text_model), ("vision", tiny_vision_model)):
        for variant, options in {"plain": {}, "rs": {"use_rslora": True}}.items():
            model = make(base, tmp_path / f"{name}-{variant}", **options)
            for engine in ENGINES:
                check_adapter(model, engine)
            load_model(model)
    check_adapter(open_model(tiny_text_model), "vllm")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_of_the_text_model_on_the_vision_base_is_refused(
    tiny_text_model: Path, tiny_vision_model: Path, tmp_path: Path, engine: str
) -> None:
    """None of its matrices load; PEFT warns and vLLM says nothing."""
    model = replace(make(tiny_text_model, tmp_path / "a"), base=str(tiny_vision_model), family="vision")
    with pytest.raises(UserError, match=r"does not fit its base model .*missing keys.*unexpected keys") as caught:
        check_adapter(model, engine)
    assert "model.layers.0" in caught.value.problem
    for name in ("transformers", "packed"):
        with pytest.raises(UserError, match="does not fit"):
            open_scorer(model, EngineConfig(name=name))


@pytest.mark.parametrize("engine", ENGINES)
def test_missing_unexpected_and_misshapen_matrices_are_named(
    tiny_text_model: Path, tmp_path: Path, engine: str
) -> None:
    model = make(tiny_text_model, tmp_path / "a")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for change, message in (
        (lambda tensors: {k: v for k, v in tensors.items() if k != key}, f"1 missing keys ({key})"),
        (lambda tensors: tensors | {key.replace("q_proj", "x_proj"): tensors[key].clone()}, "1 unexpected keys"),
        (lambda tensors: tensors | {key: torch.cat([tensors[key]] * 2)}, f"{key} has shape"),
    ):
        shutil.copytree(model.path, tmp_path / "b", dirs_exist_ok=True)
        change_keys(str(tmp_path / "b"), change)
        with pytest.raises(UserError) as caught:
            check_adapter(replace(model, path=str(tmp_path / "b")), engine)
        assert message in caught.value.problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"r": 600}, "rank 600; vLLM serves adapters up to rank 512"),
        ({"rank_pattern": {"down_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"down_proj": 4}}, "alpha_pattern"),
        ({"bias": "lora_only", "lora_bias": True}, "bias"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_and_works_in_transformers(
    tiny_text_model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = make(tiny_text_model, tmp_path / "a", **options)
    load_model(model)
    with pytest.raises(UserError, match="vLLM") as caught:
        check_adapter(model, "vllm")
    assert message in caught.value.problem
    assert "engine.name=transformers" in str(caught.value.remedy)


def test_adapted_layers_of_the_vision_tower_are_not_ignored(tiny_vision_model: Path, tmp_path: Path) -> None:
    model = make(tiny_vision_model, tmp_path / "a", target_modules=["q_proj", "qkv"])
    load_model(model)
    with pytest.raises(UserError, match="vLLM would ignore"):
        check_adapter(model, "vllm")


def test_an_adapted_head_is_saved_whole_and_loads_again(tiny_text_model: Path, tmp_path: Path) -> None:
    model = make(tiny_text_model, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    load_model(model)
    with pytest.raises(UserError, match="vLLM would ignore"):
        check_adapter(model, "vllm")


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_before_the_prompt_are_refused(tiny_text_model: Path, tmp_path: Path, engine: str) -> None:
    options = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load_model(open_model(tiny_text_model)), options).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is of type PROMPT_TUNING"):
        check_adapter(open_model(tmp_path), engine)


def test_vllm_starts_with_the_smallest_rank_that_fits(tmp_path: Path) -> None:
    for rank, expected in ((1, 8), (12, 16), (512, 512)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
        assert lora_rank(tmp_path) == expected

"""One pass over the tree must say exactly what asking for every answer in full would say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlrank.config import EngineConfig
from vlrank.engines.models import open_model
from vlrank.engines.transformers_scorer import TransformersScorer, load_model, score_labels
from vlrank.errors import UserError
from vlrank.prompting.encoding import Encoded, Encoder
from vlrank.prompting.modes import mode_spec

from .brute_force import RANKING, brute_force, picture_items, text_items


@pytest.fixture(scope="module")
def text(tiny_text_model: Path) -> tuple[Any, Encoder]:
    encoder = Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), RANKING)
    return load_model(open_model(tiny_text_model)), encoder


@pytest.fixture(scope="module")
def vision(tiny_vision_model: Path) -> tuple[Any, Encoder]:
    return load_model(open_model(tiny_vision_model)), Encoder.load(tiny_vision_model, mode_spec("raw_image"), RANKING)


@pytest.mark.parametrize("n", [1, 5, 9, 10, 20, 99, 100])
def test_text_model_agrees_with_brute_force(
    text: tuple[Any, Encoder], judged: dict[int, tuple[Encoded, np.ndarray]], n: int
) -> None:
    model, encoder = text
    encoded, expected = judged[n]
    for tree in (True, False):
        [scores] = score_labels(model, encoder, [encoded], tree=tree)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize("n", [5, 9, 10, 20])
def test_pictures_agree_with_brute_force(vision: tuple[Any, Encoder], tmp_path: Path, n: int) -> None:
    model, encoder = vision
    encoded = encoder.encode(text_items(3, "old"), picture_items(n, tmp_path))
    [scores] = score_labels(model, encoder, [encoded])
    np.testing.assert_allclose(scores, brute_force(model, encoder, encoded), atol=1e-4)


def test_captions_on_a_vision_model_agree_with_brute_force(
    vision: tuple[Any, Encoder], tiny_vision_model: Path
) -> None:
    model, _ = vision
    encoder = Encoder.load(tiny_vision_model, mode_spec("caption"), RANKING)
    batch = [encoder.encode(text_items(k, "old"), text_items(n)) for k, n in [(0, 12), (6, 25)]]
    for encoded, scores in zip(batch, score_labels(model, encoder, batch), strict=True):
        np.testing.assert_allclose(scores, brute_force(model, encoder, encoded), atol=1e-4)


@pytest.mark.parametrize("tree", [True, False])
def test_a_batch_of_different_lengths_equals_each_prompt_alone(
    vision: tuple[Any, Encoder], tmp_path: Path, tree: bool
) -> None:
    model, encoder = vision
    pictures = picture_items(25, tmp_path)
    batch = [encoder.encode(text_items(k, "old"), pictures[:n]) for k, n in [(0, 3), (7, 25), (2, 11), (1, 1)]]
    together = score_labels(model, encoder, batch, tree=tree)
    for encoded, scores in zip(batch, together, strict=True):
        [alone] = score_labels(model, encoder, [encoded], tree=tree)
        np.testing.assert_allclose(scores, alone, atol=1e-4)


def test_pixels_matter(vision: tuple[Any, Encoder], tmp_path: Path) -> None:
    model, encoder = vision
    items = picture_items(4, tmp_path)
    swapped = [{**items[0], "image_path": items[1]["image_path"]}, *items[1:]]
    [first], [second] = (score_labels(model, encoder, [encoder.encode([], shown)]) for shown in (items, swapped))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_training_model_is_left_as_it_was(text: tuple[Any, Encoder], attention: str) -> None:
    model, encoder = text
    encoded = encoder.encode([], text_items(12))
    [expected] = score_labels(model, encoder, [encoded])
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = attention
    model.train()
    try:
        [scores] = score_labels(model, encoder, [encoded])
        assert model.training
        assert config._attn_implementation == attention
    finally:
        config._attn_implementation = before
        model.eval()
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_bfloat16_models_are_read_in_float32(text: tuple[Any, Encoder], tiny_text_model: Path) -> None:
    """bfloat16 logits would come in steps of 1/32 and make ties out of differences."""
    _, encoder = text
    model = load_model(open_model(tiny_text_model), dtype="bfloat16")
    encoded = encoder.encode([], text_items(9))
    [scores] = score_labels(model, encoder, [encoded])
    with torch.no_grad():
        hidden = model.model(torch.tensor([encoded.ids])).last_hidden_state[0, -1].float()
    first = [label[0] for label in encoded.trie.labels]
    expected = torch.log_softmax(model.lm_head.weight[first].float() @ hidden, 0)
    np.testing.assert_allclose(
        scores, expected.detach().numpy(), atol=0.15
    )  # bfloat16 attention: the tree's own rounding
    assert len(set(scores.tolist())) == 9
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [within] = score_labels(model, encoder, [encoded])
    np.testing.assert_allclose(within, scores, atol=0.05)
    assert len(set(within.tolist())) == 9


def test_an_adapter_folder_is_served_on_its_base(
    text: tuple[Any, Encoder], tiny_text_model: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model, encoder = text
    encoded = encoder.encode([], text_items(12))
    [plain] = score_labels(model, encoder, [encoded])
    base = load_model(open_model(tiny_text_model))
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )
    [expected] = score_labels(adapted, encoder, [encoded])
    adapted.save_pretrained(tmp_path)
    folder = open_model(tmp_path)
    assert folder.is_adapter
    [served] = score_labels(load_model(folder), encoder, [encoded])
    np.testing.assert_allclose(served, expected, atol=1e-5)
    assert np.abs(served - plain).max() > 1e-3


def test_an_unreadable_picture_costs_its_own_prompt(tiny_vision_model: Path, tmp_path: Path) -> None:
    engine = TransformersScorer(open_model(tiny_vision_model), EngineConfig(name="transformers"))
    encoder = Encoder.load(tiny_vision_model, mode_spec("raw_image"), RANKING)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    good = encoder.encode([], picture_items(3, tmp_path / "a"))
    bad = encoder.encode([], picture_items(3, tmp_path / "b"))
    (tmp_path / "b" / "1.png").unlink()
    scored = engine.score_labels(encoder, [bad, good])
    assert isinstance(scored[0], OSError)
    np.testing.assert_allclose(scored[1], brute_force(engine.model, encoder, good), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
        ("gpt_oss", {"sliding_window": 4096, "num_local_experts": 2, "num_experts_per_tok": 1}),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    ],
)
def test_windows_soft_caps_sinks_and_states_are_scored_as_a_plain_pass_scores_them(
    tiny_text_model: Path, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    encoder = Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), RANKING)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(encoder.tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 24, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **heads, **changes)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # sdpa leaves the soft cap out
    for name, weight in made.named_parameters():
        if weight.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(weight, std=0.3)
    made.save_pretrained(tmp_path)
    model = load_model(open_model(tmp_path, "semantic_summary_small"))
    batch = [encoder.encode(text_items(k, "old"), text_items(n)) for k, n in [(0, 3), (4, 12)]]
    for encoded, scores in zip(batch, score_labels(model, encoder, batch), strict=True):
        np.testing.assert_allclose(scores, brute_force(made.eval(), encoder, encoded), atol=1e-4)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither config\.json nor adapter_config\.json"):
        open_model(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        open_model(tmp_path / "absent")
    for name in ("nowhere", "runs/capton", "./caption", "~/runs/caption", "work/runs/caption", "runs/caption/"):
        with pytest.raises(UserError, match=f"model folder {name} does not exist"):  # not "no such name on the hub"
            open_model(name)
    assert open_model("Qwen/Qwen3-VL-2B-Instruct").base == "Qwen/Qwen3-VL-2B-Instruct"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file, not a folder"):
        open_model(tmp_path / "file")
    (tmp_path / "best.json").write_text('{"checkpoint": "qwen3vl_rerank/checkpoint-7"}')
    with pytest.raises(UserError, match="checkpoint-7, which does not exist"):
        open_model(tmp_path)

"""Packed rows are exact or not used: for every family whose layers transformers ships.

What a user would lose: packing is the default on GPUs, and a model whose window, soft cap, sinks or recurrent state is
dropped or carried into the next prompt trains without a word on something else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.training.test_memory import trainer_of
from vlrank.config import TrainConfig
from vlrank.data.dataset import Dataset
from vlrank.demo.base_models import save_model
from vlrank.engines import packable
from vlrank.errors import UserError
from vlrank.training.answers import AnswerHead, token_losses
from vlrank.training.attention import NotPackable, use_packed_attention
from vlrank.training.collate import Row, end_to_end, side_by_side

VOCABULARY, LONGEST = 200, 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
WINDOW = {"sliding_window": 32}
SOME = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}
PLAIN: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "smollm3": {},
    "gpt_neox": {},
    "olmo2": {},
    "granite": {},
    "phi3": {"sliding_window": 4096},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": {"sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}
OTHER: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2 with windows": ("qwen2", SOME, "sliding window of 32 tokens"),
    "qwen3 with windows": ("qwen3", SOME, "sliding window of 32 tokens"),
    "mistral with a window": ("mistral", WINDOW, "sliding window of 32 tokens"),
    "phi3 with a window": ("phi3", WINDOW, "sliding window of 32 tokens"),
    "starcoder2 with a window": ("starcoder2", WINDOW, "sliding window of 32 tokens"),
    "gemma2": ("gemma2", {**WINDOW, "query_pre_attn_scalar": 12}, "sliding window of 32 tokens"),
    "gemma2, long window": ("gemma2", {"query_pre_attn_scalar": 12}, "soft-capped scores"),
    "gemma3": ("gemma3_text", {**WINDOW, "query_pre_attn_scalar": 12}, "sliding window of 32 tokens"),
    "gpt-oss": ("gpt_oss", {**WINDOW, **EXPERTS}, "sliding window of 32 tokens"),
    "gpt-oss, long window": ("gpt_oss", {"sliding_window": 4096, **EXPERTS}, "sinks"),
    "cohere2": ("cohere2", WINDOW, "sliding window of 32 tokens"),
    "olmo3": ("olmo3", WINDOW, "sliding window of 32 tokens"),
    "llama4": ("llama4_text", {"attention_chunk_size": 32, **EXPERTS, "intermediate_size_mlp": 48}, "chunks of 32"),
    "qwen3.5": ("qwen3_5_text", DELTA, "linear attention"),
    "qwen3-next": (
        "qwen3_next",
        {
            **DELTA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        "linear attention",
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}, "conv"),
    "granite hybrid": (
        "granitemoehybrid",
        {**MAMBA, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 64, "num_local_experts": 0},
        "linear attention",
    ),
    "falcon-h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 96}, "hybrid"),
    "mamba2": ("mamba2", {"num_heads": 6, "head_dim": 16, "state_size": 16, "n_groups": 1}, "linear attention"),
    "gpt2 with dropout": ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 4}, "dropout"),
}


def make(kind: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes}))
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
        elif "sinks" in name:
            torch.nn.init.normal_(weight)
    return model.eval()


def rows() -> list[Row]:
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(5, VOCABULARY, size=n)  # noqa: E731
    return [Row(draw(n), np.tile(np.arange(n), (3, 1)), np.array([n - 1]), draw(1)) for n in (90, 61, 77)]


def plain_losses(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = [model(input_ids=torch.from_numpy(row.ids)[None], use_cache=False).logits[0, -1] for row in rows()]
    targets = torch.cat([torch.from_numpy(row.targets) for row in rows()])
    return torch.nn.functional.cross_entropy(torch.stack(logits).float(), targets, reduction="none")


def losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return token_losses(model, AnswerHead(model), batch)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_causal_attention_is_packed_and_learns_the_same(kind: str) -> None:
    model = make(kind, PLAIN[kind])
    expected = plain_losses(model)
    torch.testing.assert_close(
        losses(model, side_by_side(rows(), vision=False, pad_id=0)), expected, rtol=1e-5, atol=1e-5
    )
    use_packed_attention(model, LONGEST)
    batch = end_to_end(rows(), vision=False, pad_id=0, length=256, documents=8, longest=LONGEST)
    torch.testing.assert_close(losses(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OTHER)
def test_other_layers_are_named_and_trained_unpacked(name: str) -> None:
    kind, changes, said = OTHER[name]
    model = make(kind, changes)
    attention = model.config.get_text_config()._attn_implementation
    with pytest.raises(NotPackable, match=f"{kind} has .*{said}"):
        use_packed_attention(model, LONGEST)
    assert model.config.get_text_config()._attn_implementation == attention
    padded = losses(model, side_by_side(rows(), vision=False, pad_id=0))
    torch.testing.assert_close(padded, plain_losses(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OTHER if name != "gpt2 with dropout"])
def test_layers_that_no_configuration_names_are_found_by_their_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that comes later may keep its windows and states under other names."""
    monkeypatch.setattr(packable, "other_layers", lambda *_: None)
    monkeypatch.setattr(packable, "_altered_scores", lambda *_: None)
    kind, changes, _ = OTHER[name]
    with pytest.raises(NotPackable, match=rf"{kind} has \w+ layers"):
        use_packed_attention(make(kind, changes), LONGEST)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("gpt_neox", {}), ("granite", {"attention_multiplier": 0.2, "logits_scaling": 4.0, "embedding_multiplier": 2.0})],
)
def test_validation_of_packed_training_scores_as_the_model_does(
    kind: str,
    changes: dict[str, Any],
    settings: Callable[..., TrainConfig],
    told_shop: Dataset,
    tiny_text_model: Path,
    tmp_path: Path,
) -> None:
    """Some families scale attention or logits in their own way, which our own packed scorer does not know."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_text_model)
    tokens = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "pad_token_id": tokenizer.pad_token_id}
    folder = save_model(tmp_path / kind, make(kind, {**changes, **tokens}), tokenizer)
    metrics = []
    for packing in (True, False):
        config = settings("semantic_summary_small", method="full", model=str(folder), packing=packing)
        metrics.append(trainer_of(config, told_shop, []).evaluate())
    assert {**metrics[0], "eval_seconds": 0} == {**metrics[1], "eval_seconds": 0}


def test_layers_for_adapters_that_a_model_does_not_have_are_named(
    settings: Callable[..., TrainConfig], tiny_text_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_text_model)
    folder = save_model(tmp_path / "gpt2", make("gpt2", {**PLAIN["gpt2"], "vocab_size": len(tokenizer)}), tokenizer)
    changes = {"backend": "transformers", "load_in_4bit": False, "method": "lora"}
    config = settings("semantic_summary_small", model=str(folder), **changes)
    with pytest.raises(UserError, match=r"no layer of .*gpt2 is named q_proj"):
        trainer_of(config, Dataset.open(config.dataset), [])


def test_a_model_with_windows_is_trained_unpacked_and_says_so(
    settings: Callable[..., TrainConfig], tiny_text_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_text_model)
    model = make("mistral", {"sliding_window": 64, "vocab_size": len(tokenizer)})
    folder = save_model(tmp_path / "mistral", model, tokenizer)
    changes: dict[str, Any] = {"backend": "transformers", "load_in_4bit": False, "method": "full", "packing": True}
    changes |= {"epochs": 1, "negatives": 3, "val_users": 4, "ranking": {"max_history": 1, "max_item_chars": 20}}
    config = settings("semantic_summary_small", model=str(folder), **changes)
    said: list[str] = []
    trainer_of(config, Dataset.open(config.dataset), said).train()
    unpacked = "prompts are not packed: mistral has attention within a sliding window of 64 tokens"
    assert sum(unpacked in line for line in said) == 1


def test_a_window_longer_than_every_prompt_limits_nothing() -> None:
    use_packed_attention(make("mistral", {"sliding_window": 96}), LONGEST)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_depend_on_the_longest_prompt_are_not_packed(kind: str) -> None:
    """A prompt would be learned at other positions than those at which it is read alone."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "original_max_position_embeddings": 128}
    changes = {"rope_parameters": rope, "max_position_embeddings": 128}
    with pytest.raises(NotPackable, match=f"{kind} rotary positions"):
        use_packed_attention(make("llama", changes), 129)
    use_packed_attention(make("llama", changes), 128)


def test_an_architecture_that_takes_no_packed_rows_is_named() -> None:
    model = make("mpt", {"d_model": 48, "n_heads": 4, "n_layers": 2})
    with pytest.raises(NotPackable, match="MptBlock"):
        use_packed_attention(model, LONGEST)


def test_an_architecture_of_which_no_copy_can_be_made_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packable, "small_copy", lambda _: None)
    with pytest.raises(NotPackable, match="no small copy"):
        use_packed_attention(make("qwen3", {}), LONGEST)


def test_the_check_leaves_seeds_and_mode_alone() -> None:
    model = make("qwen3", {}).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    use_packed_attention(model, LONGEST)
    torch.testing.assert_close(torch.rand(3), expected)
    assert model.training

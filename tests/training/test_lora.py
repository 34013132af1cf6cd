"""LoRA layers that compute together: what PEFT computes, in less memory traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3VLForConditionalGeneration

from vlrank.training.attention import compile_layers
from vlrank.training.lora import fuse_lora

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(folder: Path, targets: tuple[str, ...] = LINEAR, dropout: float = 0.0) -> Any:
    vision = "vl" in (folder / "config.json").read_text(encoding="utf-8")
    kind = Qwen3VLForConditionalGeneration if vision else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=list(targets))
    peft = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:  # zero at first, and would hide A
            torch.nn.init.normal_(parameter, std=0.1)
    return peft


def learn(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and gradients by name."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().logsumexp(-1).mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("targets", [LINEAR, ("q_proj", "v_proj", "up_proj")])
@pytest.mark.parametrize("family", ["text", "vision"])
def test_fused_layers_compute_what_pefts_do(
    family: str, targets: tuple[str, ...], ids: torch.Tensor, tiny_text_model: Path, tiny_vision_model: Path
) -> None:
    model = adapted(tiny_text_model if family == "text" else tiny_vision_model, targets)
    logits, gradients = learn(model, ids)
    layers = model.config.get_text_config().num_hidden_layers
    assert fuse_lora(model) == layers * len(targets)
    assert fuse_lora(model) == 0
    fused_logits, fused_gradients = learn(model, ids)
    torch.testing.assert_close(fused_logits, logits, rtol=1e-5, atol=1e-5)
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_one_graph_serves_all_fused_layers(ids: torch.Tensor, tiny_text_model: Path) -> None:
    model = adapted(tiny_text_model)
    model.enable_input_require_grads()  # or the first layer, whose input needs no gradient, gets a graph of its own
    logits, gradients = learn(model, ids)
    fuse_lora(model)
    torch._dynamo.reset()
    compile_layers(model.get_base_model(), backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        fused_logits, fused_gradients = learn(model, ids)
    torch.testing.assert_close(fused_logits, logits, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_a_compiled_pass_keeps_no_copy_of_the_frozen_weights() -> None:
    """For a 2B model it took 2.7 GiB of a GPU, which no plan foresaw."""
    from vlrank.training.lora import _Projections

    tokens, wide, out, rank = 24, 32, 48, 4
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b = (
        torch.randn(shape, generator=generator) for shape in ((tokens, wide), (out, wide), (rank, wide), (out, rank))
    )
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]

    def layer(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(_Projections.apply(x, weight, a, b))

    kept: list[tuple[int, ...]] = []
    torch._dynamo.reset()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        y = torch.compile(layer, backend="aot_eager_decomp_partition")(x, a, b)
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    assert (out, rank) in kept
    assert (out, wide + rank) not in kept
    expected = torch.autograd.grad(torch.nn.functional.silu(x @ weight.T + (x @ a.T) @ b.T).square().sum(), leaves)
    for given, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(given, right, rtol=1e-4, atol=1e-4)


def test_checkpoints_are_pefts(ids: torch.Tensor, tiny_text_model: Path, tmp_path: Path) -> None:
    model = adapted(tiny_text_model)
    fuse_lora(model)
    logits, _ = learn(model, ids)
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_text_model, dtype=torch.float32, attn_implementation="sdpa")
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_without_its_adapter_the_model_is_the_base(ids: torch.Tensor, tiny_text_model: Path) -> None:
    model = adapted(tiny_text_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_text_model, dtype=torch.float32, attn_implementation="sdpa")
    fuse_lora(model)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_a_pass_that_broke_off_leaves_nothing_for_the_next(ids: torch.Tensor, tiny_text_model: Path) -> None:
    model = adapted(tiny_text_model)
    other = torch.flip(ids, dims=(1,))
    right, _ = learn(model, other)
    fuse_lora(model)
    attention = model.get_base_model().model.layers[0].self_attn
    hidden = torch.randn(1, 24, attention.q_proj.in_features)
    attention.q_proj(hidden)  # as when memory runs out behind it
    wrong = attention.k_proj(torch.zeros_like(hidden))
    assert not wrong.any()
    torch.testing.assert_close(learn(model, other)[0], right, rtol=1e-5, atol=1e-5)


def test_layers_that_are_not_plain_stay_as_they_are(tiny_text_model: Path) -> None:
    assert fuse_lora(adapted(tiny_text_model, dropout=0.1)) == 0

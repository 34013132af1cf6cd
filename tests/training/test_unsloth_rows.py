"""Packed rows through Unsloth: the losses of padded ones, and its attention only where ours computes the same."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vlrank.engines.packable import why_not_packed_by_unsloth
from vlrank.training.answers import AnswerHead, token_losses
from vlrank.training.collate import Row, end_to_end
from vlrank.training.unsloth_rows import computed_by_unsloth, rerouted


@dataclass(frozen=True)
class Context:
    """What `rerouted` reads of Unsloth's ``AttentionContext``."""

    seq_info: Any = None
    attention_mask: Any = None
    is_causal: bool = True
    sliding_window: int | None = None
    prefix_seg_info: Any = None
    q_len: int = 9
    kv_seq_len: int = 9


@dataclass(frozen=True)
class Config:
    """What `rerouted` reads of Unsloth's ``AttentionConfig``."""

    flash_varlen_kwargs: dict[str, Any] | None = None


def documents_apart(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    """The kernel's contract in plain operations: [T, heads, head dim]."""
    parts = []
    for start, end in pairwise(bounds.tolist()):
        q, k, v = (states[start:end].transpose(0, 1).unsqueeze(0) for states in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_packed_row_of_unsloth_goes_through_our_kernel(scale: float | None) -> None:
    torch.manual_seed(0)
    Q, K, V = (torch.randn(1, heads, 9, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    lengths = torch.tensor([4, 5])
    context = Context((lengths, torch.tensor([0, 4, 9]), 5))
    config = Config({"causal": True, "dropout_p": 0.0, "softmax_scale": scale})
    out = rerouted(lambda **_: pytest.fail("not rerouted"), documents_apart)(
        config=config, context=context, Q=Q, K=K, V=V
    )
    assert out.shape == (1, 9, 4, 8)
    alone = scaled_dot_product_attention(
        *(s[:, :, 4:] for s in (Q, K, V)), is_causal=True, scale=scale, enable_gqa=True
    )
    torch.testing.assert_close(out[:, 4:], alone.transpose(1, 2))


def test_whatever_is_not_plain_causal_attention_stays_with_unsloth() -> None:
    Q, K, V = (torch.randn(1, heads, 9, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    packed = Context((torch.tensor([9]), torch.tensor([0, 9]), 9))
    its_own = torch.zeros(1)
    run_attention = rerouted(lambda **_: its_own, lambda *_: pytest.fail("rerouted"))
    others: Sequence[tuple[Context, Config]] = [
        (Context(), Config()),
        (replace(packed, attention_mask=torch.ones(1)), Config()),
        (replace(packed, is_causal=False), Config()),
        (replace(packed, sliding_window=4), Config()),
        (replace(packed, prefix_seg_info=object()), Config()),
        (replace(packed, kv_seq_len=12), Config()),
        (packed, Config({"causal": True, "softcap": 50.0})),
        (packed, Config({"causal": True, "dropout_p": 0.1})),
    ]
    for context, config in others:
        assert run_attention(config=config, context=context, Q=Q, K=K, V=V) is its_own
    assert run_attention(config=Config(), context=packed, Q=Q.float(), K=K, V=V) is its_own


def test_unsloth_calls_attention_as_we_expect() -> None:
    """Read in its source: it can be imported with its GPU code on a GPU alone."""
    spec = find_spec("unsloth")
    if spec is None or spec.origin is None:
        pytest.skip("Unsloth is not installed")
    folder = Path(spec.origin).parent
    for name in ("llama", "qwen3", "mistral"):
        tree = ast.parse((folder / "models" / f"{name}.py").read_text(encoding="utf-8"))
        calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call)]
        found = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "run_attention"]
        assert found, name
        for call in found:
            assert [keyword.arg for keyword in call.keywords] == ["config", "context", "Q", "K", "V"]
    tree = ast.parse((folder / "utils" / "attention_dispatch.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for name, ours in (("AttentionContext", Context), ("AttentionConfig", Config)):
        fields = {line.target.id for line in classes[name].body if isinstance(line, ast.AnnAssign)}  # type: ignore[attr-defined]
        assert set(ours.__dataclass_fields__) <= fields


def test_lengths_reach_the_model_on_the_host_and_rows_end_with_their_last_prompt(tiny_text_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_text_model)
    assert not computed_by_unsloth(model)
    seen: list[Any] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        seen.append(kwargs.pop("packed_seq_lengths"))
        return args, kwargs

    model.register_forward_pre_hook(keep, with_kwargs=True)
    rows = [Row(np.arange(5, 5 + n), np.tile(np.arange(n), (3, 1)), np.array([n - 1]), np.array([7])) for n in (4, 6)]
    batch = end_to_end(rows, vision=False, pad_id=0, lengths=True)
    assert batch["input_ids"].shape == (1, 10)
    token_losses(model, AnswerHead(model, last_layer=False), batch)
    assert seen[0].tolist() == [4, 6]
    assert seen[0].dtype == torch.int32


def test_a_model_that_takes_lengths_for_nothing_is_not_packed(tiny_text_model: Path) -> None:
    """As if a release of Unsloth ignored them: prompts would read each other without a word."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_text_model)
    # transformers' own attention takes borders from the positions, so that this model packs well ...
    assert why_not_packed_by_unsloth(model, 96) is None

    def forget(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        places = torch.arange(kwargs["input_ids"].shape[1])[None]
        return args, {**kwargs, "position_ids": places}

    # ... until positions run through.
    model.model.register_forward_pre_hook(forget, with_kwargs=True)
    assert why_not_packed_by_unsloth(model, 96) == "Qwen3DecoderLayer layers"

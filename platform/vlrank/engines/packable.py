"""Whether prompts may share a packed row: only with layers that are known to be plain causal attention.

Packed attention gets documents and causality right and nothing else: a window, a soft cap, sinks or a recurrent state
would be dropped or carried from one document into the next, and the model would learn something else without a word.
Three questions, from the cheapest on: does the configuration name such a layer; does a small float32 copy of the
architecture give the same hidden states for prompts in one row and for each alone; does the real model, on its device?
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import accumulate
from typing import Any

import torch

from vlrank.engines.structure import core, decoder_layers, language_model

_PLAIN_KINDS = frozenset({"full_attention", "attention", "moe", "dense", "sparse"})
_LIMITED = {
    "sliding_attention": ("sliding_window", "attention within a sliding window"),
    "chunked_attention": ("attention_chunk_size", "attention within chunks"),
}
_LENGTHS = (61, 90)
"""Of the prompts that are compared: the second shows what leaks into it, both what is dropped."""


def why_not_packed(model: Any, attention: str, longest: float) -> str | None:
    """The layers for which prompts of this model must not share a row; None where packing is exact.

    Args:
        model: A causal language model or a vision model, plain or PEFT, where it will run.
        attention: Name of a packed attention function, registered with transformers.
        longest: Tokens of the longest prompt: a longer window limits nothing.
    """
    config = core(model).config.get_text_config()
    if kind := other_layers(config, longest) or _altered_scores(config):
        return kind
    small = small_copy(model)
    if small is None:
        return f"{config.model_type} layers of which no small copy can be made to compare"
    return _difference(small, attention, _bounds(small)) or _difference(model, attention, _bounds(model))


def why_not_packed_by_unsloth(model: Any, longest: float) -> str | None:
    """`why_not_packed` for a model whose layers Unsloth computes: on its device alone, where Unsloth's kernels run.

    Positions must be rotated the same in a row of any length: Unsloth chooses the rotation by the length of the row.
    """
    config = core(model).config.get_text_config()
    if kind := other_layers(config, longest) or varying_rotation(config) or _altered_scores(config):
        return kind
    return _difference(model, None, {"packed_seq_lengths": torch.tensor(_LENGTHS, dtype=torch.int32)})


def other_layers(config: Any, longest: float) -> str | None:
    """What a text configuration names that is not causal attention over ``longest`` tokens, wherever they lie."""
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or _kinds_without_types(config)))
    for kind in kinds:
        key, name = _LIMITED.get(kind, ("", ""))
        limit = getattr(config, key, None) if key else None
        if limit is not None and limit < longest:
            return f"{name} of {limit:,} tokens"
        if not key and kind not in _PLAIN_KINDS:
            return f"{kind.replace('_', ' ')} layers"
    return varying_rotation(config, longest)


def varying_rotation(config: Any, longest: float = math.inf) -> str | None:
    """Rotary frequencies that depend on the longest prompt of a batch or row, where that reaches ``longest`` tokens."""
    whole = getattr(config, "rope_parameters", None) or {}
    for rope in (whole, *whole.values()):  # some models have parameters per kind of layer
        if isinstance(rope, dict) and (kind := rope.get("rope_type")) in ("dynamic", "longrope"):
            limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            if longest > limit:
                return f"{kind} rotary positions, which change with prompts of more than {limit:,} tokens"
    return None


def _altered_scores(config: Any) -> str | None:
    if getattr(config, "attn_logit_softcapping", None):
        return "attention with soft-capped scores"
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and key.startswith(("attention", "attn")) and value:
            return f"attention with dropout ({key} {value})"
    return None


def _kinds_without_types(config: Any) -> list[str]:
    """Layer kinds of configurations that list none."""
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ["sliding_attention"] if windowed else []


def small_copy(model: Any) -> Any:
    """The language model with two layers of each kind and random float32 weights, on the CPU; None if that fails.

    Widths of attention stay as they are, so that every architecture can be built; MLPs and vocabulary shrink.
    """
    original = language_model(model)
    config = deepcopy(core(model).config.get_text_config())
    count = config.num_hidden_layers
    lists = {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == count}
    kept: list[int] = []
    seen: list[tuple[Any, ...]] = []
    for i, kind in enumerate(zip(*lists.values(), strict=True) if lists else [()] * count):
        if seen.count(kind) < 2:
            kept.append(i)
            seen.append(kind)
    try:
        # Lists first: some configurations check that they are as long as the model is deep.
        for key, value in lists.items():
            setattr(config, key, [value[i] for i in kept])
        config.num_hidden_layers = len(kept)
        for key, value in list(vars(config).items()):
            if "intermediate_size" in key and isinstance(value, int):
                setattr(config, key, min(value, 64))
        config.vocab_size = 64
        config.pad_token_id = None
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            copy = type(original)(config).float().eval()
            for name, weight in copy.named_parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=1.5 * weight[0].numel() ** -0.5)
                elif "sink" in name:
                    torch.nn.init.normal_(weight)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
    return copy


def _bounds(model: Any) -> dict[str, Any]:
    """What packed attention functions take, for a row of `_LENGTHS`."""
    device = next(language_model(model).parameters()).device
    bounds = torch.tensor([0, *accumulate(_LENGTHS)], dtype=torch.int32, device=device)
    return {"packed_cu_seqlens": bounds, "packed_longest": max(_LENGTHS)}


def _difference(model: Any, attention: str | None, documents: dict[str, Any]) -> str | None:
    """The first layer whose hidden states differ between prompts in one row and each alone.

    By more than 1e-4 of their norm at any place in float32; by more than a tenth on average in a lower precision, where
    another order of the same arithmetic makes up to a few hundredths.

    Args:
        model: See `why_not_packed`.
        attention: Name of the attention function of the row; None for the model's own.
        documents: Arguments of the model that say where the prompts of the row are.
    """
    inner, config = language_model(model), core(model).config.get_text_config()
    device = next(inner.parameters()).device
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, config.vocab_size, (1, n), generator=generator).to(device) for n in _LENGTHS]
    rotary = 4 if "mrope_section" in (getattr(config, "rope_parameters", None) or {}) else 1

    def states(ids: torch.Tensor, places: torch.Tensor, **packed: Any) -> list[torch.Tensor]:
        # [4, 1, T] for vision models, [1, T] otherwise
        positions = places.expand(4, 1, -1) if rotary == 4 else places.unsqueeze(0)
        with _outputs_of_layers(model) as outputs:
            inner(input_ids=ids, position_ids=positions, use_cache=False, **packed)
        return outputs

    training = model.training
    model.eval()
    places = [torch.arange(n, device=device) for n in _LENGTHS]
    try:
        with torch.no_grad():
            alone = [states(ids, at) for ids, at in zip(prompts, places, strict=True)]
            with _attention(config, attention) if attention else nullcontext():
                row = states(torch.cat(prompts, dim=1), torch.cat(places), **documents)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model makes of arguments that it was not written for
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"{type(decoder_layers(model)[0]).__name__} layers ({reason})"
    finally:
        model.train(training)
    if len(row) != len(alone[0]):
        return f"{type(decoder_layers(model)[0]).__name__} layers, which take other paths packed"
    for layer, packed, *apart in zip(decoder_layers(model), row, *alone, strict=True):
        expected = torch.cat(apart, dim=1).float()
        distance = (packed.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        same = distance.max() < 1e-4 if packed.dtype == torch.float32 else distance.mean() < 0.1
        if not bool(same):
            return f"{type(layer).__name__} layers"
    return None


@contextmanager
def _outputs_of_layers(model: Any) -> Iterator[list[torch.Tensor]]:
    outputs: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _attention(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before

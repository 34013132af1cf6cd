"""Packed rows through a model in the middle of its training.

Where `PackedModel` can compute with the model's own weights and the adapters beside them, it does: that is as fast as
ranking. Otherwise (sharded weights, adapted heads, a vision tower that learns, autocast over float32 weights) the
model's own forward pass runs, and only its attention is replaced for the time of the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlrank.engines.packed_attention import RowAttention, kernel_for
from vlrank.engines.packed_model import PackedModel, Unsuited, use_kernels
from vlrank.engines.packed_rows import PackedRow, PromptTokens
from vlrank.engines.structure import attending, core
from vlrank.prompting.encoding import Encoded, Encoder

Float32 = npt.NDArray[np.float32]

_NAME = "vlrank_rows"


@torch.no_grad()
def score_rows(
    model: Any, encoder: Encoder, batch: Sequence[Encoded], *, features: bool = False, rows_only: bool = False
) -> list[Float32]:
    """Log-probabilities of every label of every prompt, through one forward pass over one packed row.

    Args:
        model: A causal language model or a vision model whose attention goes through transformers' interface, plain,
            PEFT or sharded. It is put into eval mode for the call. Compiled layers run as they are: rows differ in
            length.
        encoder: Made the prompts; prepares their pictures, or returns their features where the model accepts them.
        batch: Prompts, all in one pass.
        features: The encoder returns features of pictures: [visual tokens, (1 + D) * hidden].
        rows_only: Raise rather than let the model's own forward pass run.

    Returns:
        Per prompt float32 [N].

    Raises:
        Unsuited: with ``rows_only``, where `PackedModel` does not compute this model.
    """
    read = [prompt for prompt in batch if prompt.trie.nodes]
    try:
        packed = _shared(model, needs_tower=not features and any(prompt.image_paths for prompt in read))
    except Unsuited:
        if rows_only:
            raise
        packed = None
    with torch.autocast(next(model.parameters()).device.type, enabled=False) if packed else nullcontext():
        outputs = iter(
            () if not read else _rows_of(packed, encoder, read) if packed else _outputs(model, encoder, read)
        )
        return [
            prompt.trie.log_probs(_logits(model, prompt, *next(outputs)) if prompt.trie.nodes else np.zeros(0))
            for prompt in batch
        ]


def _shared(model: Any, needs_tower: bool) -> PackedModel:
    """The model's own weights as `PackedModel` computes with them.

    Raises:
        Unsuited: it does not.
    """
    plain = core(model)
    if needs_tower:
        raise Unsuited("its vision tower is computed with it")
    if type(plain.get_output_embeddings()) is not torch.nn.Linear:
        raise Unsuited("its head is adapted")
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device) and plain.get_input_embeddings().weight.dtype == torch.float32:
        raise Unsuited("its products are rounded, its weights are not")
    packed = PackedModel.of(model, live=True)
    if device == "cuda":
        use_kernels(packed)
    return packed


def _rows_of(
    packed: PackedModel, encoder: Encoder, batch: Sequence[Encoded]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """See `_outputs`; logits are not computed."""
    prompts, paths = [], [path for prompt in batch for path in prompt.image_paths]
    for prompt in batch:
        ids = np.asarray(prompt.ids)
        visual = np.flatnonzero(ids == encoder.image_token_id) if prompt.image_paths else np.zeros(0, dtype=np.int64)
        prompts.append(PromptTokens(ids, encoder.positions(prompt), prompt.trie, visual, prompt.image_paths))
    row = PackedRow(prompts)
    pictures = None
    if paths:
        pictures = torch.from_numpy(np.concatenate([encoder.pixels(path) for path in paths])).to(packed.device)
    kernel = kernel_for(*packed.sizes[:3], packed.device, packed.dtype)
    hidden = packed.forward(RowAttention(row, packed.device, packed.scaling, kernel), pictures)
    parts = hidden.split([prompt.reads for prompt in prompts])
    return ((part, part) for part in parts)


def _outputs(model: Any, encoder: Encoder, batch: Sequence[Encoded]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per prompt the head's input at its reads, [reads, hidden], and the model's logits, [reads, vocabulary]."""
    plain, device = core(model), next(model.parameters()).device
    config = plain.config.get_text_config()
    row = PackedRow([PromptTokens(np.asarray(p.ids), encoder.positions(p), p.trie) for p in batch])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else plain.dtype
    kernel = kernel_for(config.num_attention_heads, config.num_key_value_heads, head_dim, device, dtype)
    rotary = torch.from_numpy(row.positions)[:, None].to(device)
    text = torch.arange(row.size, device=device).expand(1, 1, -1)
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(row.ids)[None].to(device),
        "position_ids": torch.cat([text, rotary]) if hasattr(plain.config, "vision_config") else rotary[0],
        "packed_row": RowAttention(row, device, head_dim**-0.5, kernel),
        "use_cache": False,
        "logits_to_keep": torch.from_numpy(row.reads).to(device),
    }
    if paths := [path for prompt in batch for path in prompt.image_paths]:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([encoder.pixels(path) for path in paths])).to(device)
        inputs["image_grid_thw"] = torch.tensor([grid for prompt in batch for grid in prompt.grids], device=device)
    seen: list[torch.Tensor] = []
    head = plain.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        with attending(model, _NAME):
            logits = model(**inputs).logits
    finally:
        hook.remove()
    reads = [prompt.reads for prompt in row.prompts]
    return zip(seen[0][0].split(reads), logits[0].split(reads), strict=True)


def _logits(model: Any, prompt: Encoded, hidden: torch.Tensor, logits: torch.Tensor) -> npt.NDArray[np.float64]:
    """Logits of `LabelTrie.flat`: the model's own of an adapted head, else unrounded, from the head's rows."""
    head = core(model).get_output_embeddings()
    tokens = torch.tensor([token for _, token in prompt.trie.flat], device=hidden.device)
    places = [prompt.trie.node_at[node] for node, _ in prompt.trie.flat]
    if not isinstance(head, torch.nn.Linear):
        return logits[places, tokens].double().cpu().numpy()
    with torch.autocast(hidden.device.type, enabled=False):  # validation may run inside one, which would round again
        exact = (_rows(head.weight, tokens).double() * hidden[places].double()).sum(-1)
        if head.bias is not None:
            exact = exact + _rows(head.bias, tokens).double()
    return exact.cpu().numpy()


def _rows(weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole[tokens]


def _row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_row: RowAttention,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    # Under autocast norms with float32 weights give float32 queries and keys; kernels want one type.
    dtype = value.dtype if packed_row.kernel is not None else query.dtype
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    return packed_row(q, k, v).unsqueeze(0), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _row_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _no_mask)

"""The transformers engine: one forward pass per batch reads the whole label trie, in training too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vlrank.compat import patch_torchvision, whole_transformers
from vlrank.config import EngineConfig
from vlrank.engines.adapters import check_adapter
from vlrank.engines.models import ModelFolder
from vlrank.engines.packable import other_layers, varying_rotation
from vlrank.engines.structure import attending
from vlrank.engines.weights import load_whole
from vlrank.errors import UserError
from vlrank.prompting.encoding import Encoded, Encoder

Float32 = npt.NDArray[np.float32]

_CUDA_TILE = 64
"""Queries in a block of PyTorch's attention with a mask; a GPU's batches are a multiple of it long. With PyTorch 2.11
on an H100 the last of 257 queries of a model with one key head came out wrong: scores were off by a nat."""


@torch.no_grad()
def score_labels(model: Any, encoder: Encoder, batch: Sequence[Encoded], *, tree: bool = True) -> list[Float32]:
    """Log-probabilities of every label of every prompt, through one forward pass.

    The trie's inner nodes are appended to the prompts as a tree: each of its tokens sees the prompt, its ancestors and
    itself (4D attention mask) at the position that it would have as a continuation, so that one pass reads every node.
    Works with any model whose attention takes a mask (sdpa, eager), in training too: it is put into eval mode for the
    call. Layers with a window, chunks or a recurrent state cannot see a tree: their models read one row per node.

    Args:
        model: A causal language model or a vision model, plain or PEFT, on any device.
        encoder: Made the prompts; prepares their pictures.
        batch: Prompts; all in one pass, so the caller chooses how many fit.
        tree: False scores plain continuations instead, one row per node: for models that ignore 4D masks.

    Returns:
        Per prompt float32 [N].
    """
    if not batch:
        return []
    longest = max(len(encoded.ids) + len(encoded.trie.tree.tokens) for encoded in batch)
    if len(batch) > 1 and varying_rotation(_text_config(model), longest):  # neighbours would change the scores
        return [score_labels(model, encoder, [encoded], tree=tree)[0] for encoded in batch]
    tree = tree and other_layers(_text_config(model), longest) is None
    attention = _text_config(model)._attn_implementation
    with attending(model, attention if attention in ("sdpa", "eager") else "sdpa"):  # those take any mask
        return _score_tree(model, encoder, batch) if tree else _score_rows(model, encoder, batch)


def _score_tree(model: Any, encoder: Encoder, batch: Sequence[Encoded]) -> list[Float32]:
    # The labels of fewer candidates are a part of those of more: one tree serves the whole batch.
    trie = max((encoded.trie for encoded in batch), key=lambda trie: trie.n)
    tokens, depths = trie.tree.tokens, np.asarray(trie.tree.depths, dtype=np.int64)
    longest, extra = max(len(encoded.ids) for encoded in batch), len(tokens)
    if next(model.parameters()).is_cuda:
        longest += -(longest + extra) % _CUDA_TILE
    length = longest + extra
    ids = np.zeros((len(batch), length), dtype=np.int64)
    positions = np.zeros((3, len(batch), length), dtype=np.int64)
    visible = np.zeros((len(batch), 1, length, length), dtype=bool)
    visible[:, 0, np.arange(length), np.arange(length)] = True  # padding sees itself: an empty row would be NaN
    for row, encoded in enumerate(batch):
        start = longest - len(encoded.ids)  # padded on the left, so that all prompts end at the same place
        ids[row, start:longest], ids[row, longest:] = encoded.ids, tokens
        at = encoder.positions(encoded)
        positions[:, row, start:longest] = at
        positions[:, row, longest:] = at.max() + depths
        visible[row, 0, start:longest, start:longest] = np.tri(len(encoded.ids), dtype=bool)
        visible[row, 0, longest:, start:longest] = True
        visible[row, 0, longest:, longest:] = trie.tree.visible()
    wanted = sorted({token for _, token in trie.flat})
    logits = _logits(model, encoder, batch, ids, positions, visible, keep=extra + 1, wanted=wanted)
    column = {token: i for i, token in enumerate(wanted)}
    place = {node.path: at + 1 for node, at in zip(trie.nodes, trie.tree.node_at, strict=True)}
    result = []
    for row, encoded in enumerate(batch):
        own = encoded.trie
        flat = [logits[row, place[own.nodes[i].path], column[token]] for i, token in own.flat]
        result.append(own.log_probs(np.asarray(flat, dtype=np.float32)))
    return result


def _score_rows(model: Any, encoder: Encoder, batch: Sequence[Encoded]) -> list[Float32]:
    """The same by plain causal rows: prompt + path for every node that is not on the way to another."""
    rows: list[tuple[int, tuple[int, ...]]] = []
    for i, encoded in enumerate(batch):
        paths = [node.path for node in encoded.trie.nodes]
        rows += [(i, p) for p in paths if not any(len(q) > len(p) and q[: len(p)] == p for q in paths)] or [(i, ())]
    longest = max(len(batch[i].ids) + len(path) for i, path in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    positions = np.zeros((3, len(rows), longest), dtype=np.int64)
    attended = np.zeros((len(rows), longest), dtype=np.int64)
    for row, (i, path) in enumerate(rows):
        whole = [*batch[i].ids, *path]
        start = longest - len(whole)
        ids[row, start:] = whole
        attended[row, start:] = 1
        at = encoder.positions(batch[i])
        positions[:, row, start:] = np.concatenate([at, np.tile(at.max() + 1 + np.arange(len(path)), (3, 1))], axis=1)
    wanted = sorted({token for encoded in batch for _, token in encoded.trie.flat})
    keep = 1 + max(len(path) for _, path in rows)
    repeated = [batch[i] for i, _ in rows]
    logits = _logits(model, encoder, repeated, ids, positions, attended, keep=keep, wanted=wanted)
    column = {token: i for i, token in enumerate(wanted)}
    result = []
    for i, encoded in enumerate(batch):
        mine = [(row, path) for row, (j, path) in enumerate(rows) if j == i]
        flat = []
        for node_index, token in encoded.trie.flat:
            node = encoded.trie.nodes[node_index].path
            row, path = next((row, path) for row, path in mine if path[: len(node)] == node)
            flat.append(logits[row, keep - 1 - (len(path) - len(node)), column[token]])
        result.append(encoded.trie.log_probs(np.asarray(flat, dtype=np.float32)))
    return result


def _logits(
    model: Any,
    encoder: Encoder,
    batch: Sequence[Encoded],
    ids: Any,
    positions: Any,
    mask: Any,
    *,
    keep: int,
    wanted: Sequence[int],
) -> Float32:
    """Logits of the ``wanted`` tokens at the last ``keep`` positions: float32 [rows, keep, wanted].

    They are computed in float32 from the last hidden state: bfloat16 logits differ in steps of 1/16 and more, which
    turns close candidates into ties.
    """
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": _mask_for(model, torch.from_numpy(mask).to(device)),
        "use_cache": False,
        "logits_to_keep": keep,
    }
    at = torch.from_numpy(positions).to(device)
    if _is_vision(model):
        inputs["position_ids"] = torch.cat([_text_positions(at, mask, device), at])  # [4, rows, T]: text, then mrope
    else:
        inputs["position_ids"] = at[0]
    paths = [path for encoded in batch for path in encoded.image_paths]
    if paths:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([encoder.pixels(path) for path in paths])).to(device)
        inputs["image_grid_thw"] = torch.tensor([grid for encoded in batch for grid in encoded.grids], device=device)
    head = model.get_output_embeddings()
    seen: list[torch.Tensor] = []
    hook = (
        head.register_forward_pre_hook(lambda _, args: seen.append(args[0])) if type(head) is torch.nn.Linear else None
    )
    try:
        output = model(**inputs)
    finally:
        if hook is not None:
            hook.remove()
    columns = torch.tensor(wanted, dtype=torch.long, device=device)
    logits = output.logits[:, -keep:][..., columns.to(output.logits.device)]
    noise = 0.02 if logits.dtype.itemsize < 4 else 1e-4
    logits = logits.float()
    if seen and seen[0].shape[:2] == (len(ids), keep):
        weight = head.weight[columns.to(head.weight.device)].float()
        with torch.autocast(device.type, enabled=False):  # validation may run inside one, which would round again
            exact = seen[0].float() @ weight.T
            if head.bias is not None:
                exact = exact + head.bias[columns].float()
        # Some models scale or cap what their head gives (Cohere, Gemma, Granite): then their own logits count.
        if torch.allclose(exact, logits, rtol=noise, atol=noise):
            logits = exact
    return logits.cpu().numpy()


def _text_positions(at: torch.Tensor, mask: Any, device: torch.device) -> torch.Tensor:
    # With an explicit mask the text row only has to be there; packed-sequence detection is off.
    return torch.arange(at.shape[2], device=device).expand(1, at.shape[1], -1)


def _mask_for(model: Any, mask: torch.Tensor) -> torch.Tensor:
    if mask.ndim == 2 or _text_config(model)._attn_implementation != "eager":
        return mask
    dtype = next(model.parameters()).dtype  # eager attention adds its mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _is_vision(model: Any) -> bool:
    return hasattr(model.config, "vision_config")


def load_model(model: ModelFolder, dtype: str = "auto", device: str | None = None) -> Any:
    """The model, in eval mode, with its adapter where it has one (not merged).

    Args:
        model: What to load.
        dtype: ``auto`` is the folder's own on a GPU and float32 on a CPU.
        device: Default ``cuda`` where there is one.

    Raises:
        UserError: the folder cannot be loaded, lacks weights, or holds an adapter of another base model.
    """
    whole_transformers()
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    patch_torchvision()
    check_adapter(model, "transformers")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "auto" if device != "cpu" else "float32"
    kind = AutoModelForImageTextToText if model.family == "vision" else AutoModelForCausalLM
    try:
        options = {"device_map": {"": device}} if device != "cpu" else {}
        loaded = load_whole(kind, model.base, revision=model.revision, dtype=dtype, **options)
        if model.is_adapter:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, model.path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"model {model.path} cannot be loaded as a {model.family} model: {str(error).splitlines()[0]}",
            f"Check the folder{f' and its base model {model.base}' if model.is_adapter else ''}.",
        ) from error
    return loaded.eval()


class TransformersScorer:
    """One model in this process.

    Args:
        model: What to load.
        config: ``dtype`` and ``batch_size`` are used.
        batch_tokens: Padded tokens per forward pass, which bounds its memory.
    """

    callers = 1

    def __init__(self, model: ModelFolder, config: EngineConfig, batch_tokens: int = 16384) -> None:
        self.config, self.batch_tokens = config, batch_tokens
        self.model = load_model(model, config.dtype)

    def score_labels(self, encoder: Encoder, requests: Sequence[Encoded]) -> list[Float32 | Exception]:
        """See `scoring.LabelScorer`; prompts of similar length share a pass."""
        result: list[Float32 | Exception] = [RuntimeError("not scored")] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].ids))
        for group in self._groups(order, requests):
            try:
                scored: list[Any] = list(score_labels(self.model, encoder, [requests[i] for i in group]))
            except OSError:  # a picture that has become unreadable: find whose it is
                scored = [self._alone(encoder, requests[i]) for i in group]
            for i, answer in zip(group, scored, strict=True):
                result[i] = answer
        return result

    def close(self) -> None:
        """Drop the model."""
        del self.model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _alone(self, encoder: Encoder, encoded: Encoded) -> Float32 | Exception:
        try:
            return score_labels(self.model, encoder, [encoded])[0]
        except OSError as error:
            return error

    def _groups(self, order: Sequence[int], requests: Sequence[Encoded]) -> Iterator[list[int]]:
        group: list[int] = []
        for i in order:  # rising length: the newest is the longest
            if (group and (len(group) + 1) * len(requests[i].ids) > self.batch_tokens) or len(
                group
            ) == self.config.batch_size:
                yield group
                group = []
            group.append(i)
        if group:
            yield group

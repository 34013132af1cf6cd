"""Opening a packed engine: loading, merging, and a look at whether it computes what transformers computes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlrank.config import EngineConfig
from vlrank.cuda_graphs import CudaGraphs
from vlrank.data.items import ItemMeta
from vlrank.data.tables import read_json
from vlrank.engines.compiled import keep_compiled
from vlrank.engines.models import ModelFolder
from vlrank.engines.packed import PackedScorer
from vlrank.engines.packed_files import read_known, remember
from vlrank.engines.packed_model import PackedModel, Unsuited, check, use_kernels
from vlrank.engines.packed_prefixes import PrefixMemory
from vlrank.engines.resources import gpu_share, weights_bytes
from vlrank.engines.structure import core
from vlrank.engines.transformers_scorer import load_model, score_labels
from vlrank.prompting.encoding import Encoded, Encoder
from vlrank.prompting.prompts import build_prompt
from vlrank.storage import location

ROW_TOKENS = 65536
"""Length of a GPU's rows. Long rows waste little at their ends; 64 thousand tokens of a 2B model take 4 GiB."""

_ROWS_OF_PREFIXES = 4
"""For the users whose prompts are in work at one time."""

_SHORT_ROWS = (2048, 4096, 8192, 16384)
_LAYERS_CHECKED = 4
_TOLERANCE = 1e-2


def open_packed(model: ModelFolder, config: EngineConfig, encoder: Encoder | None = None) -> PackedScorer:
    """Load a model into this process and merge its adapter.

    Args:
        model: What to load.
        config: ``dtype``, ``row_tokens``, ``quantization`` and ``gpus`` are used.
        encoder: Of the model: two prompts are scored by transformers too, and compared. None leaves that out.

    Raises:
        Unsuited: the model is not computed by this engine, or not as transformers computes it.
        UserError: it cannot be loaded.
    """
    cuda = torch.cuda.is_available()
    if cuda and not keep_compiled():
        print("compiling for this GPU, which is kept for later runs: about half a minute", flush=True)
    total = torch.cuda.get_device_properties(0).total_memory * gpu_share(config) if cuda else 0.0
    if cuda and _bytes_needed(model.base) > total:
        raise Unsuited("its weights do not fit one GPU")
    if config.quantization == "fp8" and (not cuda or torch.cuda.get_device_capability() < (8, 9)):
        raise Unsuited("engine.quantization=fp8 needs a GPU with float8 products (compute capability 8.9)")
    dtype = ("bfloat16" if cuda else "float32") if config.dtype == "auto" else config.dtype
    packed = _loaded(model, dtype, encoder)
    served = packed.float8() if config.quantization == "fp8" else packed
    settings: dict[str, Any] = {}
    if cuda:
        for weights in (packed, served):
            use_kernels(weights)
        settings = {
            "row_tokens": config.row_tokens or ROW_TOKENS,
            "record": CudaGraphs(),
            "prefix_bytes": int(min(0.4 * total, _ROWS_OF_PREFIXES * ROW_TOKENS * PrefixMemory.token_bytes(packed))),
            "feature_bytes": (int(0.2 * total), 16 * 2**30),
        }
        torch.cuda.empty_cache()
    scorer = PackedScorer(served, **settings)
    if cuda and config.low_latency:
        _shorten_rows(scorer)
    if served is not packed:
        few = {"record": None, "prefix_bytes": settings["prefix_bytes"] // 8, "feature_bytes": (2**30, 2**30)}
        scorer.exact = PackedScorer(packed, **settings | few)
    return scorer


def _shorten_rows(scorer: PackedScorer) -> None:
    assert scorer.row_tokens is not None
    lengths = [n for n in _SHORT_ROWS if n <= scorer.row_tokens]
    try:
        found = scorer.shorten_rows(lengths, like=max(ROW_TOKENS, scorer.row_tokens))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        found = scorer.shorten_rows(lengths, like=scorer.row_tokens)
    if missing := [f"{n:,}" for n in lengths if n not in found]:
        print(f"rows of {', '.join(missing)} tokens are not used: their results are not those of long rows", flush=True)


def _loaded(model: ModelFolder, dtype: str, encoder: Encoder | None) -> PackedModel:
    """The weights: from the files where their layout is known, else from transformers, and compared with them."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    text = encoder is not None and not encoder.spec.pixels
    if text and (known := read_known(model, getattr(torch, dtype), device)):
        return known
    loaded = load_model(model, dtype)
    check(core(loaded).config)
    if encoder is not None and (apart := disagreement(loaded, encoder)) > _TOLERANCE:
        raise Unsuited(f"its scores differ from those of transformers by {apart:.2g} nat")
    packed = PackedModel.of(loaded)
    if text:
        remember(model, packed)
    return packed


def _bytes_needed(base: str) -> float:
    """GPU memory for the weights of a local model folder and one row; 0 for a name on the hub."""
    if not Path(base).is_dir():
        return 0.0
    quantised = "quantization_config" in read_json(location(base) / "config.json")
    return weights_bytes(base) * (4 if quantised else 1) + 2**31  # 4-bit weights become bfloat16


def disagreement(model: Any, encoder: Encoder) -> float:
    """Largest difference in log-probability between packed rows and transformers, over two made-up prompts.

    It is looked for in the first layers alone and in float32, where rounding hides nothing.

    Args:
        model: As transformers or PEFT loaded it; left as it is.
        encoder: Of the model.
    """
    inner = core(model).model
    text, tower = getattr(inner, "language_model", inner), getattr(inner, "visual", None)
    layers, blind = text.layers, tower is not None and not encoder.spec.pixels
    text.layers = layers[:_LAYERS_CHECKED]
    if blind:
        inner.visual = torch.nn.Identity()  # the tower would be the largest part of the copy
    try:
        # transformers' own `float` refuses models that were quantised.
        shallow = torch.nn.Module.float(with_plain_linears(copy.deepcopy(model)))
    finally:
        text.layers = layers
        if blind:
            inner.visual = tower
    packed = PackedModel.of(shallow, keep=True)
    scorer = PackedScorer(replace(packed, family=None) if blind else packed)
    with probes(encoder) as prompts:
        expected = score_labels(shallow, encoder, prompts)
        given = scorer.score_labels(encoder, [prompts[0], replace(prompts[1], prefix=encoder.shared(prompts[1].ids))])
    scorer.close()
    for answer in given:
        if isinstance(answer, Exception):
            raise answer
    return max(float(np.abs(a - b).max()) for a, b in zip(given, expected, strict=True))


def with_plain_linears(model: Any) -> Any:
    """The model with plain linear layers in place of 4-bit ones; it is changed."""
    from vlrank.engines.packed_model import dequantised

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # PEFT's wrappers show the weight of the layer inside.
            if type(getattr(child, "weight", None)).__name__ == "Params4bit" and not hasattr(child, "get_base_layer"):
                weight = dequantised(child, child.compute_dtype or torch.bfloat16)
                plain = torch.nn.Linear(*weight.shape[::-1], bias=child.bias is not None, device="meta")
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
                plain.bias = child.bias
                setattr(parent, name, plain)
    return model


@contextmanager
def probes(encoder: Encoder) -> Iterator[list[Encoded]]:
    """Two made-up prompts, with pictures where the mode shows them."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:

        def item(i: int) -> ItemMeta:
            path = Path(folder) / f"{i}.png"
            if encoder.spec.pixels and not path.exists():
                noise = np.random.default_rng(i).integers(0, 255, (64 + 32 * (i % 3), 64, 3), dtype=np.uint8)
                Image.fromarray(noise).save(path)
            text = f"item {i * 7919 % 1000}"
            return {"text": text, "caption": text, "semantic_summary": text, "image_path": str(path)}

        items = [item(i) for i in range(13)]
        limit = encoder.ranking.max_item_chars
        yield [
            encoder.encode_prompt(build_prompt(encoder.spec, items[:n], items[:candidates], limit))
            for n, candidates in ((1, 3), (4, 13))
        ]

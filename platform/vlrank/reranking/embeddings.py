"""Text embeddings of a sentence-transformers model, read with transformers alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlrank.console import progress
from vlrank.errors import UserError

_BATCH = 64


def embed_texts(model: str, texts: Sequence[str], *, max_tokens: int = 256) -> NDArray[np.float32]:
    """Unit-length embeddings, float32 [len(texts), width].

    Pooling is the one in the model's ``1_Pooling/config.json`` (mean, CLS or last token), mean without that file: what
    sentence-transformers computes for models of one encoder and one pooling layer (Reimers and Gurevych 2019).

    Args:
        model: Hugging Face name or local folder.
        texts: Texts to embed; equal ones are embedded once.
        max_tokens: Longer texts are cut.

    Raises:
        UserError: the model cannot be loaded.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"embedding model {model!r} cannot be loaded: {reason}", "Give a name or a folder.") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    pooling = _pooling(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.to(device)
    distinct = sorted(set(texts), key=lambda text: (len(text), text))  # texts of similar length share a batch
    rows: dict[str, NDArray[np.float32]] = {}
    with torch.no_grad(), progress("embed item texts", len(distinct)) as bar:
        for start in range(0, len(distinct), _BATCH):
            batch = distinct[start : start + _BATCH]
            inputs = tokenizer(
                [text or " " for text in batch],
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            ).to(device)
            hidden = encoder(**inputs).last_hidden_state
            mask = inputs["attention_mask"]
            if pooling == "cls":
                pooled = hidden[:, 0]
            elif pooling == "last":
                pooled = hidden[torch.arange(len(batch)), mask.sum(dim=1) - 1]
            else:
                weights = mask.unsqueeze(-1).to(hidden.dtype)
                pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
            unit = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
            rows.update(zip(batch, unit, strict=True))
            bar.advance(len(batch))
    return np.stack([rows[text] for text in texts]).astype(np.float32)


def _pooling(model: str) -> str:
    from transformers.utils import cached_file

    path = cached_file(
        model,
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return "mean"
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    if settings.get("pooling_mode_cls_token"):
        return "cls"
    return "last" if settings.get("pooling_mode_lasttoken") else "mean"

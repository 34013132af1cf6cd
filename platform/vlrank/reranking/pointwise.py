"""A pointwise baseline: one yes/no question per candidate, where a listwise reranker asks one question per user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrank.config import EngineConfig, Mode
from vlrank.console import progress
from vlrank.data.items import ItemMeta
from vlrank.engines.models import open_model
from vlrank.prompting.labels import LabelTrie
from vlrank.prompting.modes import ModeSpec
from vlrank.prompting.prompts import RankingPrompt, item_line
from vlrank.reranking.ranker import open_ranker
from vlrank.retrieval.baselines import Pair

QUESTION = "Will the user interact with the candidate item next? Answer with only Yes or No."
_HEAD = "You are a recommendation assistant.\n\nUser history:\n"
_AT_ONCE = 512


def yes_log_probs(
    model: str, mode: Mode | None, pairs: Sequence[Pair], *, max_history: int = 20, batch_size: int = 64
) -> NDArray[np.float32]:
    """log P("Yes") against "No" for every pair, float32 [len(pairs)].

    The question is TALLRec's (Bao et al. 2023), the score monoT5's (Nogueira et al. 2020), read exactly, whatever the
    tokenizer makes of the two words.

    Args:
        model: A run or checkpoint folder, a model folder or a Hugging Face name.
        mode: What the model sees of an item; None asks about texts alone, or as ``model`` was trained.
        pairs: History and candidate of each question, in any order.
        max_history: Most recent items shown.
        batch_size: Most questions per forward pass.

    Raises:
        UserError: the model cannot be loaded, or its tokenizer cannot tell "Yes" from "No".
    """
    folder = open_model(model, mode)
    shown = folder.mode
    if shown is None:  # any language model can read texts
        folder = replace(folder, mode="semantic_summary_small")
        pairs = [([_text(item) for item in history], _text(candidate)) for history, candidate in pairs]
    ranker = open_ranker(folder, EngineConfig(name="transformers", batch_size=batch_size), {})
    encoder, engine = ranker.prompts.encoder, ranker.engine
    unreadable = cache(encoder.unreadable)
    scores = np.zeros(len(pairs), np.float32)
    try:
        trie = LabelTrie.of_answers(encoder.tokenizer, ["Yes", "No"], QUESTION)
        with progress("ask the pointwise model", len(pairs)) as bar:
            for start in range(0, len(pairs), _AT_ONCE):
                some = pairs[start : start + _AT_ONCE]
                encoded = []
                for history, candidate in some:
                    path = candidate.get("image_path") if encoder.spec.pixels else None
                    if path and unreadable(path):
                        candidate = {**candidate, "image_path": None}
                    question = prompt(encoder.spec, history[-max_history:], candidate, folder.ranking.max_item_chars)
                    encoded.append(replace(encoder.encode_prompt(question), trie=trie))
                for at, answer in enumerate(engine.score_labels(encoder, encoded), start=start):
                    if isinstance(answer, Exception):
                        raise answer
                    scores[at] = answer[0]
                bar.advance(len(some))
    finally:
        engine.close()
    return scores


def prompt(spec: ModeSpec, history: Sequence[ItemMeta], candidate: ItemMeta, max_item_chars: int) -> RankingPrompt:
    """The question about one candidate; in ``raw_image`` with its picture."""
    lines = "\n".join(f"- {item_line(spec, item, max_item_chars)}" for item in history)
    head = f"{_HEAD}{lines}\n\nCandidate item:\n"
    tail = f"{item_line(spec, candidate, max_item_chars)}\n\n{QUESTION}"
    path = candidate.get("image_path") if spec.pixels else None
    content: Any = head + tail
    if path:
        content = [{"type": "text", "text": head}, {"type": "image"}, {"type": "text", "text": tail}]
    return RankingPrompt([{"role": "user", "content": content}], (path,) if path else (), n_candidates=1)


def _text(item: ItemMeta) -> ItemMeta:
    return {"text": item["text"]}

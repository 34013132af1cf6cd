"""An independent judge of label scores: every label as a full continuation, one plain forward pass each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlrank.config import RankingConfig
from vlrank.data.items import ItemMeta
from vlrank.prompting.encoding import Encoded, Encoder


def brute_force(model: Any, encoder: Encoder, encoded: Encoded) -> np.ndarray:
    """float64 [N]: log P of each label, each step normalised over the tokens that may still become a label."""
    labels = encoded.trie.labels
    scores = []
    for label in labels:
        ids = torch.tensor([[*encoded.ids, *label]])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if encoded.image_paths:
            images = [encoder.picture(path) for path in encoded.image_paths]
            prepared = encoder.image_processor(images=images, do_resize=False, return_tensors="pt")
            inputs |= {"pixel_values": prepared["pixel_values"], "image_grid_thw": prepared["image_grid_thw"]}
            inputs["mm_token_type_ids"] = (ids == encoder.image_token_id).int()
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=len(label) + 1).logits[0].double()
        total = 0.0
        for depth, token in enumerate(label):
            valid = sorted({other[depth] for other in labels if other[:depth] == label[:depth]})
            here = logits[depth]
            total += float(here[token] - torch.logsumexp(here[valid], 0))
        scores.append(total)
    return np.asarray(scores)


def text_items(n: int, name: str = "item") -> list[ItemMeta]:
    """Items with everything that text modes show."""
    return [
        {"text": f"{name} {i}", "caption": f"c {i * 7 % 11}", "semantic_summary": f"s {i * 5 % 13}"} for i in range(n)
    ]


def picture_items(n: int, folder: Any) -> list[ItemMeta]:
    """Items with small noisy pictures of differing shapes; every fifth has none."""
    items: list[ItemMeta] = []
    for i in range(n):
        path = folder / f"{i}.png"
        shape: Sequence[int] = ((40, 40, 3), (64, 96, 3), (50, 30, 3))[i % 3]
        Image.fromarray(np.random.default_rng(i).integers(0, 255, shape, dtype=np.uint8)).save(path)
        items.append({"text": f"item {i}", "image_path": None if i % 5 == 4 else str(path)})
    return items


RANKING = RankingConfig(max_prompt_tokens=65536, max_image_pixels=4096, window=100)

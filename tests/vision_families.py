"""Tiny models of every vision family, with random weights, in folders as people download them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlrank.demo.base_models import CHAT_TEMPLATE, MERGE, train_tokenizer

HIDDEN, HEADS, HEAD_DIM, VISION_HIDDEN = 64, 2, 32, 64

THINKING_TEMPLATE = CHAT_TEMPLATE.removesuffix("{% endif -%}") + (
    "{%- if enable_thinking is defined and enable_thinking is true -%}\n<think>\n{% else -%}\n"
    "<think>\n\n</think>\n\n{% endif -%}\n{%- endif -%}"
)
"""As Qwen3.5's: without thoughts the model answers behind a closed block of them."""


def family_folder(kind: str, folder: Path, texts: list[str], **text_changes: Any) -> Path:
    """A model folder of family ``kind``: its files are those of the published models, its weights are random.

    Qwen2.5-VL names its pictures' bounds ``min_pixels`` and ``max_pixels`` and keeps its template in
    chat_template.json; Qwen3-VL is made as the 8B is, with untied embeddings and three deepstack layers.
    ``text_changes`` are of the language model's configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = train_tokenizer(texts)
    tokens = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    text, vision, tied = _PARTS[kind]
    sizes = {
        "vocab_size": len(tokenizer) + 8,  # padded, as those of the published models are
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "max_position_embeddings": 8192,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "bos_token_id": None,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
    }
    tower = {
        "depth": 4,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "initializer_range": 0.1,
    }
    config = AutoConfig.for_model(
        kind, text_config=sizes | text | text_changes, vision_config=tower | vision, tie_word_embeddings=tied, **tokens
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):  # they begin at zero
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(folder)
    _write_processor(kind, folder, template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    return folder


_INTERLEAVED = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_interleaved": True}
_PARTS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "qwen2_5_vl": (
        {
            "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        },
        {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1, 3]},
        True,
    ),
    "qwen3_vl": (
        {
            "num_hidden_layers": 4,
            "head_dim": HEAD_DIM,
            "rope_parameters": {**_INTERLEAVED, "mrope_section": [6, 5, 5]},
        },
        {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]},
        False,
    ),
    "qwen3_5": (
        {
            "num_hidden_layers": 4,
            "head_dim": HEAD_DIM,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "rope_parameters": {**_INTERLEAVED, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
        },
        {"patch_size": 16, "num_position_embeddings": 64},
        True,
    ),
}
FAMILIES = tuple(_PARTS)


def _write_processor(kind: str, folder: Path, template: str) -> None:
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    clip = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    shared = {"temporal_patch_size": 2, "merge_size": MERGE, "image_processor_type": "Qwen2VLImageProcessor"}
    if kind == "qwen2_5_vl":
        picture = {**shared, **clip, "patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 112 * 112}
        picture["processor_class"] = "Qwen2_5_VLProcessor"
        files = {"preprocessor_config.json": picture, "chat_template.json": {"chat_template": template}}
    else:
        size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
        picture = {**shared, **grey, "patch_size": 16, "size": size, "processor_class": "Qwen3VLProcessor"}
        film = {**picture, "video_processor_type": "Qwen3VLVideoProcessor"}
        del film["image_processor_type"]
        files = {"preprocessor_config.json": picture, "video_preprocessor_config.json": film}
        (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE if kind == "qwen3_5" else template)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))

"""Qwen3.5 (0.8B, 2B, 4B, 9B, 27B): Qwen3-VL's tower without deepstack, and a language model of two kinds of layers.

Three of four layers are gated delta networks, whose recurrent and convolutional states run through a row; the fourth is
attention with an output gate. transformers hands borders of documents to kernels of flash-linear-attention alone, and
its own code ignores them: rows are not packed, and the packed scorer leaves the family to vLLM or transformers.
"""

from __future__ import annotations

from vlrank.engines.families.family import VisionFamily


class Qwen35(VisionFamily):
    """See `VisionFamily`."""

    model_type = "qwen3_5"
    name = "Qwen3.5"
    example = "Qwen/Qwen3.5-0.8B"

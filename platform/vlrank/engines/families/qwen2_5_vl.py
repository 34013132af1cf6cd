"""Qwen2.5-VL (3B, 7B, 32B, 72B): a tower that attends within windows of 112 pixels, but for a few layers.

Patches have 14 pixels; the processor's bounds are ``min_pixels`` and ``max_pixels``. The language model is Qwen2's,
with biases in queries, keys and values and three rotary sections. Its layers are plain causal attention, so that rows
are packed.
"""

from __future__ import annotations

from vlrank.engines.families.family import VisionFamily


class Qwen25VL(VisionFamily):
    """See `VisionFamily`."""

    model_type = "qwen2_5_vl"
    name = "Qwen2.5-VL"
    example = "Qwen/Qwen2.5-VL-3B-Instruct"

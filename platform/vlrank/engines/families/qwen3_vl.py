"""Qwen3-VL (2B, 4B, 8B, 32B): a tower with full attention within pictures, whose inner layers are read too.

Deepstack: features of D layers of the tower are added to the visual tokens behind the first D language layers. The
language model is Qwen3's, with interleaved rotary sections. The sizes differ in depth, in the layers that are read and
in whether embeddings are tied, all of which the configuration names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlrank.engines.families.family import VisionFamily

if TYPE_CHECKING:
    import torch


class Qwen3VL(VisionFamily):
    """See `VisionFamily`."""

    model_type = "qwen3_vl"
    name = "Qwen3-VL"
    example = "Qwen/Qwen3-VL-2B-Instruct"

    def extra_layers(self, vision_config: Any) -> int:
        """See `VisionFamily`."""
        return len(vision_config.deepstack_visual_indexes)

    def features(self, output: Any) -> torch.Tensor:
        """See `VisionFamily`."""
        import torch

        return torch.cat([output.pooler_output, *output.deepstack_features], dim=-1)

    def output(self, features: torch.Tensor, vision_config: Any) -> Any:
        """See `VisionFamily`."""
        import transformers
        from packaging.version import Version
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        first, *deepstack = features.split(vision_config.out_hidden_size, dim=-1)
        # From 5.18 on deepstack features too come as a chunk per picture.
        chunked = Version(transformers.__version__) >= Version("5.18")
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=(first,), deepstack_features=[(layer,) for layer in deepstack] if chunked else deepstack
        )

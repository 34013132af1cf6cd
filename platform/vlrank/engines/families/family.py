"""What a vision family is: how the features of pictures enter its language model.

All families here are of Qwen's line. They share what `vlrank.prompting.encoding` does: patches of two equal frames, one
``<|image_pad|>`` per visual token, positions of time, row and column that continue behind a picture after its longer
side, and `Qwen2VLImageProcessor` with the sizes, means and deviations that a model's folder names. They differ in the
tower and in its output, and every difference that the code depends on stands in the family's own file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch


class VisionFamily:
    """A family whose features enter at the embeddings of the placeholders and nowhere else.

    Attributes:
        model_type: In config.json.
        name: As people call it.
        example: A model on the hub.
    """

    model_type: ClassVar[str]
    name: ClassVar[str]
    example: ClassVar[str]

    def extra_layers(self, vision_config: Any) -> int:
        """D: further feature vectors per visual token, each added behind one of the first D language layers."""
        return 0

    def width(self, vision_config: Any) -> int:
        """Numbers per visual token, (1 + D) * hidden."""
        return int(vision_config.out_hidden_size * (1 + self.extra_layers(vision_config)))

    def features(self, output: Any) -> torch.Tensor:
        """What the tower returned, as [visual tokens, (1 + D) * hidden]."""
        features: torch.Tensor = output.pooler_output
        return features

    def output(self, features: torch.Tensor, vision_config: Any) -> Any:
        """`features` undone: what the model's ``get_image_features`` returns, all pictures in one chunk."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=(features,))

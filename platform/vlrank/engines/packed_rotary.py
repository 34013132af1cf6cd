"""Plain rotary positions, number by number as transformers computes them, where its own module is not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class UnknownRotary(ValueError):
    """Positions of another kind; says which."""


class Rotary(torch.nn.Module):
    """Cosines and sines of positions.

    Args:
        theta: Base of the frequencies.
        head_dim: Width of a head.
        device: Where positions are.
    """

    def __init__(self, theta: float, head_dim: int, device: torch.device) -> None:
        super().__init__()
        # On the CPU: another device's powers differ in the last bit.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        self.frequencies = (1.0 / (theta**exponents)).to(device)

    @classmethod
    def of(cls, config: Mapping[str, Any], head_dim: int, device: torch.device) -> Rotary:
        """The positions that a text model's configuration names.

        Sections of a vision model's positions make no difference to text, whose three positions are one number.

        Raises:
            UnknownRotary: they are not plain.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        part = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1))
        theta = rope.get("rope_theta", config.get("rope_theta"))
        if kind not in ("default", "mrope") or part != 1 or theta is None:
            raise UnknownRotary(f"its rotary positions are {kind}, with a base of {theta}")
        return cls(float(theta), head_dim, device)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [1, T] -> cosines and sines [1, T, head dim] in the type of ``x``."""
        angles = positions[..., None].float() * self.frequencies
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)

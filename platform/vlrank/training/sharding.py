"""Weights that are sharded over GPUs (FSDP2): when they are gathered, and under which names they are saved."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from vlrank.engines.structure import core, decoder_layers


def prefetch_layers(model: Any) -> int:
    """Have each sharded layer start gathering the next one, in the forward and in the backward pass.

    Returns:
        Layers that were told so.
    """
    told = 0
    lists = [decoder_layers(model)]
    if (tower := getattr(core(model).base_model, "visual", None)) is not None:
        lists.append(tower.blocks)
    for layers in lists:
        sharded = [layer for layer in layers if hasattr(layer, "set_modules_to_forward_prefetch")]
        for before, after in pairwise(sharded):
            before.set_modules_to_forward_prefetch([after])
            after.set_modules_to_backward_prefetch([before])
            told += 1
    return told


def second_names(model: Any) -> set[str]:
    """Names of weights that have another name before: of a tied output head.

    Whole copies share memory and are written once; gathered ones are copies, which would be written for each name.
    """
    seen: set[int] = set()
    second: set[str] = set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in seen:
            second.add(name)
        seen.add(id(weight))
    return second

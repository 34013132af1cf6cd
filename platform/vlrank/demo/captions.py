"""How many captions of the drawn shop are right: the shop knows what it drew."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vlrank.demo.shop import COLOURS, KINDS, PATTERNS, Product

PARTS = ("kind", "colour", "pattern", "all three")
_KINDS = frozenset(kind.lower() for kind in KINDS)
_SHOWN_PATTERNS = frozenset(PATTERNS) - {"plain"}


def caption_accuracy(products: Sequence[Product], captions: Mapping[str, str]) -> dict[str, float]:
    """Share of products whose caption names the right kind, colour and pattern, and no other.

    Args:
        products: What was drawn; not empty.
        captions: ``source_id`` -> caption; a product without one counts as wrong in every part.

    Returns:
        Part of `PARTS` -> share, 0 to 1.
    """
    right = [_right(product, captions.get(product.source_id)) for product in products]
    return {part: sum(flags[i] for flags in right) / len(right) for i, part in enumerate(PARTS)}


def _right(product: Product, caption: str | None) -> tuple[bool, bool, bool, bool]:
    """One flag per part; a plain product has no word for its pattern."""
    if not caption:
        return False, False, False, False
    words = set(re.findall(r"[a-z]+", caption.lower()))
    kind = words & _KINDS == {product.kind.lower()}
    colour = words & COLOURS.keys() == {product.colour}
    pattern = words & _SHOWN_PATTERNS == {product.pattern} - {"plain"}
    return kind, colour, pattern, kind and colour and pattern

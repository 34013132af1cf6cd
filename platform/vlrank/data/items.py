"""One item as prompts see it."""

from __future__ import annotations

from typing import TypedDict


class ItemMeta(TypedDict, total=False):
    """One item as prompts see it; ``text`` is always there, the others are None or absent where the item lacks them."""

    text: str
    image_path: str | None  # absolute, relative to the working directory, or a URL
    caption: str | None
    semantic_summary: str | None
    popularity: int  # training interactions; for `RankingConfig.popularity_prior`

"""The dataset as requests name it: items and users by number or by the source's id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from vlrank.data.dataset import Dataset
from vlrank.data.items import ItemMeta
from vlrank.serving.messages import Item, ItemId, Refused


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Items and users of a dataset.

    Attributes:
        meta: item id -> what prompts show.
        items: The source's id -> item id.
        users: The source's name -> user id.
        sequences: List of item ids per user, oldest first; user 1 is at 0.
    """

    meta: Mapping[int, ItemMeta]
    items: Mapping[str, int]
    users: Mapping[str, int]
    sequences: pl.Series

    @classmethod
    def of(cls, dataset: Dataset, meta: Mapping[int, ItemMeta]) -> Catalogue:
        """The catalogue of a dataset, whose ids count from 1 without gaps."""
        items, sequences = dataset.items(), dataset.sequences()
        return cls(
            meta,
            dict(zip(items["source_id"].to_list(), items["item_id"].to_list(), strict=True)),
            dict(zip(sequences["source_user"].to_list(), sequences["user_id"].to_list(), strict=True)),
            sequences["item_ids"],
        )

    def item(self, given: ItemId, where: str) -> int:
        """The item id.

        Raises:
            Refused: the dataset has no such item.
        """
        found = given if isinstance(given, int) and given in self.meta else None
        if isinstance(given, str):
            found = self.items.get(given)
        if found is None:
            known = f"items 1 to {len(self.meta)}{_quoted(given, self.items)}"
            raise Refused(422, f"{where}: the dataset has no item {given!r} ({known})")
        return found

    def user(self, given: ItemId) -> int:
        """The user id.

        Raises:
            Refused: the dataset has no such user.
        """
        found = given if isinstance(given, int) and 1 <= given <= len(self.sequences) else None
        if isinstance(given, str):
            found = self.users.get(given)
        if found is None:
            known = f"users 1 to {len(self.sequences)}{_quoted(given, self.users)}"
            raise Refused(422, f"user: the dataset has no user {given!r} ({known})")
        return found

    def sequence(self, user: int) -> list[int]:
        """All items of a user, oldest first."""
        items: list[int] = self.sequences[user - 1].to_list()
        return items


def item_meta(item: Item, picture: str | None) -> ItemMeta:
    """An item of a request as prompts see it; ``picture`` is the path of the file."""
    return {
        "text": item.text,
        "image_path": picture,
        "caption": item.caption or None,
        "semantic_summary": item.semantic_summary or None,
        "popularity": item.popularity,
    }


def without_repetitions(ids: Sequence[int]) -> None:
    """Check that no candidate comes twice.

    Raises:
        Refused: one does.
    """
    seen: dict[int, int] = {}
    for place, item in enumerate(ids):
        if item in seen:
            raise Refused(422, f"candidates.{place}: the same item as candidates.{seen[item]}")
        seen[item] = place


def _quoted(given: ItemId, sources: Mapping[str, int]) -> str:
    """A hint where a number is not ours but the source's."""
    return f'; "{given}" in quotes is one of the source' if isinstance(given, int) and str(given) in sources else ""

"""``vlrank inspect``: a dataset, one user's history or one item, as a person would want to see it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import polars as pl
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vlrank.console import PlainConsole
from vlrank.data import schemas
from vlrank.data.dataset import Dataset
from vlrank.data.summary import describe
from vlrank.data.tables import read_parquet
from vlrank.errors import UserError
from vlrank.storage import Location


def inspect_dataset(
    path: str | Location, *, user: int | str | None = None, item: int | str | None = None, out: Console | None = None
) -> None:
    """Print the dataset's summary, or one user's history, or one item.

    Args:
        path: The dataset folder, or its URL.
        user: A user_id, or the user's id in the source.
        item: An item_id, or the item's id in the source.
        out: Where to print; default standard output.

    Raises:
        UserError: no such dataset, user or item.
    """
    dataset = Dataset.open(path)
    out = out or PlainConsole()
    if user is None and item is None:
        summary = describe(dataset, f"dataset {dataset.path}")
        out.print(_grid(summary.title, summary.lines))
    if user is not None:
        out.print(user_view(dataset, user))
    if item is not None:
        out.print(item_view(dataset, item))


def user_view(dataset: Dataset, user: int | str) -> RenderableType:
    """A user's history, oldest first, with what each interaction is used for.

    Raises:
        UserError: no such user.
    """
    row = _find(dataset.sequences(), "user", "user_id", "source_user", user)
    items = dataset.items().select("item_id", "title", "source_id", "image_path")
    meta = {item_id: rest for item_id, *rest in items.iter_rows()}
    table = Table("when", "item", "title", "picture", "used for", title_justify="left", expand=False)
    uses = _uses(dataset, row)
    for item_id, seconds, use in zip(row["item_ids"], row["timestamps"], uses, strict=True):
        title, source_id, image = meta[item_id]
        style = {"train": "", "validation": "yellow", "test": "green"}.get(use, "dim")
        table.add_row(_when(seconds), str(item_id), Text(title or source_id), "yes" if image else "-", use, style=style)
    head = f"user {row['user_id']} ({row['source_user']}): {len(row['item_ids'])} interactions"
    return Group(Text(head, style="bold"), table)


def _uses(dataset: Dataset, row: dict[str, Any]) -> list[str]:
    split, times, n = dataset.manifest["split"], row["timestamps"], len(row["item_ids"])
    if split["method"] == "leave_one_out":
        return ["train"] * (n - 2) + ["validation", "test"][-min(n, 2) :]
    periods = ["train" if t < split["val_from"] else "validation" if t < split["test_from"] else "test" for t in times]
    # The first of a period is the target; what follows is history for nobody in that period.
    return [use if use == "train" or use not in periods[:i] else f"after {use} target" for i, use in enumerate(periods)]


def item_view(dataset: Dataset, item: int | str) -> RenderableType:
    """Everything that is known of an item.

    Raises:
        UserError: no such item.
    """
    row = _find(dataset.items(), "item", "item_id", "source_id", item)
    item_id = row["item_id"]
    meta = dataset.item_meta()[item_id]
    taken = dataset.sequences().select(pl.col("item_ids").list.count_matches(item_id).sum()).item()
    lines: dict[str, object] = {
        "title": row["title"] or "(none)",
        "brand": row["brand"] or "-",
        "categories": " > ".join(row["categories"]) or "-",
        "description": row["description"] or "-",
        "text in prompts": meta["text"],
        "picture": meta.get("image_path") or _why_no_picture(dataset, item_id),
        "caption": meta.get("caption") or "-",
        "semantic summary": meta.get("semantic_summary") or "-",
        "interactions": f"{taken:,}",
    }
    return _grid(f"item {item_id} ({row['source_id']})", lines)


def _why_no_picture(dataset: Dataset, item_id: int) -> str:
    path = dataset.path / "pictures.parquet"
    if not path.exists():
        return "-"
    rows = read_parquet(path, schemas.PICTURES).filter(pl.col("item_id") == item_id).to_dicts()
    if not rows:
        return "- (the metadata names none)"
    if rows[0]["error_type"]:
        return f"- ({rows[0]['error_type']}: {rows[0]['message']})"
    return f"- (not fetched: {rows[0]['source']}; prepare with --use_image)"


def _find(table: pl.DataFrame, what: str, id_column: str, source_column: str, wanted: int | str) -> dict[str, Any]:
    found = table.filter(pl.col(source_column) == str(wanted))
    if isinstance(wanted, int) or wanted.isdecimal():
        by_id = table.filter(pl.col(id_column) == int(wanted))
        found = by_id if len(by_id) else found
    if not len(found):
        raise UserError(f"there is no {what} {wanted}", f"Ids run from 1 to {len(table)}; ids of the source work too.")
    return found.row(0, named=True)


def _when(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def _grid(title: str, lines: Any) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for label, value in lines.items():
        grid.add_row(label, Text(str(value)))
    return Panel(grid, title=Text(title), title_align="left", expand=False)

"""Reading rankings: files of ``vlrank rerank`` and of other programs, one entry per model and split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from vlrank.config import Split
from vlrank.console import console
from vlrank.data import schemas
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Ints, Lists
from vlrank.data.tables import parquet_file, read_parquet
from vlrank.errors import UserError
from vlrank.evaluation.checks import Finding
from vlrank.retrieval import baselines
from vlrank.retrieval.importing import read_candidates
from vlrank.storage import Location, fetch


@dataclass(frozen=True, slots=True)
class ModelRankings:
    """One model's rankings of the users of one split.

    Attributes:
        name: As shown; distinct within the split.
        split: ``val`` or ``test``.
        lists: The rankings, without repeated items.
        file: Where they were read from.
        declared: The candidates that the file says were ranked, e.g. ``sasrec`` or ``ground_truth``; None if it does
            not say.
        repeated: Users whose list named an item again, once per item that was dropped.
        rejected: Rows of the file that could not be used, by kind of error.
    """

    name: str
    split: Split
    lists: Lists
    file: Location
    declared: str | None
    repeated: Ints
    rejected: dict[str, int]

    def findings(self) -> list[Finding]:
        """What the file holds beside usable rankings."""
        users, findings = len(self.lists.users), []
        if self.rejected:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.rejected.items())
            message = f"{self.name}: {self.file.name} has rows that are not of this dataset, or not usable: {kinds}"
            findings.append(Finding("rejected", "warning", message, sum(self.rejected.values()), users))
        if len(self.repeated):
            count = len(np.unique(self.repeated))
            message = (
                f"{self.name}: repeated items in the rankings of {count:,} of {users:,} users "
                f"({len(self.repeated):,} items); the first place counts"
            )
            findings.append(Finding("duplicates", "warning", message, count, users))
        return findings


def read_rankings(files: Sequence[Location], dataset: Dataset, split: Split = "test") -> list[ModelRankings]:
    """The rankings of the files, one entry per split and source.

    Besides Parquet files of `vlrank rerank` these may be what `read_candidates` reads: TREC runs, JSONL, text.

    Args:
        files: The rankings.
        dataset: Gives the ids.
        split: The split of a file that does not name its split, in itself or in the JSON file beside it.

    Raises:
        UserError: unreadable, empty, of another dataset, or with two rankings of one user.
    """
    found: list[tuple[str, Split, Lists, Location, Ints, dict[str, int]]] = []
    for file in files:
        table, rejected = _read_table(file, dataset, split)
        if table.is_empty():
            raise UserError(f"rankings {file} are empty", "Make them with `vlrank rerank`.")
        for (part_of, source), part in table.group_by(["split", "source"], maintain_order=True):
            if part_of not in ("val", "test"):
                raise UserError(f"rankings {file} have the split {part_of!r}; val or test is expected")
            if part["user_id"].n_unique() != len(part):
                raise UserError(f"rankings {file} hold several rankings of a user of {part_of} by {source}")
            lists = Lists.from_frame(part.sort("user_id"))
            if len(lists.items) and not (lists.items.min() >= 1 and lists.items.max() <= dataset.n_items):
                raise UserError(
                    f"rankings {file} hold items that {dataset.path} lacks (its ids are 1 to {dataset.n_items})",
                    "They were made from another dataset.",
                )
            # A repeated item would push the others down, below the number of candidates.
            again = lists.duplicates()
            repeated = lists.users[lists.segments()[again]]
            found.append((str(source or file.stem), part_of, lists.keep(~again), file, repeated, rejected))
    names = _names([(source, part_of, file) for source, part_of, _, file, *_ in found])
    return [
        ModelRankings(name, part_of, lists, file, _declared(source), repeated, rejected)
        for name, (source, part_of, lists, file, repeated, rejected) in zip(names, found, strict=True)
    ]


def _read_table(file: Location, dataset: Dataset, split: Split) -> tuple[pl.DataFrame, dict[str, int]]:
    """A file's rankings, and the number of rows that could not be used, by kind of error."""
    if not file.is_file():
        raise UserError(f"rankings {file} do not exist", "Make them with `vlrank rerank`.")
    local = fetch(file)
    if file.suffix == ".parquet" and _is_ours(local):
        return read_parquet(local, schemas.RANKINGS), {}
    sidecar = _sidecar(file)
    split = sidecar["split"] if sidecar.get("split") in ("val", "test") else split
    source = str(sidecar.get("source") or file.stem)
    read = read_candidates(local, dataset, split=split)
    for note in (f"{label} {text}" for label, text in read.notes.items() if label != "read as"):
        console.print(f"{file.name}: {note}", markup=False)
    return read.table.with_columns(source=pl.lit(source)), Counter(row["error_type"] for row in read.rejected)


def _sidecar(file: Location) -> dict[str, Any]:
    """The facts that `vlrank rerank` writes to ``OUT.json``: a TREC run has no place for its split and candidates."""
    path = file.with_name(file.name + ".json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _is_ours(file: Path) -> bool:
    try:
        return "source" in parquet_file(file).schema_arrow.names
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"rankings {file} are not a readable Parquet file: {error}") from None


def _declared(source: str) -> str | None:
    """The candidates named in a source: ``sasrec`` of ``qwen3vl/caption candidates=sasrec windows=20/10``."""
    names = [word.removeprefix("candidates=") for word in source.split() if word.startswith("candidates=")]
    return names[0] if names else None


def _names(found: Sequence[tuple[str, Split, Location]]) -> list[str]:
    """Short, distinct names: without the family that all sources share (``qwen3vl/``) and without the candidates."""
    words = [[word for word in source.split() if not word.startswith("candidates=")] for source, _, _ in found]
    families = {head.partition("/")[0] if "/" in head else None for head, *_ in words}
    shared = len(families) == 1 and None not in families
    named = [" ".join([head.partition("/")[2] if shared else head, *options]) for head, *options in words]
    keys = [
        (name, split, _declared(source) or "ground_truth")
        for name, (source, split, _) in zip(named, found, strict=True)
    ]
    names: list[str] = []
    used: set[tuple[str, str]] = set()
    for key, (_, split, file) in zip(keys, found, strict=True):
        name = key[0]
        alike = [other.stem for its_key, (_, _, other) in zip(keys, found, strict=True) if its_key == key]
        if len(alike) > 1 and len(set(alike)) == len(alike) and file.stem not in baselines.BASELINES:
            name = file.stem  # one mode several times, e.g. before and after training: file names tell them apart
        elif len(alike) > 1 or name in baselines.BASELINES:
            name = f"{name} ({file.stem})"
        if (name, split) in used and file.stem not in baselines.BASELINES:
            name = file.stem  # one mode over several candidates
        while (name, split) in used:
            name += "'"
        used.add((name, split))
        names.append(name)
    return names

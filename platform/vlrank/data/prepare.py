"""``vlrank prepare``: raw reviews, metadata and pictures become a dataset folder.

In this order, each step counted in the manifest:

1. read every interaction that is whole; bad rows go to quarantine;
2. ``min_rating``: keep interactions rated at least this. (In the lineage of this code, LlamaRec and its descendants,
the
   option only named a folder; here it filters.)
3. drop items without title, brand, categories and description, so that every item can be shown in a prompt;
4. order by time, ties in file order; of repeated (user, item) pairs keep the first;
5. ``min_uc``/``min_sc``: the k-core, to the fixpoint (`vlrank.data.interactions.k_core`);
6. ids from 1 in the byte order of the source's ids; split.

The dataset appears in one rename at the end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from vlrank.config import ColumnsConfig, PrepareConfig
from vlrank.console import Summary, progress
from vlrank.data import pictures, schemas
from vlrank.data.amazon import locate
from vlrank.data.dataset import Dataset, DatasetWriter
from vlrank.data.interactions import (
    Collector,
    Interactions,
    Sequences,
    drop_duplicates,
    k_core,
    order,
    sequences,
)
from vlrank.data.metadata import Item, items
from vlrank.data.rawfiles import Rejects, estimate_rows
from vlrank.data.sources import Batch, RawOptions, interactions
from vlrank.data.splits import temporal_cuts
from vlrank.data.summary import describe
from vlrank.data.tables import disk_errors, file_sha256, read_parquet, write_parquet_atomic
from vlrank.data.text import item_text, templated_text
from vlrank.errors import UserError
from vlrank.storage import fetch, remove_tree
from vlrank.text_template import parse_template

# Keys that say where things are or how pictures are had, and so do not change the tables.
_NOT_OPTIONS = {"reviews", "meta", "out", "dataset_code", "release", "raw_dir", "download", "overwrite", "use_image"}
_NOT_OPTIONS |= {"retry_failed", "pictures", "ray"}

_ROWS_PER_SECOND = 100_000  # an order of magnitude for `dry_run`; bench/results/kcore.json has measurements

_EARLIEST_MS = 631_152_000_000  # 1990

_CLEAN_ITEMS = pa.schema(
    [
        ("source_id", pa.string()),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("description", pa.string()),
        ("image", pa.string()),
    ]
)


def run(config: PrepareConfig) -> Summary:
    """Prepare a dataset, or complete the pictures of one that was made with the same options from the same files.

    Raises:
        UserError: unusable input, nothing left after the filters, or another dataset in the way.
    """
    started = time.monotonic()
    config = _with_files(config)
    options, inputs, target = _options(config), _inputs(config), config.folder
    title = f"prepare: {', '.join(path.name for path in config.reviews)}"
    if (target / "manifest.json").is_file():
        dataset = Dataset.open(target)
        difference = _difference(dataset.manifest, options, inputs)
        if not difference:
            changed = _wants_pictures(config) and _complete_pictures(dataset, config)
            note = "pictures completed" if changed else "nothing to do, it exists"
            return describe(dataset, f"{title} ({note})", time.monotonic() - started)
        if not config.overwrite:
            raise UserError(
                f"dataset {target} was made differently: {difference}",
                "Choose another out=FOLDER, or replace it (with its captions and candidates) by overwrite=true.",
            )
    with DatasetWriter(target, overwrite=config.overwrite) as writer:
        dataset = _build(config, writer, options, inputs)
    remove_tree(pictures.work_folder(target))
    return describe(dataset, title, time.monotonic() - started)


def dry_run(config: PrepareConfig) -> Summary:
    """What `run` would read, with an estimate from the first block of each file; reads and writes nothing else."""
    if config.dataset_code is not None:
        try:
            reviews, meta = locate(config.dataset_code, config.release, config.raw_dir, allow_download=False)
        except UserError as error:
            if not config.download:
                raise
            return Summary("prepare (dry run)", {"would download first": error.remedy})
        config = config.model_copy(update={"reviews": (reviews,), "meta": (meta,)})
    lines: dict[str, object] = {}
    total = 0
    for role, paths in (("reviews", config.reviews), ("meta", config.meta)):
        rows = [estimate_rows(fetch(path)) for path in paths]
        total += sum(rows)
        lines[role] = ", ".join(f"{path} (about {n:,} rows)" for path, n in zip(paths, rows, strict=True)) or "none"
    options = {"min_rating": config.min_rating, "min_uc": config.min_uc, "min_sc": config.min_sc, "split": config.split}
    lines["filters"] = ", ".join(f"{key} {value}" for key, value in options.items())
    lines["pictures"] = "copied or downloaded" if _wants_pictures(config) else "no (--use_image)"
    seconds = max(1, round(total / _ROWS_PER_SECOND))
    lines["estimate"] = f"{seconds:,} s without pictures"
    state = "exists" if (config.folder / "manifest.json").is_file() else "new"
    counts = {"estimated_seconds": seconds}
    return Summary("prepare (dry run)", lines | {"dataset": f"{config.folder} ({state})"}, counts=counts)


def _with_files(config: PrepareConfig) -> PrepareConfig:
    """The config with the files of ``dataset_code`` in place of the code."""
    if config.dataset_code is None:
        return config
    reviews, meta = locate(config.dataset_code, config.release, config.raw_dir, allow_download=config.download)
    return config.model_copy(update={"reviews": (reviews,), "meta": (meta,)})


def _wants_pictures(config: PrepareConfig) -> bool:
    return config.use_image or config.retry_failed


def _options(config: PrepareConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_NOT_OPTIONS | ({"text"} if config.text is None else set()))


def _inputs(config: PrepareConfig) -> dict[str, list[dict[str, Any]]]:
    """Names, sizes and hashes of the input files: what a dataset is made from, independent of its place."""
    described: dict[str, list[dict[str, Any]]] = {"reviews": [], "meta": []}
    for role, paths in (("reviews", config.reviews), ("meta", config.meta)):
        for path in paths:
            if not path.is_file():
                raise UserError(f"input file {path} does not exist", f"Check --{role}.")
            local = fetch(path)
            size = local.stat().st_size
            described[role].append({"name": path.name, "bytes": size, "sha256": file_sha256(local)})
    return described


def _difference(manifest: Mapping[str, Any], options: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """What an existing dataset was made with instead, in words; empty if it is the same."""
    old, old_inputs = manifest.get("options", {}), manifest.get("inputs", {})
    old = {**{key: PrepareConfig.model_fields[key].default for key in options if key not in old}, **old}
    if isinstance(old.get("columns"), dict):
        old["columns"] = {name: old["columns"].get(name, unset) for name, unset in ColumnsConfig().model_dump().items()}
    parts = [
        f"{key} was {old.get(key)!r}, now {options.get(key)!r}"
        for key in sorted(set(old) | set(options))
        if old.get(key) != options.get(key)
    ]
    for role, files in inputs.items():
        if [file["sha256"] for file in old_inputs.get(role, [])] != [file["sha256"] for file in files]:
            parts.append(f"other {role} files")
    return "; ".join(parts)


# ---- building -------------------------------------------------------------------------------------------------------


class _Stages:
    """Counts before and after each filter, and what to say when nothing is left."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._losses: list[tuple[float, str, str]] = []  # share that was kept, why no more, remedy

    def add(self, name: str, data: Interactions, remedy: str = "Check the input.", reason: str | None = None) -> None:
        """Count what a filter left.

        Args:
            name: The filter.
            data: What it left.
            remedy: What to do when it left too little.
            reason: Why it left no more.

        Raises:
            UserError: nothing is left; where an earlier filter took more than half, its reason and remedy are named.
        """
        before = self.rows[-1] if self.rows else None
        self.rows.append({"stage": name, "users": data.n_users, "items": data.n_items, "interactions": len(data)})
        if not len(data):
            problem = f"no interactions are left after `{name}`"
            problem += f" ({before['interactions']:,} before)" if before else ""
            kept, earlier, its_remedy = min(self._losses, default=(1.0, "", ""))
            if kept < 0.5:
                raise UserError(f"{problem}: {earlier}", its_remedy)
            raise UserError(f"{problem}: {reason}" if reason else problem, remedy)
        if before:
            kept = min(self.rows[-1][what] / before[what] for what in ("items", "interactions"))
            left = f"`{name}` left {len(data):,} of {before['interactions']:,} interactions"
            self._losses.append((kept, reason or left, remedy))


def _textless(counts: Mapping[str, int], shown: int) -> tuple[str, str]:
    """(how many items have no text and why, what to do about it)."""
    absent, empty = counts.get("NoMetadata", 0), counts.get("NoTitle", 0)
    reason = f"{absent + empty:,} of {shown + absent + empty:,} items have no title, brand, categories or description"
    if absent:
        reason += f" ({absent:,} have no usable row in the metadata)"
    ids = "both files use the same ids (columns.item=NAME, columns.meta_item=NAME)"
    hint = ids if absent > empty else "columns.title names the titles"
    return reason, f"Check that {hint}, or keep items without a text, shown by their id: keep_untitled=true."


def _build(
    config: PrepareConfig, writer: DatasetWriter, options: Mapping[str, Any], inputs: Mapping[str, Any]
) -> Dataset:
    stages, times = _Stages(), _Times(config.impossible_times == "quarantine")
    data = _read_interactions(config, writer, stages, times)
    clean_items, shown, untitled, rejected = _read_items(config, writer, data)
    reason, remedy = _textless(rejected, len(shown))
    if not shown:
        example = data.item_names[0].as_py()
        raise UserError(
            f"no item of the reviews, such as {example!r}, has a title or another text in the metadata: {reason}",
            remedy,
        )
    data = _only_items(data, shown)
    stages.add("items with a title" + (" or another text" if untitled else ""), data, remedy, reason)
    del shown
    data = order(data)
    if not config.keep_duplicates:
        data = drop_duplicates(data)
        stages.add("first of repeated pairs", data)
    data = k_core(data, config.min_uc, config.min_sc)
    remedy = "Lower min_uc and min_sc, or check the input."
    stages.add(f"core: users >= {config.min_uc}, items >= {config.min_sc}", data, remedy)
    built = sequences(data)
    del data

    table = _items_table(clean_items, built, config)
    clean_items.unlink()
    wanted = table.filter(pl.col("image").is_not_null()).select("item_id", source="image")
    found = pictures.fetch(config.folder, wanted["source"].to_list(), config) if _wants_pictures(config) else {}
    pictures.adopt(found.values(), writer.pictures_home)
    pictures_table = pictures.pictures_table(wanted, found)
    write_parquet_atomic(pictures_table, writer.folder / "pictures.parquet", schemas.PICTURES)
    writer.add_quarantine("pictures", pictures.rejects(pictures_table))
    return writer.commit(
        items=pictures.place_in_items(table.drop("image"), pictures_table),
        sequences=_sequences_table(built),
        options=options,
        split=_split(config, built),
        extra={
            "inputs": inputs,
            "stages": stages.rows,
            "impossible_times": times.found(),
            "pictures": pictures.counts(pictures_table, asked=_wants_pictures(config)),
        },
    )


def _raw_options(config: PrepareConfig) -> RawOptions:
    return RawOptions(
        config.columns, config.timestamp_unit, config.max_line_mb << 20, config.allow_truncated, config.image_root
    )


class _Times:
    """Interactions whose time cannot be theirs: before anything was sold on the web, or after the day of the run."""

    def __init__(self, quarantine: bool) -> None:
        self._quarantine = quarantine
        self._latest_ms = round(time.time() * 1000) + 86_400_000
        self._early = self._late = 0
        self._example = ""

    def usable(self, batch: Batch, rejects: Rejects) -> np.ndarray:
        """Mask of the rows to keep; with ``quarantine`` the others go to ``rejects``."""
        early, late = batch.time_ms < _EARLIEST_MS, batch.time_ms > self._latest_ms
        wrong = early | late
        if not wrong.any():
            return ~wrong
        self._early += int(np.count_nonzero(early))
        self._late += int(np.count_nonzero(late))
        rows = np.flatnonzero(wrong)
        self._example = self._example or f"{_moment(batch, rows[0])} in {batch.keys(int(rows[0]))}"
        if not self._quarantine:
            return np.ones(len(wrong), bool)
        for row in rows:
            rejects.add(
                batch.keys(int(row)), "ImpossibleTime", f"{_moment(batch, row)} is before 1990 or in the future"
            )
        return ~wrong

    def found(self) -> dict[str, Any] | None:
        """For the manifest; None where every time is possible."""
        if not self._early + self._late:
            return None
        return {
            "before_1990": self._early,
            "in_the_future": self._late,
            "example": self._example,
            "quarantined": self._quarantine,
        }


def _moment(batch: Batch, row: int) -> str:
    return f"{np.datetime64(int(batch.time_ms[row]), 'ms')}".replace("T", " ").removesuffix(".000")


def _read_interactions(config: PrepareConfig, writer: DatasetWriter, stages: _Stages, times: _Times) -> Interactions:
    rejects = Rejects(lambda rows: writer.add_quarantine("reviews", rows))
    collector = Collector()
    with progress("read interactions", None) as bar:
        for path in config.reviews:
            rated = False
            for batch in interactions(fetch(path), _raw_options(config), rejects):
                missing = np.isnan(batch.rating)
                rated = rated or not missing.all()
                if config.min_rating > 0 and len(missing) and not rated:
                    raise UserError(
                        f"{path} has no ratings, but min_rating is {config.min_rating:g}",
                        "Name the column with columns.rating=NAME, or leave min_rating at 0.",
                    )
                keep = times.usable(batch, rejects)
                if config.min_rating > 0:
                    for row in np.flatnonzero(keep & missing):
                        rejects.add(batch.keys(int(row)), "MissingRating", "min_rating needs a rating")
                    keep &= ~missing
                collector.add(batch, None if keep.all() else keep)
                bar.advance(len(batch.rating), note=f"{rejects.total:,} bad" if rejects.total else None)
    rejects.flush()
    data = collector.finish()
    if not len(data):
        names = ", ".join(map(str, config.reviews))
        raise UserError(
            f"{names}: no usable interaction among {rejects.total:,} rows",
            f"The first of them: {rejects.first}" if rejects.first else "The input is empty: check the download.",
        )
    stages.add("read", data)
    if config.min_rating > 0:
        data = data.take(data.rating >= config.min_rating)
        stages.add(f"rating >= {config.min_rating:g}", data, "Lower min_rating, or check the input.")
    return data


def _only_items(data: Interactions, shown: set[str]) -> Interactions:
    names = data.item_names.to_pylist()
    keep = np.fromiter((name in shown for name in names), bool, len(names))[data.item]
    return data if keep.all() else data.take(keep)


def _read_items(
    config: PrepareConfig, writer: DatasetWriter, data: Interactions
) -> tuple[Path, set[str], int, Mapping[str, int]]:
    """One pass over the metadata: a temporary table of clean items, the ids that stay, how many of these have no title
    but another text, and bad rows by kind of error.

    Of several rows for one item the first with a title counts, and without one the first with another text; further
    titled ones that say something else are put aside.
    """
    if not config.meta and not config.keep_untitled:
        raise UserError(
            "no metadata was given, and items without a text are dropped",
            "Give the items' titles with --meta FILE, or keep_untitled=true to show items by their id.",
        )
    used = np.flatnonzero(np.bincount(data.item, minlength=len(data.item_names)))
    wanted = set(data.item_names.take(pa.array(used)).to_pylist())
    rejects = Rejects(lambda rows: writer.add_quarantine("metadata", rows))
    titled: dict[str, int] = {}  # id -> hash of the row that counts
    untitled: dict[str, tuple[str, Item]] = {}
    path = writer.folder / "clean_items.tmp"
    with _ItemSpill(path) as spill, progress("read metadata", len(wanted)) as bar:
        for file in config.meta:
            rows = items(fetch(file), wanted, _raw_options(config).for_metadata(), rejects, config.max_text_chars)
            number = 0
            for number, (key, item) in enumerate(rows, start=1):
                if number % 1000 == 0:
                    bar.advance(1000)
                if not item.title:
                    earlier = untitled.get(item.source_id)
                    if earlier is None or (item.has_text and not earlier[1].has_text):
                        untitled[item.source_id] = (key, item)
                elif item.source_id not in titled:
                    titled[item.source_id] = hash(item)
                    spill.add(item)
                elif titled[item.source_id] != hash(item):
                    message = f"another row of {item.source_id} came first and says something else"
                    rejects.add(key, "DuplicateMetadata", message)
            bar.advance(number % 1000)
        told: set[str] = set()  # without a title, by another text
        for source_id, (key, item) in untitled.items():
            if source_id in titled:
                continue
            if item.has_text:
                told.add(source_id)
            if item.has_text or config.keep_untitled:
                spill.add(item)
            else:
                rejects.add(key, "NoTitle", f"{source_id} has no title, brand, categories or description once cleaned")
    if not config.keep_untitled:
        for source_id in sorted(wanted - titled.keys() - untitled.keys()):
            rejects.add(source_id, "NoMetadata", "no usable metadata row has this id")
    rejects.flush()
    return path, wanted if config.keep_untitled else told | titled.keys(), len(told), rejects.counts


class _ItemSpill:
    """Clean items on their way to the disk, so that memory holds a portion of them only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Item] = []

    def __enter__(self) -> _ItemSpill:
        with disk_errors(self._path):
            self._writer = pq.ParquetWriter(self._path, _CLEAN_ITEMS, compression="zstd")
        return self

    def add(self, item: Item) -> None:
        self._rows.append(item)
        if len(self._rows) >= 20_000:
            self._flush()

    def _flush(self) -> None:
        columns = [[getattr(item, name) for item in self._rows] for name in _CLEAN_ITEMS.names]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _CLEAN_ITEMS, strict=True)]
        with disk_errors(self._path):
            self._writer.write_table(pa.table(arrays, schema=_CLEAN_ITEMS))
        self._rows = []

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._flush()
        with disk_errors(self._path):
            self._writer.close()


def _items_table(clean_items: Path, built: Sequences, config: PrepareConfig) -> pl.DataFrame:
    """The items of the dataset by id: `schemas.ITEMS` without ``image_path``, and ``image``, where the picture is."""
    ids = pl.DataFrame({"source_id": pl.Series(built.item_names)}).with_row_index("item_id", offset=1)
    table = ids.join(read_parquet(clean_items, _CLEAN_ITEMS), on="source_id", how="left", maintain_order="left")
    compose = partial(templated_text, parse_template(config.text)) if config.text else item_text
    fields = table.select("source_id", "title", "brand", "categories", "description").iter_rows()
    texts = [
        compose(title or "", brand, categories or [], description, config.max_text_chars) or source_id
        for source_id, title, brand, categories, description in fields
    ]
    return table.with_columns(
        pl.col("item_id").cast(pl.Int32),
        pl.col("categories").fill_null([]),
        pl.Series("text", texts, pl.String),
        image_url=pl.when(pl.col("image").str.contains("://", literal=True)).then("image"),
    )


def _sequences_table(built: Sequences) -> pa.Table:
    return pa.table(
        {
            "user_id": pa.array(np.arange(1, len(built.user_names) + 1, dtype=np.int32)),
            "source_user": built.user_names,
            "item_ids": built.item_ids,
            "timestamps": built.timestamps,
        }
    )


def _split(config: PrepareConfig, built: Sequences) -> dict[str, Any]:
    if config.split == "leave_one_out":
        return {"method": "leave_one_out"}
    cuts = None if config.val_from is None or config.test_from is None else (config.val_from, config.test_from)
    seconds = built.timestamps.flatten().to_numpy()
    val_from, test_from = temporal_cuts(seconds, config.val_fraction, config.test_fraction, cuts)
    return {"method": "temporal", "val_from": val_from, "test_from": test_from}


# ---- pictures of an existing dataset --------------------------------------------------------------------------------


def _complete_pictures(dataset: Dataset, config: PrepareConfig) -> bool:
    """Fetch what an existing dataset lacks; whether anything changed."""
    path = dataset.path / "pictures.parquet"
    old = read_parquet(path, schemas.PICTURES)
    found = pictures.fetch(dataset.path, old["source"].to_list(), config)
    new = pictures.pictures_table(old, found)
    counts = pictures.counts(new, asked=True)
    if not new.equals(old) or dataset.manifest.get("pictures") != counts:
        pictures.adopt(found.values(), dataset.path)
        write_parquet_atomic(new, path, schemas.PICTURES)
        dataset.add_quarantine("pictures", pictures.rejects(new), replace=True)
        dataset.update_items(pictures.place_in_items(dataset.items(), new), pictures=counts)
    remove_tree(pictures.work_folder(dataset.path))
    return not new.equals(old)

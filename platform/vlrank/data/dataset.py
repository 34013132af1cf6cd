"""A dataset folder, on a disk or in a bucket: its reader, and the writer that makes it appear whole or not at all.

DATASET/
  manifest.json            options, counts, split, schema version, content hashes
  items.parquet            schemas.ITEMS
  sequences.parquet        schemas.SEQUENCES
  images/ab/<sha256>.jpg   pictures, named by their content
  captions/*.parquet       schemas.GENERATED, as are semantic_summaries/*.parquet
  candidates/NAME.parquet  schemas.CANDIDATES
  retrievers/NAME/         weights of a trained retriever, safetensors
  quarantine/STAGE/*.parquet
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import polars as pl

from vlrank.config import Split, What
from vlrank.data import schemas
from vlrank.data.quarantine import read_quarantine, write_quarantine
from vlrank.data.splits import training_part, with_targets
from vlrank.data.tables import (
    Table,
    atomic_write_bytes,
    atomic_write_json,
    disk_errors,
    empty_frame,
    file_sha256,
    file_size,
    next_file,
    read_json,
    read_parquet,
    write_parquet_atomic,
)
from vlrank.errors import UserError
from vlrank.storage import (
    BucketPath,
    Held,
    Location,
    claim,
    each,
    listing,
    location,
    remove_tree,
    take_lock,
    upload_tree,
)

if TYPE_CHECKING:  # only the type
    from vlrank.data.items import ItemMeta

GENERATED_FOLDERS: dict[str, str] = {"caption": "captions", "semantic_summary": "semantic_summaries"}
_TABLES = {"items.parquet": schemas.ITEMS, "sequences.parquet": schemas.SEQUENCES}
_NAME = re.compile(r"[^\W_][\w.-]*")


def check_candidates_name(name: str) -> None:
    """Check a name for candidate lists.

    Raises:
        UserError: a name that is not a plain file name.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"candidates name {name!r} is not a plain name", "Use letters, digits, '.', '_' and '-'.")


class Dataset:
    """A prepared dataset, read lazily: every method reads its table when it is called.

    Attributes:
        path: The dataset folder; a `BucketPath` in a bucket.
        manifest: Content of ``manifest.json``.
    """

    def __init__(self, path: Location, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Location) -> Dataset:
        """Open a dataset, given by its folder or URL.

        Raises:
            UserError: not a dataset, incomplete, or of another schema version.
        """
        folder = location(path)
        quoted = shlex.quote(str(folder))
        if not (folder / "manifest.json").is_file():
            what = "is not a dataset (it has no manifest.json)" if folder.exists() else "does not exist"
            raise UserError(f"dataset {folder} {what}", f"Make it with `vlrank prepare ... --out {quoted}`.")
        manifest = read_json(folder / "manifest.json")
        version = manifest.get("schema_version")
        if version != schemas.SCHEMA_VERSION:
            raise UserError(
                f"dataset {folder} has schema version {version!r}, this vlrank reads {schemas.SCHEMA_VERSION}",
                "Prepare it again, or use the vlrank that made it.",
            )
        for name in _TABLES:
            if not (folder / name).is_file():
                raise UserError(
                    f"dataset {folder} lacks {name}",
                    f"Prepare it again: `vlrank prepare ... --out {quoted}`.",
                )
        return cls(folder, manifest)

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r})"

    # ---- tables -----------------------------------------------------------------------------------------------------

    def items(self) -> pl.DataFrame:
        """The items table (`schemas.ITEMS`), by ``item_id``."""
        return read_parquet(self.path / "items.parquet", schemas.ITEMS)

    def sequences(self) -> pl.DataFrame:
        """The sequences table (`schemas.SEQUENCES`), by ``user_id``."""
        return read_parquet(self.path / "sequences.parquet", schemas.SEQUENCES)

    def generated(self, what: What) -> pl.DataFrame | None:
        """Captions or summaries: one row per item, by ``item_id``; None when there are none.

        Where an item was done more than once the row of the file whose name sorts last counts (`add_generated` names
        files so that this is the newest).
        """
        files = listing(self.path / GENERATED_FOLDERS[what], "[!.]*.parquet")
        if not files:
            return None
        table = pl.concat(each(partial(read_parquet, schema=schemas.GENERATED), files))
        return table.unique("item_id", keep="last", maintain_order=True).sort("item_id")

    def add_generated(self, what: What, table: Table) -> Location:
        """Commit one shard of captions or summaries."""
        path = next_file(self.path / GENERATED_FOLDERS[what])
        write_parquet_atomic(table, path, schemas.GENERATED)
        return path

    def candidate_names(self) -> list[str]:
        """Names of the candidate tables that exist."""
        return [file.stem for file in listing(self.path / "candidates", "[!.]*.parquet")]

    def candidates(self, name: str) -> pl.DataFrame:
        """The candidate lists of that name (`schemas.CANDIDATES`).

        Raises:
            UserError: no such table.
        """
        if name not in self.candidate_names():
            existing = ", ".join(self.candidate_names()) or "none"
            raise UserError(
                f"dataset {self.path} has no candidates {name!r} (existing: {existing})",
                f"Make them with `vlrank retrieve {shlex.quote(str(self.path))} --name {name}`.",
            )
        return read_parquet(self.path / "candidates" / f"{name}.parquet", schemas.CANDIDATES)

    def write_candidates(self, name: str, table: Table) -> Location:
        """Store candidate lists as ``candidates/NAME.parquet``, replacing those of the same name.

        Raises:
            UserError: a name that is not a plain file name.
        """
        check_candidates_name(name)
        path = self.path / "candidates" / f"{name}.parquet"
        write_parquet_atomic(table, path, schemas.CANDIDATES)
        return path

    def quarantine(self, stage: str) -> pl.DataFrame:
        """Rows that a stage could not use (`schemas.QUARANTINE`), oldest first; empty when there are none."""
        return read_quarantine(self.path, stage)

    def quarantine_stages(self) -> list[str]:
        """Stages that have quarantined rows."""
        return sorted({file.parent.name for file in listing(self.path / "quarantine", "*/[!.]*.parquet")})

    def add_quarantine(self, stage: str, rows: Iterable[Mapping[str, Any]], *, replace: bool = False) -> None:
        """Put rows aside with their reason; see `write_quarantine`."""
        write_quarantine(self.path, stage, rows, replace=replace)

    # ---- views ------------------------------------------------------------------------------------------------------

    @property
    def n_items(self) -> int:
        """Number of items; ids are 1..n_items."""
        return int(self.manifest["counts"]["items"])

    @property
    def n_users(self) -> int:
        """Number of users; ids are 1..n_users."""
        return int(self.manifest["counts"]["users"])

    def train_sequences(self) -> dict[int, list[int]]:
        """user_id -> training items, oldest first; users without any are left out."""
        table = training_part(self.sequences(), self.manifest["split"])
        return dict(zip(table["user_id"].to_list(), table["items"].to_list(), strict=True))

    def histories(self, split: Split) -> dict[int, tuple[list[int], int]]:
        """user_id -> (history, oldest first; target); users without history or target are left out."""
        table = with_targets(self.sequences(), self.manifest["split"], split).select(
            "user_id",
            history=pl.col("item_ids").list.head("position"),
            target=pl.col("item_ids").list.get("position", null_on_oob=True),
        )
        users, histories, targets = (table[name].to_list() for name in ("user_id", "history", "target"))
        return {user: (history, target) for user, history, target in zip(users, histories, targets, strict=True)}

    def count_targets(self, split: Split) -> int:
        """The number of users of `histories`, without making the lists."""
        return len(with_targets(self.sequences(), self.manifest["split"], split))

    def item_meta(self) -> dict[int, ItemMeta]:
        """item_id -> ``{"text", "image_path", "caption", "semantic_summary", "popularity"}``; None where there is none.

        Pictures are named by their absolute path, or by their URL. Popularity counts training interactions.
        """
        items = self.items().select("item_id", "text", "image_path")
        for what, column in (("caption", "caption"), ("semantic_summary", "semantic_summary")):
            table = self.generated(what)  # type: ignore[arg-type]
            texts = empty_frame(schemas.GENERATED) if table is None else table
            items = items.join(
                texts.select("item_id", pl.col("text").alias(column)), on="item_id", how="left", maintain_order="left"
            )
        training = training_part(self.sequences(), self.manifest["split"])
        taken = training.select(item_id=pl.col("items").explode()).group_by("item_id").agg(popularity=pl.len())
        items = items.join(taken, on="item_id", how="left", maintain_order="left")
        root = self.path.resolve()
        return {
            item_id: {
                "text": text or "",
                "image_path": str(root / image) if image else None,
                "caption": caption or None,
                "semantic_summary": summary or None,
                "popularity": popularity or 0,
            }
            for item_id, text, image, caption, summary, popularity in items.iter_rows()
        }

    # ---- changes and checks -----------------------------------------------------------------------------------------

    def update_items(self, items: Table, **changes: Any) -> None:
        """Replace the items table (same ids) and merge ``changes`` into the manifest.

        Used when pictures arrive after the dataset was made. Killed between the two files, the same call repairs it.
        """
        write_parquet_atomic(items, self.path / "items.parquet", schemas.ITEMS)
        self.manifest = self.manifest | changes | {"files": _hashes(self.path)}
        atomic_write_json(self.path / "manifest.json", self.manifest)

    def verify(self) -> None:
        """Compare the tables' content with the hashes of the manifest.

        Raises:
            UserError: a table was changed or damaged.
        """
        for name, entry in self.manifest["files"].items():
            if file_sha256(self.path / name) != entry["sha256"]:
                raise UserError(
                    f"{self.path / name} differs from what manifest.json records",
                    "It was changed or damaged: prepare the dataset again.",
                )


def load_item_meta(path: str | Location) -> dict[int, ItemMeta]:
    """`Dataset.item_meta` of the dataset at ``path``.

    Raises:
        UserError: not a dataset.
    """
    return Dataset.open(path).item_meta()


def store_image(folder: Location, data: bytes, suffix: str, *, sync: bool = True) -> str:
    """Store an encoded picture under its content hash; the same picture is stored once.

    Args:
        folder: The dataset folder.
        data: The encoded picture.
        suffix: ``jpg`` or ``png``.
        sync: Wait until it is on the disk; a caller that stores many may sync once itself.

    Returns:
        The path relative to the folder, ``images/ab/<sha256>.jpg``.
    """
    digest = hashlib.sha256(data).hexdigest()
    relative = f"images/{digest[:2]}/{digest}.{suffix}"
    if not (folder / relative).exists():
        atomic_write_bytes(folder / relative, data, sync=sync)
    return relative


class DatasetWriter:
    """Builds a dataset in a hidden sibling folder and renames it into place on `commit`.

    Leaving the block without a commit (an error, Ctrl-C) removes the sibling. What a killed process left is removed by
    the next writer of the same path; two writers at once are refused.

    A dataset in a bucket is built in a temporary folder and uploaded on `commit`, the manifest last: until then readers
    find no dataset. Replacing another one takes its manifest away first.

        with DatasetWriter("data/toy") as writer:
            picture = writer.add_image(png_bytes, "png")
            dataset = writer.commit(items=..., sequences=..., options={...})

    Args:
        path: Where the dataset will be.
        overwrite: Replace an existing dataset (at the moment of the commit).

    Raises:
        UserError: the path exists and ``overwrite`` is off, or another process is writing it.
    """

    def __init__(self, path: str | Location, *, overwrite: bool = False) -> None:
        self.path = location(path)
        self._overwrite = overwrite
        self._held = ExitStack()
        self._appeared = False
        self.folder = Path(f"{self.path}.building")
        if isinstance(self.path, Path):
            self.folder = self.path.with_name(f".{self.path.name}.building")

    def __enter__(self) -> DatasetWriter:
        with self._held:  # released if a step below fails
            if isinstance(self.path, BucketPath):
                self._take_bucket(self.path)
            else:
                self._take_disk(self.path)
            self._held = self._held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def _refuse_existing(self) -> None:
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not (self.path / "manifest.json").is_file():
            raise UserError(f"{self.path} exists and is not a dataset", "Choose another folder.")
        if not self._overwrite:
            raise UserError(
                f"dataset {self.path} exists already", "Choose another folder, or replace it with overwrite=true."
            )

    def _take_disk(self, path: Path) -> None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if _replaced(path).exists() and not path.exists():
                os.rename(_replaced(path), path)  # an earlier writer was killed between the two renames
            self._refuse_existing()
            self.folder.mkdir(exist_ok=True)
            lock = os.open(self.folder, os.O_RDONLY)
            self._held.callback(os.close, lock)
            with suppress(OSError):  # a file system without locks: go on without the protection
                take_lock(
                    lock, UserError(f"another process is writing {path}", "Wait for it, or choose another folder.")
                )
            self._held.callback(self._drop_draft)
            for entry in self.folder.iterdir():  # left by a killed process
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _drop_draft(self) -> None:
        if not self._appeared:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _take_bucket(self, path: BucketPath) -> None:
        held = self._held.enter_context(claim(path))
        mark = path.with_name(f".{path.name}.building")
        # A marked folder without a manifest is the unread leftover of a killed writer.
        if (path / "manifest.json").is_file() or not mark.is_file():
            self._refuse_existing()
        mark.write_bytes(b"")
        self._held.callback(self._leave_bucket, path, mark, held)
        self._still_held = held
        self.folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="vlrank-")))

    def _leave_bucket(self, path: BucketPath, mark: BucketPath, held: Held) -> None:
        """After a commit, or after an error before it."""
        with suppress(UserError):  # a second error would hide the first; the next writer cleans up
            held()  # another writer may have taken the folder over
            if not (path / "manifest.json").is_file():
                remove_tree(path)
            mark.unlink(missing_ok=True)

    @property
    def pictures_home(self) -> Location:
        """Where fetched pictures are copied to directly, without passing through this machine."""
        return self.path if isinstance(self.path, BucketPath) else self.folder

    def add_image(self, data: bytes, suffix: str = "jpg") -> str:
        """Store an encoded picture; returns the value for ``items.image_path``."""
        return store_image(self.folder, data, suffix)

    def add_quarantine(self, stage: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put rows aside with their reason; see `write_quarantine`."""
        write_quarantine(self.folder, stage, rows)

    def commit(
        self,
        *,
        items: Table,
        sequences: Table,
        options: Mapping[str, Any],
        counts: Mapping[str, int] | None = None,
        split: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Dataset:
        """Write the tables and the manifest, and make the dataset appear.

        Args:
            items: Rows of `schemas.ITEMS`, ids 1..I in order.
            sequences: Rows of `schemas.SEQUENCES`, ids 1..U in order.
            options: What the dataset was made with; equal options and inputs mean an equal dataset.
            counts: More counts than those of users, items and interactions, which are added here.
            split: ``{"method": "leave_one_out"}`` (default) or ``{"method": "temporal", "val_from", "test_from"}``,
            cuts
                in the unit of the timestamps.
            extra: Further entries of the manifest.

        Raises:
            UserError: no space left, no permission.
            ValueError: ids that are not dense, unknown items, unordered times: a mistake of the caller.
        """
        write_parquet_atomic(items, self.folder / "items.parquet", schemas.ITEMS)
        write_parquet_atomic(sequences, self.folder / "sequences.parquet", schemas.SEQUENCES)
        sizes = _check_tables(self.folder)
        manifest = {
            "schema_version": schemas.SCHEMA_VERSION,
            "options": dict(options),
            "split": dict(split or {"method": "leave_one_out"}),
            "counts": {**sizes, **(counts or {})},
            **(extra or {}),
            "files": _hashes(self.folder),
        }
        atomic_write_json(self.folder / "manifest.json", manifest)
        with disk_errors(self.path):
            if isinstance(self.path, BucketPath):
                self._upload(self.path)
            else:
                self._appear(self.path)
        self._appeared = True
        self._held.close()
        return Dataset(self.path, manifest)

    def _appear(self, path: Path) -> None:
        if not path.exists() or not any(path.iterdir()):
            os.rename(self.folder, path)  # an empty folder may be renamed over
            return
        replaced = _replaced(path)
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(path, replaced)
        try:
            os.rename(self.folder, path)
        except BaseException:
            os.rename(replaced, path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    def _upload(self, path: BucketPath) -> None:
        """Replace what is there: the manifest goes first and comes last."""
        self._still_held()
        (path / "manifest.json").unlink(missing_ok=True)
        pictures = read_parquet(self.folder / "items.parquet", schemas.ITEMS)["image_path"].drop_nulls()
        remove_tree(path, keep=[path / picture for picture in pictures])
        upload_tree(self.folder, path, last="manifest.json")


def _replaced(path: Path) -> Path:
    """Where a dataset waits while the one that replaces it is renamed into place."""
    return path.with_name(f".{path.name}.replaced")


def write_dataset(
    path: str | Path,
    *,
    items: Table,
    sequences: Table,
    options: Mapping[str, Any],
    counts: Mapping[str, int] | None = None,
    split: Mapping[str, Any] | None = None,
    quarantine: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Write a dataset without pictures in one call; see `DatasetWriter` and its ``commit``."""
    with DatasetWriter(path, overwrite=overwrite) as writer:
        for stage, rows in (quarantine or {}).items():
            writer.add_quarantine(stage, rows)
        return writer.commit(items=items, sequences=sequences, options=options, counts=counts, split=split, extra=extra)


def _hashes(folder: Location) -> dict[str, dict[str, Any]]:
    return {name: {"sha256": file_sha256(folder / name), "bytes": file_size(folder / name)} for name in _TABLES}


def _check_tables(folder: Path) -> dict[str, int]:
    """Counts of users, items and interactions, after checking what every reader relies on."""
    item_ids = read_parquet(folder / "items.parquet", schemas.ITEMS)["item_id"]
    sequences = read_parquet(folder / "sequences.parquet", schemas.SEQUENCES)
    for name, ids in (("item_id", item_ids), ("user_id", sequences["user_id"])):
        if not (ids == pl.int_range(1, len(ids) + 1, dtype=pl.Int32, eager=True)).all():
            raise ValueError(f"{name} must run 1, 2, 3, ... without gaps")
    lengths = sequences.select(items=pl.col("item_ids").list.len(), times=pl.col("timestamps").list.len())
    if not (lengths["items"] == lengths["times"]).all() or (lengths["items"] == 0).any():
        raise ValueError("every sequence needs at least one item and as many timestamps as items")
    used = sequences["item_ids"].explode(empty_as_null=False)
    if len(used) and not used.is_between(1, len(item_ids)).all():
        raise ValueError(f"sequences hold item ids outside 1..{len(item_ids)}")
    times = sequences.select("user_id", "timestamps").explode("timestamps")
    later = times["timestamps"].diff() >= 0
    same_user = times["user_id"].diff() == 0
    if not (later | ~same_user).fill_null(True).all():
        raise ValueError("timestamps of a sequence must not decrease")
    return {"users": len(sequences), "items": len(item_ids), "interactions": len(used)}

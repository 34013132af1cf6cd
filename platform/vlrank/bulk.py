"""Shard-level commit, resume and quarantine on Ray Data: what generation and bulk reranking have in common.

**How it works.** Every row has a key and an ``input_hash`` (of everything its result depends on). A run

1. subtracts from the wanted rows those that are already committed *with the wanted hash* (and those in quarantine),
2. writes the rest as a plan, one row group per shard, from which Ray Data tasks read (the driver's memory and the
   object store do not grow with the input, and a lost node's shards can be read again),
3. runs the caller's stages on a `ray.data.Dataset` whose blocks are the shards,
4. cuts what comes out into shards again and commits each: the good rows as one Parquet file, the bad rows as one
   quarantine file, each written to a temporary name, synced and renamed. The file name is
   ``RUN-HASH OF THE ROWS' KEYS.parquet``,
5. when all is done, removes rows that a newer one, or a changed input, has made obsolete.

**Why each row comes out exactly once.** Readers and the next run see whole files or nothing. A task that Ray repeats
(worker or node lost) writes the same keys to the same name. A killed driver leaves committed shards alone: the next run
does not plan them. The good rows of a block are renamed before the bad ones, so a crash between the two costs a
repetition of the bad rows, and nothing is lost. Two runs on one folder at a time are refused; in a bucket, a
run whose claim another has taken over ends.

**Why not Ray Data's CheckpointConfig**, which does part of this: it knows ids but no input hashes, so a changed prompt
would be skipped as done; failed rows count as done forever; its ids live beside the output, so the two can disagree;
and it appends every row again when its folder is cleaned. The price of our way is the anti-join on the driver: beside
the wanted rows, the keys of those that are done (docs/scaling.md has the figures).

**Where.** ``folder`` and ``quarantine`` are what the driver and all workers share: a local disk on one machine, NFS or
Lustre on a cluster, or a bucket (`vlrank.storage`), where a shard is one upload instead of a rename. Folders need
atomic renames, which rules out most mounts of object stores: give a bucket by its URL.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from vlrank.console import progress
from vlrank.data.quarantine import bulk_rows
from vlrank.data.schemas import BULK_QUARANTINE
from vlrank.data.tables import atomic_path, disk_errors, empty_frame, parquet_file, write_parquet_atomic
from vlrank.engines.failures import explained
from vlrank.errors import UserError
from vlrank.runtime import quiet_data
from vlrank.storage import Held, Location, each, exclusive, listing

if TYPE_CHECKING:
    import ray.data

ERROR_TYPE, ERROR, RETRY, TOKENS_IN, TOKENS_OUT = "error_type", "error", "retry", "tokens_in", "tokens_out"
ENGINE_SECONDS = "engine_seconds"
"""Columns that stages may add to their rows, see `run_bulk`."""

_PLAN = ".plan-"

Stages = Callable[["ray.data.Dataset"], "ray.data.Dataset"]


@dataclass(frozen=True, slots=True)
class Shards:
    """A table that grows by shards, and its quarantine.

    Attributes:
        folder: Folder of the shards, ``*.parquet``; in the order of their names the newest row of a key is last.
        schema: Columns of a shard; holds ``key`` and ``input_hash`` (string).
        key: The column that identifies a row, an integer or a string.
        quarantine: Folder of the quarantine files.
        stage: The ``stage`` column of quarantined rows, e.g. ``"caption"``.
    """

    folder: Location
    schema: pa.Schema
    key: str
    quarantine: Location
    stage: str

    def committed(self) -> pl.DataFrame:
        """The newest row of every key, in the order of the keys."""
        return self._newest(self.folder, self.schema).sort(self.key)

    def quarantined(self) -> pl.DataFrame:
        """The newest quarantine row of every key: `schemas.BULK_QUARANTINE`, ``key`` as a string."""
        return self._newest(self.quarantine, BULK_QUARANTINE, "key").sort("key")

    def pending(self, wanted: pl.DataFrame, *, retry_failed: bool = False) -> pl.DataFrame:
        """The rows of ``wanted`` that are neither committed nor (without ``retry_failed``) in quarantine.

        Args:
            wanted: Columns ``key``, ``input_hash`` and whatever the stages need.
            retry_failed: Count quarantined rows as not done.
        """
        current = wanted.select(self.key, "input_hash")
        done = seen = current.clear().select(self.key)
        for _, rows in _newest_first(self.folder, [self.key, "input_hash"]):
            newest = _unseen(rows.unique(self.key, keep="last"), seen, self.key)
            seen = pl.concat([seen, newest.select(self.key)])
            done = pl.concat([done, _common(newest, current, self.key).select(self.key)])
        rows = wanted.join(done, on=self.key, how="anti", maintain_order="left")
        return rows if retry_failed else self.untried(rows)

    def untried(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows that are not in quarantine with their ``input_hash``."""
        failed = self.quarantined().select(pl.col("key").cast(rows.schema[self.key]).alias(self.key), "input_hash")
        return rows.join(failed, on=[self.key, "input_hash"], how="anti", maintain_order="left")

    def prune(self, wanted: pl.DataFrame, *, committed: int | None = None) -> None:
        """Remove rows of wanted keys that are not current any more; files without such rows are not touched.

        Obsolete is a committed row that has a newer one or whose hash is not the wanted one, and a quarantine row that
        has a newer one, whose hash is not the wanted one, or whose key has been committed since. Keys that are not in
        ``wanted`` (a run with a limit) are left alone.

        Args:
            wanted: As for `pending`.
            committed: How many of the wanted rows are committed, where that is known: if the shards hold no more rows
                than these, none of them is obsolete, and they need not be read.
        """
        current = wanted.select(self.key, "input_hash")
        if committed is None or committed != sum(each(_height, _files(self.folder))):
            self._prune(self.folder, self.key, current, current)
        tried = self.quarantined().select(pl.col("key").cast(current.schema[self.key]).alias(self.key))
        mine = current.join(tried, on=self.key, how="semi")
        done = self._newest(self.folder, self.schema, columns=[self.key, "input_hash"], only=mine)
        failed = mine.join(done, on=[self.key, "input_hash"], how="anti")
        as_text = [pl.col(self.key).cast(pl.String).alias("key"), "input_hash"]
        self._prune(self.quarantine, "key", failed.select(as_text), mine.select(as_text))

    def _prune(self, folder: Location, key: str, current: pl.DataFrame, known: pl.DataFrame) -> None:
        seen = current.clear().select(key)
        for files, rows in _newest_first(folder, [key, "input_hash"]):
            rows = rows.with_row_index("row")
            foreign = _unseen(rows, known.select(key), key)
            keep = pl.concat([part.select("row", "file", key) for part in (_common(rows, current, key), foreign)])
            keep = _unseen(keep.unique(key, keep="last"), seen, key).sort("row")
            seen = pl.concat([seen, keep.select(key)])
            for number, path in enumerate(files):
                start, end = (rows["file"].search_sorted(number, side) for side in ("left", "right"))
                low, high = (keep["file"].search_sorted(number, side) for side in ("left", "right"))
                if high - low == end - start:
                    continue
                shard = _read(path)
                kept = _frame(shard)[(keep["row"][low:high] - start).to_list()]
                if kept.is_empty():
                    path.unlink()
                else:
                    write_parquet_atomic(kept, path, shard.schema)

    def _newest(
        self,
        folder: Location,
        schema: pa.Schema,
        key: str | None = None,
        columns: Sequence[str] | None = None,
        only: pl.DataFrame | None = None,
    ) -> pl.DataFrame:
        columns = list(columns or schema.names)
        empty = empty_frame(schema).select(columns)
        # Rows that other code put into quarantine have no hash: diagonal.
        files = _files(folder) if only is None or not only.is_empty() else []
        parts = [_frame(part) for part in each(partial(_read, columns=columns), files)]
        parts = parts if only is None else [part.join(only, on=self.key, how="semi") for part in parts]
        return pl.concat([empty, *parts], how="diagonal").unique(key or self.key, keep="last", maintain_order=True)


@dataclass(frozen=True, slots=True)
class BulkResult:
    """What a run did.

    Attributes:
        done: Rows committed by this run.
        reused: Wanted rows that were there already.
        failed_before: Wanted rows left in quarantine by earlier runs and not tried again.
        quarantined: Rows that this run put into quarantine.
        retry: Keys of rows that the stages want to see again (column ``retry``); neither committed nor in quarantine.
        tokens_in, tokens_out: Sums of the columns of that name over all rows that came out.
        seconds: Wall-clock time of the run.
        working_seconds: The part after the engines had started, 0 where the stages do not report ``engine_seconds``.
    """

    done: int = 0
    reused: int = 0
    failed_before: int = 0
    quarantined: int = 0
    retry: tuple[Any, ...] = ()
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    working_seconds: float = 0.0

    def failure(self, shards: Shards) -> str | None:
        """What to tell the user where more wanted rows are in quarantine than not, with the most frequent reason."""
        bad = self.quarantined + self.failed_before
        if bad <= self.done + self.reused:
            return None
        rows = shards.quarantined()
        kind = rows["error_type"].value_counts(sort=True)["error_type"][0]
        key, message = rows.filter(pl.col("error_type") == kind).select("key", "message").row(0)
        return (
            f"{bad:,} of {bad + self.done + self.reused:,} rows are in quarantine ({shards.quarantine}), "
            f"most often for {kind}, e.g. {shards.key} {key}: {message[:300]!r}"
        )


_FIRST_ROWS = 200
"""A run whose first rows are all rejected for one reason ends after so many of them."""


def run_bulk(
    wanted: pl.DataFrame,
    stages: Stages,
    shards: Shards,
    *,
    shard_rows: int,
    description: str,
    retry_failed: bool = False,
    only: Collection[Any] | None = None,
    prune: bool = True,
) -> BulkResult:
    """Run ``stages`` on the wanted rows that are not there yet and commit what comes out, shard by shard.

    Ray has to be connected (`vlrank.runtime.ray_session`). The stages get a dataset with the columns of ``wanted`` and
    return one row per row, with the columns of ``shards.schema`` and any of these:

    - ``error_type`` and ``error`` (strings; null or "" on good rows): the row goes to the quarantine instead,
    - ``retry`` (bool): a bad row goes nowhere, its key is returned in `BulkResult.retry`,
    - ``tokens_in``, ``tokens_out`` (integers): counted in the progress and the result,
    - ``engine_seconds`` (float): from handing the row to an engine to its answer; tells work from starting up.

    Rows must never be filtered out: one that does not come out is neither done nor failed, and is planned again.

    Args:
        wanted: One row per key: ``shards.key``, ``input_hash`` and the stages' inputs.
        stages: From dataset to dataset; called on the driver, once, and only when something is pending.
        shards: Where the rows go.
        shard_rows: Rows committed at once: what a crash can cost, at most, per running task.
        description: Of the progress bar.
        retry_failed: Try quarantined rows again.
        only: Run just these keys, whether quarantined or not; for second passes over `BulkResult.retry`.
        prune: Remove obsolete rows at the end; False for all but the last of several passes.

    Raises:
        UserError: duplicate keys in ``wanted``; another run is writing to the folder; an engine that ran out of memory.
    """
    if wanted[shards.key].n_unique() != wanted.height:
        twice = wanted.filter(pl.col(shards.key).is_duplicated())[shards.key][0]
        raise ValueError(f"wanted rows repeat the key {shards.key}={twice}")
    start = time.monotonic()
    # Workers have another working directory.
    shards = replace(shards, folder=shards.folder.absolute(), quarantine=shards.quarantine.absolute())
    for folder in (shards.folder, shards.quarantine):
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    with exclusive(shards.folder) as held:
        _sweep(shards)
        with_failed = shards.pending(wanted, retry_failed=True)
        pending = with_failed if retry_failed or only is not None else shards.untried(with_failed)
        if only is not None:
            pending = pending.filter(pl.col(shards.key).is_in(list(only)))
        result = BulkResult(
            reused=wanted.height - with_failed.height, failed_before=with_failed.height - pending.height
        )
        if not pending.is_empty():
            # Rows that failed before may all fail again: that is no reason to leave the others untried.
            first_rows = _FirstRows(shards) if only is None and not retry_failed else None
            counts = _run(pending, stages, shards, shard_rows, description, held, first_rows)
            result = replace(result, **counts)
        if prune:
            held()
            shards.prune(wanted, committed=result.reused + result.done)
    return replace(result, seconds=time.monotonic() - start)


def _run(
    pending: pl.DataFrame,
    stages: Stages,
    shards: Shards,
    shard_rows: int,
    description: str,
    held: Held,
    first_rows: _FirstRows | None,
) -> dict[str, Any]:
    quiet_data().raise_original_map_exception = True  # a UserError of a stage has to arrive as one
    run = _next_run(shards)
    plan = shards.folder / f"{_PLAN}{run}"
    n_shards = _write_plan(pending, plan, shard_rows)
    commit = partial(_commit, shards=shards, run=run)
    try:
        dataset = _pipeline(plan, n_shards, stages, commit, shard_rows)
        tally = _Tally(shards.stage)
        with progress(description, pending.height) as bar:
            for row in dataset.iter_rows():
                held()
                if first_rows:
                    first_rows.see(row)
                tally.add(row)
                bar.advance(int(row["rows"]), note=tally.rates())
    except Exception as error:
        held()  # a run that has taken over removes this one's plan, whatever error that makes
        raise explained(error) from error
    finally:
        plan.unlink(missing_ok=True)
    return tally.result()


def _pipeline(
    plan: Location, n_shards: int, stages: Stages, commit: Callable[[pa.Table], pa.Table], shard_rows: int
) -> ray.data.Dataset:
    """From the plan through the stages to commits; one row with counts for each committed shard."""
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    # A quarter of a CPU keeps the first and the last step apart from the stages (Ray Data fuses steps of equal
    # resources, and a fused commit would see the stages' batches, not the shards) and leaves the CPUs to the stages.
    light: dict[str, Any] = {"num_cpus": 0.25, "batch_size": None}
    dataset = ray.data.range(n_shards, override_num_blocks=n_shards)
    dataset = dataset.map_batches(partial(_read_shards, plan=plan), batch_format="pyarrow", **light)
    with warnings.catch_warnings():
        # Ray 2.60 announces that 2.64 will not take max_restarts any more, and has no other bound yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = stages(dataset)
    # Stages that carry pictures return small blocks (Ray Data cuts them at 128 MB on the way), and batches may join
    # some: make them shards again.
    dataset = dataset.repartition(target_num_rows_per_block=shard_rows, strict=True)
    return dataset.map_batches(commit, batch_format="pyarrow", zero_copy_batch=True, **light)


class _Tally:
    """Counts of what a run has committed so far."""

    def __init__(self, stage: str) -> None:
        from ray.util.metrics import Counter

        self.stage = stage
        self.counts: dict[str, int] = dict.fromkeys(("done", "quarantined", TOKENS_IN, TOKENS_OUT), 0)
        self.retry: list[Any] = []
        self.start, self.working_since = time.monotonic(), math.inf
        # For dashboards (ray_vlrank_rows_total in Prometheus): what share of the rows goes to quarantine.
        self.exported: Any = Counter("vlrank_rows", "Rows that came out of a bulk stage", tag_keys=("stage", "outcome"))

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in the counts of a shard."""
        for name in self.counts:
            self.counts[name] += int(row[name])
        for outcome in ("done", "quarantined"):
            if row[outcome]:
                self.exported.inc(int(row[outcome]), tags={"stage": self.stage, "outcome": outcome})
        if row[ENGINE_SECONDS] > 0:
            self.working_since = min(self.working_since, time.monotonic() - row[ENGINE_SECONDS])
        self.retry.extend(pa.ipc.open_stream(row["retry"]).read_all()["key"].to_pylist())

    def rates(self) -> str:
        """Items and tokens per second, for the progress bar."""
        seconds = time.monotonic() - self.start
        items, tokens = self.counts["done"] + self.counts["quarantined"] + len(self.retry), self.counts[TOKENS_OUT]
        return f"{items / seconds:,.1f} items/s" + (f", {tokens / seconds:,.0f} tokens/s" if tokens else "")

    def result(self) -> dict[str, Any]:
        """Fields of `BulkResult`."""
        working = time.monotonic() - self.working_since if self.working_since < math.inf else 0.0
        return {**self.counts, "retry": tuple(self.retry), "working_seconds": working}


class _FirstRows:
    """Ends a run in which nothing works: an empty generator, a folder without its pictures."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.rejected, self.reason = shards, 0, ""

    def see(self, block: Mapping[str, Any]) -> None:
        """Take note of one block's counts.

        Raises:
            UserError: enough rows have come out, all of them rejected for one reason.
        """
        if self.rejected < 0:
            return
        self.reason = self.reason or block["reason"]
        if not block["reason"] or block["reason"] != self.reason:
            self.rejected = -1  # something works, or fails in another way
            return
        self.rejected += int(block["rows"])
        if self.rejected >= _FIRST_ROWS:
            raise UserError(
                f"the first {self.rejected:,} rows were all rejected for {self.reason}, e.g. {block['example']}",
                "The run ends here. Look at the model, the prompt and the data; then run the same command again with "
                f"--retry_failed. Quarantined rows are in {self.shards.quarantine}.",
            )


def _read_shards(batch: pa.Table, plan: Location) -> Iterator[pa.Table]:
    with pq.ParquetFile(plan.open("rb")) as file:
        for number in batch["id"].to_pylist():
            yield file.read_row_group(number)


def _commit(block: pa.Table, shards: Shards, run: str) -> pa.Table:
    """Write one block; returns one row of counts. Runs in a worker."""
    table = _frame(block)
    if table.is_empty():
        return pa.table({"rows": pa.array([], pa.int64())})
    for name, dtype in (
        (ERROR_TYPE, pl.String),
        (ERROR, pl.String),
        (RETRY, pl.Boolean),
        (TOKENS_IN, pl.Int64),
        (TOKENS_OUT, pl.Int64),
        (ENGINE_SECONDS, pl.Float64),
    ):
        column = pl.col(name).cast(dtype) if name in table.columns else pl.lit(None, dtype).alias(name)
        table = table.with_columns(column)
    failed = (table[ERROR_TYPE].fill_null("") != "") | (table[ERROR].fill_null("") != "")
    again = failed & table[RETRY].fill_null(False)
    good, bad, retry = table.filter(~failed), table.filter(failed & ~again), table.filter(again)

    names = sorted(f"{key}\t{input_hash}" for key, input_hash in table.select(shards.key, "input_hash").iter_rows())
    name = f"{run}-{hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:16]}.parquet"
    # The last attempt at a block wins, whole: where it has no good (bad) rows, an earlier attempt's file goes.
    _write_or_remove(good.select(shards.schema.names), shards.folder / name, shards.schema)
    rows = bulk_rows(bad, shards.key, shards.stage)
    _write_or_remove(rows, shards.quarantine / name, BULK_QUARANTINE)

    reasons = table[ERROR_TYPE].fill_null("Error").unique().to_list() if failed.all() else []
    key, message = table.select(shards.key, pl.col(ERROR).fill_null("")).row(0)

    buffer = pa.BufferOutputStream()
    keys = _arrow(retry.select(pl.col(shards.key).alias("key")))
    with pa.ipc.new_stream(buffer, keys.schema) as stream:
        stream.write_table(keys)
    return pa.table(
        {
            "rows": [table.height],
            "done": [good.height],
            "quarantined": [bad.height],
            "reason": [reasons[0] if len(reasons) == 1 else ""],
            "example": [f"{shards.key} {key}: {message[:300]!r}"],
            TOKENS_IN: [table[TOKENS_IN].fill_null(0).sum()],
            TOKENS_OUT: [table[TOKENS_OUT].fill_null(0).sum()],
            ENGINE_SECONDS: [float(table[ENGINE_SECONDS].fill_null(0).max())],  # type: ignore[arg-type]
            "retry": pa.array([buffer.getvalue().to_pybytes()], pa.binary()),
        }
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def _files(folder: Location) -> list[Location]:
    return listing(folder, "[!.]*.parquet")


def _read(path: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard, or those of the columns that it has."""
    with _damage_named(path):
        file = parquet_file(path)
        return file.read(columns and [name for name in columns if name in file.schema_arrow.names])


@contextmanager
def _damage_named(path: Location) -> Iterator[None]:
    """Arrow's errors do not say which of thousands of files is damaged."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system: not allowed, no such file
        raise UserError(
            f"{path} is damaged: {error}", "Delete it and run the same command again: only its rows are made again."
        ) from error


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _height(path: Location) -> int:
    """Rows of a shard, from its end alone."""
    with _damage_named(path), path.open("rb") as file:
        return int(pq.read_metadata(file).num_rows)


_ROWS_AT_ONCE = 1_000_000
"""Rows of shards in the driver's memory at a time, some 100 bytes each; of earlier groups it keeps the keys."""


def _newest_first(folder: Location, columns: Sequence[str]) -> Iterator[tuple[list[Location], pl.DataFrame]]:
    """Groups of shards, the newest first: files, oldest first, and their rows with ``file``, the place of each."""
    newest_first = _files(folder)[::-1]
    files, parts, height = list[Location](), list[pl.DataFrame](), 0
    for path, shard in zip(newest_first, each(partial(_read, columns=columns), newest_first), strict=True):
        files.append(path)
        parts.append(_frame(shard))
        height += parts[-1].height
        if height >= _ROWS_AT_ONCE or path is newest_first[-1]:
            numbered = [part.with_columns(file=number) for number, part in enumerate(reversed(parts))]
            yield files[::-1], pl.concat(numbered, how="diagonal")
            files, parts, height = [], [], 0


def _unseen(rows: pl.DataFrame, seen: pl.DataFrame, key: str) -> pl.DataFrame:
    """The rows whose key is not in ``seen``; the first join keeps the second one's table as small as ``rows``."""
    return rows.join(seen.join(rows, on=key, how="semi"), on=key, how="anti", maintain_order="left")


def _common(rows: pl.DataFrame, wanted: pl.DataFrame, key: str) -> pl.DataFrame:
    """The rows that ``wanted`` has with the same hash."""
    same_key = wanted.join(rows, on=key, how="semi")
    return rows.join(same_key, on=[key, "input_hash"], how="semi", maintain_order="left")


def _next_run(shards: Shards) -> str:
    """Eight digits, larger than in any file name: the order of names is the order of runs, whatever the clocks say."""
    runs = [path.name.split("-")[0] for folder in (shards.folder, shards.quarantine) for path in _files(folder)]
    return f"{max((int(run) for run in runs if run.isdigit()), default=0) + 1:08d}"


def _write_or_remove(table: pl.DataFrame, path: Location, schema: pa.Schema) -> None:
    if table.is_empty():
        path.unlink(missing_ok=True)
    else:
        write_parquet_atomic(table, path, schema)


def _write_plan(rows: pl.DataFrame, path: Location, shard_rows: int) -> int:
    """Write the pending rows, one row group per shard; returns the number of shards."""
    with atomic_path(path) as temporary:
        pq.write_table(_arrow(rows), temporary, row_group_size=shard_rows, compression="zstd")
        return int(pq.read_metadata(temporary).num_row_groups)


def _arrow(table: pl.DataFrame) -> pa.Table:
    return table.to_arrow(compat_level=pl.CompatLevel.oldest())


def _sweep(shards: Shards) -> None:
    """Remove what a killed run left half-written; only called while no other run is active."""
    for folder in (shards.folder, shards.quarantine):
        for path in folder.iterdir():
            if path.name.startswith(_PLAN) or (path.name.startswith(".") and path.name.endswith(".tmp")):
                path.unlink(missing_ok=True)

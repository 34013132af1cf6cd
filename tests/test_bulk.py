"""Commit, resume and quarantine: a user would lose rows, work that was paid for, or the reason why a row is missing."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrank import bulk, storage
from vlrank.bulk import BulkResult, Shards, run_bulk
from vlrank.config import RayConfig
from vlrank.data.schemas import GENERATED
from vlrank.data.tables import write_parquet_atomic
from vlrank.engines.failures import explained
from vlrank.engines.resources import RESTARTS
from vlrank.errors import UserError
from vlrank.runtime import ray_session


def make_shards(folder: Path) -> Shards:
    return Shards(folder / "captions", GENERATED, "item_id", folder / "quarantine" / "caption", "caption")


def make_wanted(hashes: dict[int, str]) -> pl.DataFrame:
    keys = pl.Series("item_id", list(hashes), dtype=pl.Int32)
    return pl.DataFrame({"item_id": keys, "input_hash": pl.Series(list(hashes.values()), dtype=pl.String)})


def block(rows: dict[int, str], bad: set[int] = frozenset(), again: set[int] = frozenset()) -> pa.Table:  # type: ignore[assignment]
    """What stages return for rows {key: hash}."""
    return pa.table(
        {
            "item_id": pa.array(list(rows), pa.int32()),
            "text": [f"text of {value}" for value in rows.values()],
            "model": ["m"] * len(rows),
            "prompt_id": ["caption/v1"] * len(rows),
            "input_hash": list(rows.values()),
            "error_type": ["Broken" if key in bad else "" for key in rows],
            "error": ["does not work" if key in bad else "" for key in rows],
            "retry": [key in again for key in rows],
        }
    )


def contents(folder: Path) -> dict[str, str]:
    files = folder.rglob("*.parquet")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# ---- without Ray: the protocol on disk -------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """One simulated run: what changed since, which keys fail, and which blocks a crash leaves undone or half done."""

    changed: set[int]
    bad: set[int]
    fates: list[str]  # per block: done, twice (a repeated task), half (crash between the two renames), lost
    retry_failed: bool


KEYS = range(1, 13)
runs = st.builds(
    Run,
    changed=st.sets(st.sampled_from(KEYS)),
    bad=st.sets(st.sampled_from(KEYS)),
    fates=st.lists(st.sampled_from(["done", "twice", "half", "lost"]), min_size=4, max_size=4),
    retry_failed=st.booleans(),
)


@settings(max_examples=30)
@given(st.lists(runs, min_size=1, max_size=4), st.sampled_from([1, 4, 1000]))
def test_whatever_crashes_every_key_ends_up_once_and_current(history: list[Run], rows_at_once: int) -> None:
    """Crashed runs followed by one that finishes leave each wanted key once: committed, or quarantined."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "_ROWS_AT_ONCE", rows_at_once)  # shards looked at one by one, by groups, all together
        shards = make_shards(Path(name))
        for folder in (shards.folder, shards.quarantine):
            folder.mkdir(parents=True)
        versions = dict.fromkeys(KEYS, 0)
        for number, run in enumerate([*history, Run(set(), {1, 5}, ["done"] * 4, retry_failed=True)]):
            last = number == len(history)
            versions |= dict.fromkeys(run.changed, number)
            wanted = make_wanted({key: f"{key}v{version}" for key, version in versions.items()})
            todo = shards.pending(wanted, retry_failed=run.retry_failed)
            for start, fate in zip(range(0, len(KEYS), 3), run.fates, strict=True):
                rows = dict(todo[start : start + 3].select("item_id", "input_hash").iter_rows())
                if fate == "lost" or not rows:
                    continue
                table, file_number = block(rows, run.bad), bulk._next_run(shards) if start == 0 else f"{number + 1:08d}"
                bulk._commit(table, shards, file_number)
                if fate == "twice":
                    bulk._commit(table, shards, file_number)
                if fate == "half":  # the good rows were renamed, the crash came before the bad ones
                    newest = max(
                        shards.quarantine.glob("*.parquet"), key=lambda file: file.stat().st_mtime_ns, default=None
                    )
                    if newest is not None and newest.name.startswith(file_number):
                        newest.unlink()
            if last:
                missing = shards.pending(wanted, retry_failed=True)
                shards.prune(wanted, committed=wanted.height - missing.height)
        committed = dict(shards.committed().select("item_id", "input_hash").iter_rows())
        quarantined = {int(key) for key in shards.quarantined()["key"]}
        current = {key: f"{key}v{version}" for key, version in versions.items()}
        assert committed | {key: current[key] for key in quarantined} == current
        assert not committed.keys() & quarantined
        on_disk = pl.concat([pl.read_parquet(file) for file in shards.folder.glob("*.parquet")])
        assert on_disk["item_id"].is_unique().all(), "after a complete run the files hold each key once"


@pytest.mark.parametrize(("first", "second"), [(set(), {1, 2}), ({1, 2}, set()), ({1}, {2})])
def test_of_two_attempts_at_a_block_the_last_one_wins_whole(tmp_path: Path, first: set[int], second: set[int]) -> None:
    """A block that Ray repeats may come out otherwise: no row may then be committed and in quarantine, or twice."""
    shards = make_shards(tmp_path)
    for bad in (first, second):
        bulk._commit(block({1: "a", 2: "b"}, bad), shards, "00000001")
    assert set(shards.committed()["item_id"]) == {1, 2} - second
    assert {int(key) for key in shards.quarantined()["key"]} == second
    left = len(list(tmp_path.rglob("*.parquet")))
    assert left == bool({1, 2} - second) + bool(second), "no file of the first attempt is left"


def test_a_limit_leaves_the_other_items_alone(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    bulk._commit(block({1: "a", 2: "b", 3: "c"}, bad={3}), shards, "00000001")
    before = contents(tmp_path)
    shards.prune(make_wanted({1: "a"}))
    assert contents(tmp_path) == before


def test_pruning_removes_what_is_outdated_and_touches_no_other_file(tmp_path: Path) -> None:
    """A caption of an older prompt must not stay visible when the new prompt failed on the item."""
    shards = make_shards(tmp_path)
    bulk._commit(block({1: "a1", 2: "b1"}), shards, "00000001")
    bulk._commit(block({3: "c1", 4: "d1"}), shards, "00000001")
    bulk._commit(block({1: "a2", 2: "b2"}, bad={2}), shards, "00000002")
    untouched = {name: digest for name, digest in contents(shards.folder).items() if name.startswith("00000001")}
    shards.prune(make_wanted({1: "a2", 2: "b2", 3: "c1", 4: "d1"}))
    assert dict(shards.committed().select("item_id", "input_hash").iter_rows()) == {1: "a2", 3: "c1", 4: "d1"}
    assert shards.quarantined()["key"].to_list() == ["2"]
    kept = contents(shards.folder)
    assert sum(kept.get(name) == digest for name, digest in untouched.items()) == 1


def test_a_committed_row_leaves_the_quarantine(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    bulk._commit(block({1: "a", 2: "b"}, bad={1, 2}), shards, "00000001")
    bulk._commit(block({1: "a"}), shards, "00000002")
    shards.prune(make_wanted({1: "a", 2: "b"}))
    assert shards.quarantined()["key"].to_list() == ["2"]


def test_quarantine_of_other_writers_has_no_hash_and_does_not_hide_an_item(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    row = {"key": "1", "stage": "caption", "error_type": "E", "message": "m"}
    write_parquet_atomic([row], shards.quarantine / "00000001-x.parquet", bulk.BULK_QUARANTINE.remove(4))
    assert shards.pending(make_wanted({1: "a"})).height == 1
    assert shards.quarantined()["input_hash"].to_list() == [None]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "ValueError: Free memory on device cuda:0 (3/80 GiB) is less than desired GPU memory utilization (0.9",
    ],
)
def test_out_of_memory_names_the_settings_to_lower(message: str) -> None:
    try:
        try:
            raise ValueError(message)
        except ValueError as inner:
            raise RuntimeError("The actor died because of an error raised in its creation task") from inner
    except RuntimeError as outer:
        said = explained(outer)
    assert isinstance(said, UserError)
    assert "engine.max_model_len" in str(said)
    assert message[:40] in said.problem


def test_an_error_in_an_engines_constructor_is_one_message() -> None:
    """Ray hands it on as the text of a traceback, 15 kB of it with vLLM."""
    trace = "The actor died because of an error raised in its creation task, ray::MapWorker()\n  File x, line 1\n"
    own = explained(RuntimeError(f"{trace}vlrank.errors.UserError: adapter x has rank 600\nUse transformers."))
    assert isinstance(own, UserError)
    assert (own.problem, own.remedy) == ("adapter x has rank 600", "Use transformers.")
    other = explained(RuntimeError(f"{trace}ValueError: no such architecture"))
    assert isinstance(other, UserError)
    assert other.problem == "an engine did not start: ValueError: no such architecture"


def test_advice_that_mentions_memory_is_not_taken_for_a_full_gpu() -> None:
    error = ValueError("Use the largest batch size that doesn't result in your GPU device running out of memory.")
    assert explained(error) is error


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # Lustre without its option flock and NFS without lockd say so with a bare error number.
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    with pytest.raises(UserError, match="without locks") as caught, storage.exclusive(tmp_path):
        pass
    assert str(tmp_path) in caught.value.problem
    assert "mounted with locks" in str(caught.value.remedy)


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_a_damaged_shard_is_named_and_deleting_it_costs_its_rows_only(tmp_path: Path, keep: int) -> None:
    shards = make_shards(tmp_path)
    bulk._commit(block({1: "a", 2: "b"}), shards, "00000001")
    bulk._commit(block({3: "c"}), shards, "00000002")
    wanted = make_wanted({1: "a", 2: "b", 3: "c"})
    damaged = next(shards.folder.glob("00000001-*"))
    damaged.write_bytes(damaged.read_bytes()[:keep])
    for work in (shards.pending, shards.prune, lambda _: bulk._height(damaged)):
        with pytest.raises(UserError, match="is damaged") as caught:
            work(wanted)
        assert str(damaged) in caught.value.problem
        assert "Delete it and run the same command again" in str(caught.value.remedy)
    damaged.unlink()
    assert shards.pending(wanted)["item_id"].to_list() == [1, 2]


def test_bytes_that_do_not_decompress_are_damage_too(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    bulk._commit(block({1: "a"}), shards, "00000001")
    (shard,) = shards.folder.glob("*.parquet")
    content = shard.read_bytes()
    shard.write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    with pytest.raises(UserError, match="is damaged"):
        shards.committed()


class InThisProcess:
    """As much of a Ray dataset as a run without stages needs."""

    def __init__(self, blocks: list[pa.Table]) -> None:
        self.blocks = blocks

    def map_batches(self, work: Any, **_: Any) -> InThisProcess:
        results = [work(one) for one in self.blocks]
        return InThisProcess([part for r in results for part in ([r] if isinstance(r, pa.Table) else r)])

    def repartition(self, **_: Any) -> InThisProcess:
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for one in self.blocks:
            yield from one.to_pylist()


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_ends_when_another_one_has_taken_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    # Two runs on one folder remove each other's plans and rows. An error that comes of it is not the news either.
    import ray.data

    @contextmanager
    def taken_over(folder: Path) -> Iterator[Any]:
        def held() -> None:
            raise UserError(f"another run has taken over {folder}")

        yield held

    def stages(dataset: Any) -> Any:
        if broken:
            raise FileNotFoundError(".plan-00000001")
        return dataset.map_batches(lambda one: block(dict(zip(*one.to_pydict().values(), strict=True))))

    blocks = [pa.table({"id": [0]})]
    monkeypatch.setattr(ray.data, "range", lambda *_, **__: InThisProcess(blocks))
    monkeypatch.setattr(bulk, "exclusive", taken_over)
    with pytest.raises(UserError, match="another run has taken over"):
        run_bulk(make_wanted({1: "a", 2: "b"}), stages, make_shards(tmp_path), shard_rows=10, description="first")


def run_blocks(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    blocks: list[pa.Table],
    earlier: list[pa.Table] | None = None,
    **options: Any,
) -> BulkResult:
    """A run of one shard per block, in this process; rows of ``earlier`` blocks are wanted too."""
    import ray.data

    monkeypatch.setattr(ray.data, "range", lambda *_, **__: InThisProcess([pa.table({"id": [0]})]))
    wanted = {key: f"h{key}" for one in [*blocks, *(earlier or [])] for key in one["item_id"].to_pylist()}
    return run_bulk(
        make_wanted(wanted), lambda _: InThisProcess(blocks), make_shards(tmp_path), description="t", **options
    )


def rejected(keys: range, kind: str, again: bool) -> pa.Table:
    rows = block({key: f"h{key}" for key in keys}, set(keys), set(keys) if again else set())
    kinds = pa.array([kind] * len(keys))
    return rows.set_column(rows.column_names.index("error_type"), "error_type", kinds)


@pytest.mark.parametrize("again", [True, False])
def test_a_run_in_which_nothing_works_ends_after_its_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """A generator that says nothing was asked for every item of the catalogue, twice."""
    empty = [rejected(range(n, n + 100), "Quality.empty", again) for n in (1, 101, 201)]
    with pytest.raises(UserError, match=r"first 200 rows were all rejected for Quality\.empty, e\.g\. item_id 101"):
        run_blocks(monkeypatch, tmp_path, empty, shard_rows=100)
    assert make_shards(tmp_path).quarantined().is_empty() is again


def test_rows_rejected_for_several_reasons_or_once_before_do_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [rejected(range(1, 151), "A", False), rejected(range(151, 301), "B", False)]
    result = run_blocks(monkeypatch, tmp_path / "two", two, shard_rows=150)
    assert result.quarantined == 300
    late = [block({1: "h1"}), rejected(range(2, 302), "A", False)]
    assert run_blocks(monkeypatch, tmp_path / "late", late, shard_rows=300).quarantined == 300
    again = [rejected(range(1, 301), "A", False)]
    for options in ({"retry_failed": True}, {"only": range(1, 301)}):
        assert run_blocks(monkeypatch, tmp_path / "again", again, shard_rows=300, **options).quarantined == 300


def test_a_run_that_puts_most_rows_into_quarantine_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(tmp_path)
    blocks = [block({1: "h1", 2: "h2"}), rejected(range(3, 5), "PictureMissing", False)]
    half = run_blocks(monkeypatch, tmp_path, blocks, shard_rows=10)
    assert half.failure(shards) is None
    one = [rejected(range(5, 6), "PictureMissing", False)]
    most = run_blocks(monkeypatch, tmp_path, one, earlier=blocks, shard_rows=10)
    assert (most.reused, most.failed_before, most.quarantined) == (2, 2, 1)
    assert "3 of 5 rows are in quarantine" in str(most.failure(shards))
    assert "PictureMissing, e.g. item_id 3" in str(most.failure(shards))


# ---- on Ray ----------------------------------------------------------------------------------------------------------


class EngineThatCannotStart:
    """Its constructor fails, as with a checkpoint that the engine does not know."""

    def __init__(self) -> None:
        raise ValueError("no such architecture")


class EngineThatAlwaysDies:
    """What an engine does that runs out of memory at the first long prompt."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        os._exit(1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules
    with ray_session(RayConfig(num_cpus=8)):
        yield


def stages(dataset: Any, bad: tuple[int, ...] = (), again: tuple[int, ...] = ()) -> Any:
    def answer(batch: dict[str, Any]) -> pa.Table:
        rows = dict(zip(batch["item_id"].tolist(), batch["input_hash"].tolist(), strict=True))
        table = block(rows, set(bad) | set(again), set(again))
        return table.append_column("tokens_out", pa.array([3] * len(rows)))

    return dataset.map_batches(answer, batch_size=7)


def texts(shards: Shards) -> dict[int, str]:
    return dict(shards.committed().select("item_id", "text").iter_rows())


@pytest.mark.stack
def test_a_second_run_has_nothing_to_do_and_a_changed_input_redoes_just_its_rows(cluster: None, tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    hashes = {key: f"h{key}" for key in range(1, 101)}
    first = run_bulk(make_wanted(hashes), lambda d: stages(d, bad=(10, 20)), shards, shard_rows=20, description="first")
    assert (first.done, first.quarantined, first.reused, first.tokens_out) == (98, 2, 0, 300)
    assert texts(shards) == {key: f"text of h{key}" for key in hashes if key not in (10, 20)}
    files = list(shards.folder.glob("*.parquet"))
    assert len(files) == 5, "one file per shard of 20 rows, although the stage works in batches of 7"

    before = contents(tmp_path)
    second = run_bulk(make_wanted(hashes), _must_not_run, shards, shard_rows=20, description="second")
    assert (second.done, second.reused, second.failed_before) == (0, 98, 2)
    assert contents(tmp_path) == before

    hashes |= {1: "new", 20: "new"}
    third = run_bulk(make_wanted(hashes), stages, shards, shard_rows=20, description="third")
    assert (third.done, third.reused, third.failed_before) == (2, 97, 1)
    assert texts(shards)[1] == "text of new"
    after = contents(shards.folder)
    assert sum(after.get(name) == digest for name, digest in before.items()) == 4, "four shards hold no changed row"

    fourth = run_bulk(make_wanted(hashes), stages, shards, shard_rows=20, description="fourth", retry_failed=True)
    assert (fourth.done, fourth.reused, fourth.failed_before) == (1, 99, 0)
    assert texts(shards).keys() == hashes.keys()
    assert shards.quarantined().is_empty()


def _must_not_run(dataset: Any) -> Any:
    raise AssertionError("nothing is pending: no engine may start")


@pytest.mark.stack
def test_rejected_rows_come_back_for_another_try_and_are_nowhere_meanwhile(cluster: None, tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    wanted = make_wanted({key: f"h{key}" for key in range(1, 31)})
    first = run_bulk(wanted, lambda d: stages(d, again=(3, 30)), shards, shard_rows=10, description="first")
    assert (first.done, first.quarantined, sorted(first.retry)) == (28, 0, [3, 30])
    assert not {3, 30} & texts(shards).keys()
    second = run_bulk(
        wanted, lambda d: stages(d, bad=(30,)), shards, shard_rows=10, description="second", only=first.retry
    )
    assert (second.done, second.quarantined) == (1, 1)
    assert shards.quarantined()["key"].to_list() == ["30"]
    assert len(texts(shards)) == 29


@pytest.mark.stack
def test_an_error_in_a_stage_reaches_the_user_as_it_is(cluster: None, tmp_path: Path) -> None:
    def fail(batch: dict[str, Any]) -> dict[str, Any]:
        raise UserError("model folder x has no tokenizer", "Save it there.")

    with pytest.raises(UserError, match="has no tokenizer"):
        run_bulk(
            make_wanted({1: "a"}),
            lambda d: d.map_batches(fail),
            make_shards(tmp_path),
            shard_rows=10,
            description="fails",
        )
    assert not list(tmp_path.rglob("*.parquet"))
    assert not list(tmp_path.rglob(".plan*"))


@pytest.mark.stack
def test_two_runs_on_one_folder_are_refused(cluster: None, tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    shards.folder.mkdir(parents=True)
    with storage.exclusive(shards.folder), pytest.raises(UserError, match="another run"):
        run_bulk(make_wanted({1: "a"}), stages, shards, shard_rows=10, description="second")


@pytest.mark.stack
def test_nothing_wanted_is_a_run_without_work(cluster: None, tmp_path: Path) -> None:
    result = run_bulk(make_wanted({}), _must_not_run, make_shards(tmp_path), shard_rows=10, description="nothing")
    assert dataclasses.replace(result, seconds=0.0) == BulkResult()


@pytest.mark.stack
def test_an_engine_that_always_dies_ends_the_run_with_its_remedy(cluster: None, tmp_path: Path) -> None:
    def stages(dataset: Any) -> Any:
        from ray.data import ActorPoolStrategy

        pool = ActorPoolStrategy(size=1)
        return dataset.map_batches(EngineThatAlwaysDies, compute=pool, num_cpus=1, max_restarts=RESTARTS)

    with pytest.raises(UserError, match=r"engine's process died .* times"):
        run_bulk(make_wanted({1: "a", 2: "b"}), stages, make_shards(tmp_path), shard_rows=1, description="dying")


@pytest.mark.stack
def test_an_engine_that_cannot_start_says_why(cluster: None, tmp_path: Path) -> None:
    def stages(dataset: Any) -> Any:
        from ray.data import ActorPoolStrategy

        pool = ActorPoolStrategy(size=1)
        return dataset.map_batches(EngineThatCannotStart, compute=pool, num_cpus=1, max_restarts=RESTARTS)

    with pytest.raises(Exception, match="no such architecture"):
        run_bulk(make_wanted({1: "a"}), stages, make_shards(tmp_path), shard_rows=1, description="starting")

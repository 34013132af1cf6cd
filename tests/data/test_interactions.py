"""k-core, order, ids and splits against plain Python, for any input."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrank.data import interactions as module
from vlrank.data.interactions import Interactions, concat, drop_duplicates, k_core, order, sequences
from vlrank.data.sources import Batch
from vlrank.data.splits import temporal_cuts
from vlrank.errors import UserError

Row = tuple[str, str, int]
rows_of = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("stuvwxyz"), st.integers(-5, 5)), min_size=0, max_size=60
)


def table(rows: list[Row], batch_rows: int = 7) -> Interactions:
    batches = []
    for start in range(0, len(rows), batch_rows):
        part = rows[start : start + batch_rows]
        users, items, times = zip(*part, strict=True)
        arrays = pa.array(users, pa.string()), pa.array(items, pa.string())
        ms = np.array(times, np.int64) * 1000
        batches.append(Batch(*arrays, ms, np.full(len(part), np.nan, np.float32), str))
    return concat(batches)


def rows(data: Interactions) -> list[Row]:
    users, items = data.user_names.to_pylist(), data.item_names.to_pylist()
    return [(users[u], items[i], int(t) // 1000) for u, i, t in zip(data.user, data.item, data.time_ms, strict=True)]


def plain_core(data: list[Row], min_uc: int, min_sc: int) -> list[Row]:
    while True:
        users, items = Counter(r[0] for r in data), Counter(r[1] for r in data)
        kept = [r for r in data if users[r[0]] >= min_uc and items[r[1]] >= min_sc]
        if kept == data:
            return data
        data = kept


@given(rows_of)
def test_collecting_batches_keeps_every_row_in_order(data: list[Row]) -> None:
    assert rows(table(data)) == data


@settings(deadline=None)
@given(rows_of, st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.0, 0.05, 2.0]))
def test_k_core_is_the_plain_fixpoint(data: list[Row], min_uc: int, min_sc: int, share: float) -> None:
    """With share 2 the node-by-node part does all the work after the first scan, with 0 the scans do."""
    before = module._SCAN_SHARE
    module._SCAN_SHARE = share
    try:
        core = rows(k_core(table(data), min_uc, min_sc))
    finally:
        module._SCAN_SHARE = before
    assert core == plain_core(data, min_uc, min_sc)
    assert rows(k_core(table(core), min_uc, min_sc)) == core  # a second time changes nothing


def test_a_chain_that_falls_one_by_one_is_followed_to_its_end() -> None:
    """User k shares item k with user k+1: from the loose end, each removal takes one more, 5,000 times."""
    chain = [row for k in range(5_000) for row in ((f"u{k}", f"i{k}", 0), (f"u{k + 1}", f"i{k}", 0))]
    square = [(user, item, 0) for user in ("x", "y") for item in ("p", "q")]
    assert rows(k_core(table(chain + square, 1 << 20), 2, 2)) == square


@given(rows_of)
def test_order_is_by_user_and_time_with_ties_in_file_order(data: list[Row]) -> None:
    ordered = rows(order(table(data)))
    assert Counter(ordered) == Counter(data)
    for user in {r[0] for r in data}:
        assert [r for r in ordered if r[0] == user] == sorted((r for r in data if r[0] == user), key=lambda r: r[2])


@given(rows_of)
def test_of_repeated_pairs_the_earliest_stays(data: list[Row]) -> None:
    ordered = order(table(data))
    first: dict[tuple[str, str], Row] = {}
    for row in rows(ordered):
        first.setdefault(row[:2], row)
    assert rows(drop_duplicates(ordered)) == list(first.values())


@settings(max_examples=40)
@given(rows_of.filter(bool), st.randoms(use_true_random=False))
def test_ids_are_dense_and_do_not_depend_on_the_order_of_the_input(data: list[Row], random: object) -> None:
    built = sequences(order(table(data)))
    assert built.user_names.to_pylist() == sorted({r[0] for r in data})
    assert built.item_names.to_pylist() == sorted({r[1] for r in data})
    names = built.item_names.to_pylist()
    for user, ids, times in zip(built.user_names, built.item_ids, built.timestamps, strict=True):
        mine = sorted((r for r in data if r[0] == user.as_py()), key=lambda r: r[2])
        assert [names[i - 1] for i in ids.as_py()] == [r[1] for r in mine]
        assert times.as_py() == [r[2] for r in mine]
    shuffled = list(data)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = sequences(order(table(shuffled)))
    assert again.user_names.equals(built.user_names)
    assert again.item_names.equals(built.item_names)


@given(st.lists(st.integers(0, 100), min_size=3, max_size=80), st.floats(0.05, 0.4), st.floats(0.05, 0.4))
def test_temporal_cuts_leave_no_training_interaction_at_or_after_the_first_later_one(
    times: list[int], val: float, test: float
) -> None:
    try:
        val_from, test_from = temporal_cuts(np.array(times), val, test)
    except UserError:  # all at one moment, for example
        return
    train = [t for t in times if t < val_from]
    held_out = [t for t in times if t >= val_from]
    assert train
    assert max(train) < min(held_out)
    assert any(val_from <= t < test_from for t in times)
    assert any(t >= test_from for t in times)


def test_given_cuts_that_leave_a_period_empty_are_refused() -> None:
    with pytest.raises(UserError, match="no interactions for test"):
        temporal_cuts(np.arange(10), 0.1, 0.1, (5, 50))
    assert temporal_cuts(np.arange(10), 0.1, 0.1, (5, 7)) == (5, 7)


def test_nothing_in_nothing_out() -> None:
    empty = table([])
    assert len(k_core(drop_duplicates(order(empty)), 5, 5)) == 0


def test_ids_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    program = """
from vlrank.config import PrepareConfig
from vlrank.data.prepare import run
import sys
run(PrepareConfig(reviews=[sys.argv[1]], out=sys.argv[2], keep_untitled=True, min_uc=1, min_sc=1))
"""
    lines = [f"u{k % 7},i{k % 5}é,{k}" for k in range(60)]
    (tmp_path / "r.csv").write_text("\n".join(["user,item,timestamp", *lines]))
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program, str(tmp_path / "r.csv"), str(tmp_path / seed)]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    for name in ("items.parquet", "sequences.parquet", "manifest.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()

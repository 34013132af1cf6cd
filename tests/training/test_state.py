"""The state that a run resumes from: whole at any moment, whoever is killed, and readable by other numbers of ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import Program
from vlrank.training.state import (
    Draft,
    StateReader,
    drop_tensors,
    flatten,
    place_to_write,
    restore,
    saved_states,
    write_draft,
)


def draft(place: Path, step: int, values: dict[str, Any], *, world: int = 1, finished: bool = False) -> Draft:
    tree, tensors = flatten(values)
    facts = {"step": step, "world": world, "write": f"write-{step}", "finished": finished}
    return Draft(place, {**facts, "tree": dict(tree["dict"]), "trainer": {"global_step": step}}, tensors)


def save(out: Path, step: int, committed: int, **more: Any) -> None:
    place = place_to_write(out, committed)
    assert isinstance(place, Path)
    write_draft(draft(place, step, {"weights": {"a": torch.full((3,), float(step))}}, **more), 0)


def steps(out: Path, committed: int = 10**9) -> list[int]:
    return [state.step for state in saved_states(out, committed)]


def test_nested_values_come_back_as_they_were() -> None:
    shared = torch.arange(4, dtype=torch.uint8)
    value = {
        "state": {0: {"exp_avg": torch.randn(2, 3), "qmap": shared}, 1: {"step": torch.tensor(3.0), "qmap": shared}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1], "fused": None}],
    }
    tree, tensors = flatten(value)
    assert len(tensors) == 3, "a tensor that occurs twice is kept once"
    got = restore(tree, lambda name, _: tensors[name])
    assert got["param_groups"] == value["param_groups"]
    torch.testing.assert_close(got["state"], value["state"])
    with pytest.raises(TypeError, match="/state is a set"):
        flatten({"state": {1, 2}})


def test_states_take_turns_and_the_newest_recorded_one_is_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path, 10, committed=0)
    save(tmp_path, 20, committed=10)
    assert steps(tmp_path) == [20, 10]
    save(tmp_path, 30, committed=20)
    assert steps(tmp_path) == [30, 20]
    save(tmp_path, 40, committed=20)  # 30 was written, and its evaluation not recorded yet
    assert steps(tmp_path) == [40, 20]
    assert steps(tmp_path, committed=20) == [20], "an evaluation that nobody recorded is made again"


@pytest.mark.parametrize("damage", ["no json", "cut tensors", "no tensors", "another write"])
def test_a_state_that_is_not_whole_is_none(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 10, committed=0)
    place = tmp_path / "resume" / "b"
    for rank in (0, 1):
        write_draft(draft(place, 20, {"weights": {"a": torch.ones(3)}}, world=2), rank)
    assert steps(tmp_path) == [20, 10]
    facts, tensors = place / "rank-1.json", place / "rank-1.0.safetensors"
    if damage == "no json":
        facts.unlink()
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    else:
        facts.write_text(facts.read_text().replace("write-20", "write-before"))
    assert steps(tmp_path) == [10]


def test_a_run_that_is_over_keeps_the_note_alone(tmp_path: Path) -> None:
    save(tmp_path, 10, committed=0)
    write_draft(draft(tmp_path / "resume" / "b", 20, {}, finished=True), 0)
    drop_tensors(tmp_path)
    (state,) = saved_states(tmp_path, 20)
    assert (state.step, state.finished) == (20, True)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_read_by_another_number_of_ranks(tmp_path: Path, world: int) -> None:
    """`workers` may change between a run and its continuation. FSDP2 shares tensors as `torch.chunk` does."""
    whole = torch.arange(14.0).reshape(7, 2)
    for rank, share in enumerate(whole.chunk(3)):
        made = draft(tmp_path / "resume" / "a", 10, {"weights": {"a": share}, "rng": {"seed": rank}}, world=3)
        made.facts["tree"]["weights"]["dict"][0][1]["sharded"] = True
        write_draft(made, rank)
    (state,) = saved_states(tmp_path, 10)
    readers = [StateReader(state, rank, world) for rank in range(world)]
    torch.testing.assert_close(torch.cat([reader.part("weights")["a"] for reader in readers]), whole)
    assert [reader.own("rng") for reader in readers] == [{"seed": rank} if rank < 3 else None for rank in range(world)]


WRITER = """
import sys, torch
from pathlib import Path
from tests.training.test_state import draft, write_draft, place_to_write
out, committed = Path(sys.argv[1]), 0
for step in range(1, 100_000):
    write_draft(draft(place_to_write(out, committed), step, {"weights": {"a": torch.full((2**22,), float(step))}}), 0)
    committed = step
    (out / f"committed-{min(step, 3)}").touch()
"""


def test_a_killed_writer_leaves_a_whole_state(tmp_path: Path) -> None:
    """kill -9 while 16 MB are half written, three times, each time behind what the last one left."""
    for _ in range(3):
        for mark in tmp_path.glob("committed-*"):
            mark.unlink()
        writer = Program(sys.executable, "-c", WRITER, tmp_path)
        try:
            writer.wait_for((tmp_path / "committed-3").exists, "three states")
            writer.wait_for(lambda: list(tmp_path.rglob(".rank-0.*.tmp")), "a state that is being written")
        finally:
            writer.kill()
        state = saved_states(tmp_path, 10**9)[0]
        assert (StateReader(state, 0, 1).part("weights")["a"] == state.step).all()

"""A checkpoint that was cut off costs the steps since the one before, and not the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlrank.training.checkpoints import SNAPSHOT, set_torn_aside, torn_file


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"weight": torch.arange(100.0), "bias": torch.zeros(3)}, folder / "model.safetensors")
    torch.save({"moments": torch.arange(10.0)}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", [cut, lambda file: file.write_bytes(b"")], ids=["cut", "empty"])
def test_a_cut_file_is_found(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = checkpoint(tmp_path / "checkpoint-3")
    assert torn_file(folder) is None
    damage(folder / name)
    assert torn_file(folder) == folder / name


def test_an_empty_folder_is_torn(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    assert torn_file(tmp_path / "checkpoint-3") == tmp_path / "checkpoint-3"


def run_folder(home: Path, steps: list[int]) -> Path:
    """As Ray Train leaves it; its list is sorted by score, here the older the better."""
    results: list[dict[str, Any]] = []
    for step in steps:
        checkpoint(home / f"checkpoint-{step}")
        metrics = {"step": step, "selection": -step}
        results.insert(0, {"version": 0, "checkpoint_dir_name": f"checkpoint-{step}", "metrics": metrics})
    names = [result["checkpoint_dir_name"] for result in results]
    state = {
        "ray_version": "2.60.0",
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(steps)))[::-1],
        "latest_checkpoint_result": results[0],
        "pending_training_results": [results[0]],
        "pending_validation_specs": [False],
        "current_report_index": len(steps),
        "validated_checkpoint_dir_names": names,
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    (home / SNAPSHOT).write_text(json.dumps(state))
    return home


def listed(home: Path) -> dict[str, Any]:
    return dict(json.loads((home / SNAPSHOT).read_text()))


def test_the_newest_whole_checkpoint_is_the_latest(tmp_path: Path) -> None:
    home = run_folder(tmp_path / "qwen3vl_rerank", [10, 20, 30, 40])
    cut(home / "checkpoint-40" / "model.safetensors")
    cut(home / "checkpoint-30" / "optimizer.pt")
    assert set_torn_aside(home) == ({"checkpoint-40": "model.safetensors", "checkpoint-30": "optimizer.pt"}, 20)
    state = listed(home)
    assert state["latest_checkpoint_result"]["checkpoint_dir_name"] == "checkpoint-20"
    assert [each["checkpoint_dir_name"] for each in state["checkpoint_results"]] == ["checkpoint-20", "checkpoint-10"]
    assert state["checkpoint_report_indices"] == [1, 0]
    assert state["validated_checkpoint_dir_names"] == ["checkpoint-20", "checkpoint-10"]
    assert state["pending_training_results"] == state["pending_validation_specs"] == []
    folders = sorted(path.name for path in home.iterdir() if path.is_dir())
    assert folders == ["checkpoint-10", "checkpoint-20", "torn-checkpoint-30", "torn-checkpoint-40"]
    assert set_torn_aside(home) == ({}, 20)


def test_without_a_whole_checkpoint_a_run_begins_again(tmp_path: Path) -> None:
    home = run_folder(tmp_path / "qwen3vl_rerank", [10])
    cut(home / "checkpoint-10" / "trainer_state.json")
    assert set_torn_aside(home) == ({"checkpoint-10": "trainer_state.json"}, 0)
    assert listed(home)["latest_checkpoint_result"] is None
    assert set_torn_aside(tmp_path / "new") == ({}, 0)

"""A checkpoint that was cut off costs the steps since the one before, and not the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlrank.errors import UserError
from vlrank.training.checkpoints import SNAPSHOT, mend_run, torn_file
from vlrank.training.history import committed_step, read_history, write_history


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"weight": torch.arange(100.0), "bias": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [cut, lambda file: file.write_bytes(b"")], ids=["cut", "empty"])
def test_a_cut_file_is_found(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = checkpoint(tmp_path / "checkpoint-3")
    assert torn_file(folder) is None
    damage(folder / name)
    assert torn_file(folder) == folder / name


def test_an_empty_folder_is_torn(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    assert torn_file(tmp_path / "checkpoint-3") == tmp_path / "checkpoint-3"


def run_folder(out: Path, values: dict[int, float]) -> Path:
    """A run with a kept checkpoint at each of these steps -> selection value; Ray Train's list is sorted by value."""
    home = out / "qwen3vl_rerank"
    results: list[dict[str, Any]] = []
    lines = []
    for step, value in values.items():
        name = f"checkpoint-{step}"
        checkpoint(home / name)
        metrics = {"step": step, "epoch": step // 10, "metric": "recall@10", "value": value, "selection": value}
        lines.append({**metrics, "checkpoint": f"{home.name}/{name}"})
        results.append({"version": 0, "checkpoint_dir_name": name, "metrics": metrics})
    write_history(out, lines)
    latest = results[-1]
    results.sort(key=lambda result: result["metrics"]["value"])
    names = [result["checkpoint_dir_name"] for result in results]
    state = {
        "ray_version": "2.60.0",
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(names))),
        "latest_checkpoint_result": latest,
        "pending_training_results": [latest],
        "pending_validation_specs": [False],
        "current_report_index": len(names),
        "validated_checkpoint_dir_names": names,
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    (home / SNAPSHOT).write_text(json.dumps(state))
    return home


def listed(home: Path) -> dict[str, Any]:
    return dict(json.loads((home / SNAPSHOT).read_text()))


def test_torn_newest_checkpoints_are_set_aside_and_their_evaluations_forgotten(tmp_path: Path) -> None:
    home = run_folder(tmp_path, {10: 0.4, 20: 0.3, 30: 0.2, 40: 0.1})
    cut(home / "checkpoint-40" / "model.safetensors")
    cut(home / "checkpoint-30" / "config.json")
    assert mend_run(tmp_path, home) == {"checkpoint-40": "model.safetensors", "checkpoint-30": "config.json"}
    assert [line["step"] for line in read_history(tmp_path)] == [10, 20]
    state = listed(home)
    assert state["latest_checkpoint_result"]["checkpoint_dir_name"] == "checkpoint-20"
    assert [each["checkpoint_dir_name"] for each in state["checkpoint_results"]] == ["checkpoint-20", "checkpoint-10"]
    assert state["checkpoint_report_indices"] == [2, 3]
    assert state["validated_checkpoint_dir_names"] == ["checkpoint-20", "checkpoint-10"]
    assert state["pending_training_results"] == state["pending_validation_specs"] == []
    folders = sorted(path.name for path in home.iterdir() if path.is_dir())
    assert folders == ["checkpoint-10", "checkpoint-20", "torn-checkpoint-30", "torn-checkpoint-40"]
    assert mend_run(tmp_path, home) == {}


def test_a_torn_best_checkpoint_is_made_again(tmp_path: Path) -> None:
    """Else the run would end hours later, with a best model that cannot be read."""
    home = run_folder(tmp_path, {10: 0.2, 20: 0.4, 30: 0.3})
    cut(home / "checkpoint-20" / "model.safetensors")
    assert mend_run(tmp_path, home) == {"checkpoint-20": "model.safetensors"}
    assert committed_step(tmp_path) == 10
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 10


def test_a_checkpoint_that_a_killed_driver_has_not_recorded_is_made_again(tmp_path: Path) -> None:
    home = run_folder(tmp_path, {10: 0.2, 20: 0.4})
    write_history(tmp_path, read_history(tmp_path)[:1])
    assert mend_run(tmp_path, home) == {}
    assert [each["checkpoint_dir_name"] for each in listed(home)["checkpoint_results"]] == ["checkpoint-10"]


def test_without_a_whole_checkpoint_a_run_begins_again(tmp_path: Path) -> None:
    home = run_folder(tmp_path, {10: 0.2})
    cut(home / "checkpoint-10" / "config.json")
    assert mend_run(tmp_path, home) == {"checkpoint-10": "config.json"}
    assert listed(home)["latest_checkpoint_result"] is None
    assert committed_step(tmp_path) == 0
    assert not (tmp_path / "best.json").exists()
    assert mend_run(tmp_path / "new", tmp_path / "new" / "qwen3vl_rerank") == {}


def test_pickled_states_of_former_runs_are_refused(tmp_path: Path) -> None:
    home = run_folder(tmp_path, {10: 0.2})
    (home / "checkpoint-10" / "optimizer.pt").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="former format"):
        mend_run(tmp_path, home)

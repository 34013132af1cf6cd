"""What a run will write is said before it begins, and a disk without room for it is refused."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlrank.config import TrainConfig
from vlrank.errors import UserError
from vlrank.training import disk
from vlrank.training.disk import check_disk, disk_plan
from vlrank.training.model import Base
from vlrank.training.run import dry_run

Make = Callable[..., TrainConfig]
VL_2B = 2.13e9


def plan_of(config: TrainConfig, method: Any = "full", trained: float = VL_2B) -> disk.DiskPlan:
    base = Base("m", "vision", method, unsloth=False, in_4bit=False)
    return disk_plan(config, base, weights=VL_2B, trained=trained, steps=1000)


@pytest.mark.parametrize(
    ("changes", "checkpoint", "state"),
    [
        ({"optim": "adamw"}, 4.26, 25.56),  # float32 masters and two moments
        ({"optim": "adamw_8bit"}, 4.26, 8.63),  # the weights, two bytes of moments and their scales
        ({"optim": "adamw_bf16"}, 4.26, 12.78),
        ({"optim": "adamw", "parallel": "fsdp2", "workers": 2}, 4.26, 25.56),
        ({"optim": "adamw", "dtype": "float32"}, 8.52, 25.56),
    ],
)
def test_sizes_in_closed_form(settings: Make, changes: dict[str, Any], checkpoint: float, state: float) -> None:
    plan = plan_of(settings("caption", method="full", epochs=10, **{"dtype": "bfloat16", **changes}))
    assert plan.checkpoint / 1e9 == pytest.approx(checkpoint, abs=0.01)
    assert plan.state / 1e9 == pytest.approx(state, abs=0.01)
    assert (plan.checkpoints, plan.kept, plan.minutes) == (10, 3, 10)
    assert plan.peak == 4 * plan.checkpoint + 2 * plan.state


def test_adapters_are_small_and_saved_whole_at_every_evaluation(settings: Make) -> None:
    plan = plan_of(settings("caption", dtype="bfloat16", epochs=10, eval_steps=50), "lora", 8.7e6)
    assert plan.checkpoint == 2 * 8.7e6
    assert (plan.checkpoints, plan.minutes) == (20, 0)
    assert "to resume from, 104 MB after every evaluation" in str(plan)


def test_a_run_need_not_be_resumable(settings: Make) -> None:
    plan = plan_of(
        settings("caption", method="full", optim="adamw", dtype="bfloat16", resume_minutes="never", epochs=3)
    )
    assert plan.peak == 3 * plan.checkpoint
    assert "to resume" not in str(plan)
    with pytest.raises(UserError, match="resume_minutes"):
        settings("caption", resume_minutes=-1)


def test_a_disk_that_is_too_small_is_refused_and_what_the_run_has_written_counts(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("caption", method="full", optim="adamw", dtype="float32", epochs=2)
    config.out.mkdir()
    model, base = torch.nn.Linear(1000, 1000), Base("m", "vision", "full", unsloth=False, in_4bit=False)
    plan = disk_plan(config, base, weights=1001e3, trained=1001e3, steps=10)
    assert plan.peak == 2 * plan.checkpoint + plan.state  # two epochs: no state after the last one
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(plan.peak - 1000))
    with pytest.raises(UserError, match="lower save_total_limit"):
        check_disk(config, base, model, 10)
    (config.out / "resume").mkdir()
    (config.out / "resume" / "state").write_bytes(bytes(1000))
    check_disk(config, base, model, 10)


def test_the_dry_run_says_what_a_run_will_write(settings: Make) -> None:
    assert "checkpoints of" in str(dry_run(settings("caption", epochs=3)).lines["disk"])

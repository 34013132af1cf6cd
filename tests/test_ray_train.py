"""A fault that every attempt will meet costs one attempt, not three, and its message comes whole.

What a user would lose: minutes of starting, and the one line in the middle of a long message that says what is wrong.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import FailureConfig, WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from tests.processes import command_line, of_living
from vlrank.config import RayConfig
from vlrank.errors import UserError
from vlrank.ray_train import always_met, preload_for, with_failure_policy, worker_error
from vlrank.runtime import ray_session


class Trainer:
    """Ray Train's trainer as far as its failures go."""

    run_config = SimpleNamespace(failure_config=FailureConfig(max_failures=3))

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        return controller["failure_policy"]


def failed(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("cut", dict(enumerate(errors)))


@pytest.fixture
def policy() -> Any:
    return policy_at(lambda: 1)


def policy_at(evaluations: Callable[[], int]) -> Any:
    return with_failure_policy(Trainer, evaluations)()._initialize_and_run_controller()  # type: ignore[arg-type]


FINAL = [
    UserError("no such picture", "Look."),
    TypeError("apply_chat_template() got an unexpected keyword"),
    OSError(errno.EROFS, "Read-only file system"),
    OSError(errno.EACCES, "Permission denied"),
    OSError(errno.ENOSPC, "No space left on device"),
]
PASSING = [
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    OSError(errno.ESTALE, "Stale file handle"),
    RuntimeError("NCCL error: unhandled system error"),
]


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_a_fault_that_every_attempt_meets_is_not_tried_again(policy: Any, error: Exception) -> None:
    assert policy.make_decision(failed(RuntimeError("the other rank is gone"), error)) == FailureDecision.RAISE


def test_a_torn_file_is_not_read_again(tmp_path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    (tmp_path / "model.safetensors").write_bytes(b"\x40" + b"\0" * 7 + b"{")
    with pytest.raises(SafetensorError) as torn, safe_open(tmp_path / "model.safetensors", "pt"):
        pass
    assert always_met(torn.value)


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_tried_again_but_not_for_ever(policy: Any, error: Exception) -> None:
    assert policy.make_decision(failed(error)) == FailureDecision.RETRY
    assert policy.make_decision(failed(RuntimeError("another"))) == FailureDecision.RETRY
    assert policy.make_decision(failed(error)) == FailureDecision.RETRY
    assert policy.make_decision(failed(error)) == FailureDecision.RAISE


def test_the_same_failure_twice_in_one_place_ends_the_run_and_after_progress_does_not() -> None:
    done = [0]
    policy = policy_at(lambda: done[0])
    error = RuntimeError("shapes do not match")
    assert policy.make_decision(failed(error)) == FailureDecision.RETRY
    done[0] += 1
    assert policy.make_decision(failed(error)) == FailureDecision.RETRY
    assert policy.make_decision(failed(error)) == FailureDecision.RAISE


def test_a_lost_process_is_replaced_whatever_the_others_say(policy: Any) -> None:
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost = WorkerHealthCheckFailedError("a worker failed its health check", ActorDiedError())
    error = failed(lost, ValueError("a broken message"))
    assert policy.make_decision(error) == FailureDecision.RETRY
    assert policy.make_decision(error) == FailureDecision.RETRY


def test_the_message_of_a_failed_worker_is_whole() -> None:
    cause = TypeError("no such keyword")
    cause.add_note("Traceback\n  the middle\nTypeError: no such keyword")
    error = worker_error(failed(RuntimeError("connection closed"), cause).worker_failures)
    assert str(error) == "training worker 1 failed: TypeError: no such keyword"
    assert error.__notes__ == ["Traceback\n  the middle\nTypeError: no such keyword"]
    user_error = worker_error(
        failed(RuntimeError("connection closed"), UserError("no disk", "Buy one.")).worker_failures
    )
    assert isinstance(user_error, UserError)
    assert user_error.remedy == "Buy one."


@pytest.mark.stack
def test_a_worker_with_a_fault_in_its_code_is_started_once(tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    def loop() -> None:
        with (tmp_path / "attempts").open("a") as file:
            file.write("x")
        raise TypeError("many words " * 3000 + "at the end")

    with ray_session(RayConfig(num_cpus=2)):
        trainer = with_failure_policy(DataParallelTrainer, lambda: 0)(
            loop,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(storage_path=str(tmp_path), failure_config=FailureConfig(max_failures=3)),
        )
        with pytest.raises(TrainingFailedError) as caught:
            trainer.fit()
    assert (tmp_path / "attempts").read_text() == "x"
    assert str(worker_error(caught.value.worker_failures)).count("many words") == 3000


@pytest.mark.stack
def test_workers_of_a_ray_of_our_own_start_in_the_processes_that_wait_for_them(tmp_path: Path) -> None:
    """Every other process would stand between the command and its first step; the workers still are one group."""
    import psutil
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from vlrank.ray_processes import ProcessGroupConfig

    def loop() -> dict[str, Any]:
        import os

        import torch
        import torch.distributed as dist

        total = torch.tensor(dist.get_rank() + 1.0)
        dist.all_reduce(total)
        others = of_living(psutil.Process().parent().children(), command_line)
        (controller,) = [process.pid for process, title in others.items() if "_Controller" in title]
        return {
            "total": total.item(),
            "rank": os.environ["RANK"],
            "started": sorted(title for title in others.values() if title.startswith("ray::")),
            "torch in the controller": "libtorch_cpu" in Path(f"/proc/{controller}/maps").read_text(),
        }

    with ray_session(RayConfig(num_cpus=2), preload=preload_for(2)):
        trainer = with_failure_policy(DataParallelTrainer, lambda: 0)(
            loop,
            backend_config=ProcessGroupConfig(),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name="run", storage_path=str(tmp_path)),
        )
        found = trainer.fit().return_value
    assert found["total"] == 3.0
    assert found["rank"] == "0"
    assert not found["torch in the controller"]
    started = [title for title in found["started"] if not title.endswith("Agent")]
    assert len(started) == 4, started  # the controller, the barrier of the workers, and these

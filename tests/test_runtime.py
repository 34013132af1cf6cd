"""Ray that does not come up: one message that says what to do, instead of a traceback after half a minute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private import services
from ray._private.node import Node

from tests.processes import Program, command_line, of_living
from vlrank import runtime
from vlrank.compat import patient_start
from vlrank.config import RayConfig
from vlrank.data.dataset import Dataset
from vlrank.errors import UserError
from vlrank.runtime import Preload, ray_folder, ray_session


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def unusable(monkeypatch: pytest.MonkeyPatch, *folders: str) -> None:
    """As on a machine where these belong to somebody else."""
    check = runtime._unusable
    monkeypatch.setattr(
        runtime, "_unusable", lambda folder: "Permission denied" if str(folder) in folders else check(folder)
    )


def test_sockets_lie_where_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_folder() == Path("/tmp/ray")
    monkeypatch.setenv("TMPDIR", f"/scratch/{'x' * 60}")  # some batch systems give such names
    assert ray_folder() == Path("/tmp/ray")
    monkeypatch.setenv("RAY_TMPDIR", "/dev/shm/new")
    assert ray_folder() == Path("/dev/shm/new/ray")


def test_a_folder_of_somebody_else_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    unusable(monkeypatch, "/tmp/ray")
    assert ray_folder() == Path(f"/tmp/ray-{os.getuid()}")


def test_without_any_usable_folder_the_message_names_all(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"/tmp/ray-{os.getuid()}"
    unusable(monkeypatch, "/tmp/ray", own)
    with pytest.raises(UserError, match="Set RAY_TMPDIR") as refused:
        ray_folder()
    assert f"/tmp/ray: Permission denied; {own}: Permission denied" in refused.value.problem


def test_the_longest_folder_that_is_taken_has_room_for_rays_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    socket = f"{'x' * runtime._FOLDER_BYTES}/session_2026-12-31_23-59-59_123456_4194304/sockets/plasma_store"
    ray._private.utils.validate_socket_filepath(socket)
    with pytest.raises(OSError, match="AF_UNIX"):
        ray._private.utils.validate_socket_filepath(f"x{socket}")


def test_a_command_says_so_before_it_starts_ray(shop: Dataset, tiny_vision_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlrank", "train", shop.path, "--mode", "raw_image", "--model", tiny_vision_model]
    command += ["--out", tmp_path / "run"]
    said = Program(*command, env={"RAY_TMPDIR": f"/tmp/{'x' * 100}"}).finish(2)
    assert "too long for the path of a socket" in said
    assert "Set RAY_TMPDIR to a writable folder" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "error",
    [Exception("The current node timed out during startup.\nThis could happen"), OSError("Read-only"), ValueError("x")],
)
def test_whatever_ray_says_is_one_message(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fails)
    with (
        pytest.raises(UserError, match=f"Ray did not start on this machine: {type(error).__name__}") as refused,
        ray_session(RayConfig(address="local")),
    ):
        pass
    assert "run the same command again" in str(refused.value.remedy)


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", fails)
    with (
        pytest.raises(
            UserError, match=r"the Ray cluster at 10.0.0.1:6379 could not be joined: ConnectionError"
        ) as refused,
        ray_session(RayConfig(address="10.0.0.1:6379")),
    ):
        pass
    assert "RAY_AUTH_MODE=token" in str(refused.value.remedy), "Ray's exception does not say that a token is missing"


def test_a_slow_node_is_waited_for_and_a_dead_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def get_node(*_: object) -> str:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise RuntimeError("not registered yet")
        return "node"

    monkeypatch.setattr(services, "get_node", get_node)
    with patient_start(60, lambda: True):
        assert services.get_node("address", "id") == "node"
    calls = 0
    with patient_start(60, lambda: False), pytest.raises(ChildProcessError):
        services.get_node("address", "id")
    assert services.get_node is get_node


@pytest.mark.stack
def test_ray_writes_no_log_lines_over_a_command() -> None:
    """One about actors that restart would stand above every progress bar of generate and rerank."""
    program = """
import subprocess
import sys
import ray
from vlrank.config import RayConfig
from vlrank.runtime import ray_session

@ray.remote
class Actor:
    def __init__(self, given):
        pass
    def answer(self):
        return 42

with ray_session(RayConfig(address="local", num_cpus=2)):
    actor = Actor.options(max_restarts=2).remote(ray.put(bytes(1_000_000)))
    print(ray.get(actor.answer.remote()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "42"


@pytest.mark.stack
def test_a_session_works_without_what_nobody_asked_ray_for() -> None:
    started = services.start_api_server, services.start_raylet, Node.start_monitor, Node.start_log_monitor
    preload = Preload(("json.tool",), processes=1)
    with ray_session(RayConfig(address="local", num_cpus=2), preload=preload):
        commands = of_living(psutil.Process().children(recursive=True), command_line).values()
        assert ray.get(ray.remote(lambda: "json.tool" in sys.modules).remote())
        assert os.environ[runtime.STARTED_HERE]
    for needless in (
        "dashboard/dashboard.py",
        "autoscaler/_private/monitor.py",
        "log_monitor.py",
        "--listen-port=52365",
    ):
        assert not [command for command in commands if needless in command]
    assert started == (services.start_api_server, services.start_raylet, Node.start_monitor, Node.start_log_monitor)
    assert not {runtime.STARTED_HERE, "RAY_preload_python_modules"} & set(os.environ)

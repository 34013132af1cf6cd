"""A Ray cluster of several nodes on this machine: own ports, own folders, token authentication, fake GPUs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.processes import family, of_living

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Nodes:
    """A head without CPUs and any number of workers; `stop` ends exactly the processes that were started here."""

    token: str = field(default_factory=lambda: secrets.token_hex(16))
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    metrics: int = field(default_factory=free_port)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="vlr", dir="/tmp")))
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def environment(self) -> dict[str, str]:
        # RAY_TMPDIR keeps Ray's note of "the current cluster" away from other clusters of this machine.
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_TMPDIR": str(self.folder)}
        # A lost node is noticed after 4 s instead of 20, metrics leave their process every second instead of every ten.
        own |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
        own |= {"RAY_metrics_report_interval_ms": "1000"}
        own["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | own

    def start_head(self) -> None:
        self._start(
            "--head",
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--metrics-export-port={self.metrics}",
            "--num-cpus=0",
            "--object-store-memory=200000000",
        )
        self._wait_for_dashboard()

    def add_worker(self, cpus: int = 4, gpus: int = 0) -> subprocess.Popen[bytes]:
        return self._start(
            f"--address=127.0.0.2:{self.port}",
            f"--num-cpus={cpus}",
            f"--num-gpus={gpus}",
            "--object-store-memory=200000000",
        )

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """End a node as a lost machine would: all its processes at once, without a word."""
        of_living(family(node.pid), psutil.Process.kill)
        node.wait()

    def metric(self, name: str, **tags: str) -> float:
        """Sum of a metric over the processes of the head, as Prometheus would read it; 0 while it is not there."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in tags.items()]
        found = [line for line in lines if line.startswith(f"{name}{{") and all(tag in line for tag in wanted)]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def stop(self) -> None:
        for node in reversed(self.started):
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"node-{len(self.started)}.log").open("wb")
        # An address and a folder for each, as machines have: in a common folder, a node that joins replaces the working
        # directories of the jobs there. Only the logs are in one place, as all agents of a machine look for them there.
        number = len(self.started)
        own = self.folder / str(number)
        if number:
            session = (self.folder / "0" / "session_latest").resolve()
            (own / session.name).mkdir(parents=True)
            (own / session.name / "logs").symlink_to(session / "logs")
        command = [RAY, "start", "--block", "--disable-usage-stats", *arguments]
        command += [f"--node-ip-address=127.0.0.{number + 2}", f"--temp-dir={own}"]
        # Each node's agent serves the logs of its jobs; on one machine they cannot all have the default port.
        command.append(f"--dashboard-agent-listen-port={free_port()}")
        node = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.started.append(node)
        return node

    def _wait_for_dashboard(self) -> None:
        request = urllib.request.Request(f"{self.url}/api/version", headers={"Authorization": f"Bearer {self.token}"})
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=2).read()
                return
            assert self.started[0].poll() is None, (self.folder / "node-0.log").read_text()
            time.sleep(0.5)
        raise AssertionError("the head did not come up\n" + (self.folder / "node-0.log").read_text())

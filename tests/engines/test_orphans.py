"""A killed engine leaves no processes behind: they would hold the GPU's memory, and the next run would not start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import command_line, end, of_living
from vlrank.supervisor import running

WORKERS = """
import multiprocessing, sys, time
from pathlib import Path

def worker(folder):
    import vlrank.engines.orphans
    (folder / str(multiprocessing.current_process().pid)).touch()
    time.sleep(600)

def core(folder):
    process = multiprocessing.get_context("spawn").Process(target=worker, args=(folder,))
    process.start()
    time.sleep(600)

if __name__ == "__main__":
    folder, target = Path(sys.argv[1]), {"worker": worker, "core": core}[sys.argv[2]]
    context = multiprocessing.get_context("spawn")
    context.Process(target=target, args=(folder,), name="EngineCore" if target is core else None).start()
    time.sleep(600)
"""
ENGINE = """
import sys, time
from vlrank.config import EngineConfig
from vlrank.engines.models import open_model
from vlrank.engines.scoring import open_scorer

if __name__ == "__main__":
    engine = open_scorer(open_model(sys.argv[1]), EngineConfig(name="vllm", max_model_len=512))
    print("ready", flush=True)
    time.sleep(600)
"""


def kill(process: "subprocess.Popen[str]", *, at_least: int) -> None:
    """Kill -9; what was below it must be gone ten seconds later."""
    descendants = psutil.Process(process.pid).children(recursive=True)
    lines = of_living(descendants, command_line)
    workers = [one for one, line in lines.items() if "resource_tracker" not in line]
    assert len(workers) >= at_least
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while left := [one for one in workers if running(one)]:
        if time.monotonic() > deadline:
            end(left)
            raise AssertionError(f"still there: {left}")
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["worker", "core"])
def test_a_worker_ends_with_the_process_that_started_the_engine(tmp_path: Path, kind: str) -> None:
    """With tensor parallelism vLLM's core is in between."""
    script, folder = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(WORKERS)
    folder.mkdir()
    process = subprocess.Popen([sys.executable, str(script), str(folder), kind], text=True)
    while not list(folder.iterdir()):
        assert process.poll() is None
    kill(process, at_least=1 if kind == "worker" else 2)


@pytest.mark.stack
def test_vllm_ends_with_its_process(tmp_path: Path, tiny_text_model: Path) -> None:
    pytest.importorskip("vllm")
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    command = [sys.executable, str(script), str(tiny_text_model)]
    with (tmp_path / "err").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout), (tmp_path / "err").read_text()[-3000:]
    kill(process, at_least=1)

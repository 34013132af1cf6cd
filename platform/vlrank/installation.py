"""How what is missing gets installed: commands that work where vlrank is, and the versions that were tried."""

from __future__ import annotations

import ctypes
import re
import shlex
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

CPU_LIST, GPU_LIST = "constraints-cpu.txt", "constraints-gpu.txt"


def checkout() -> Path | None:
    """The checkout that vlrank is imported from; None when it is an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "Makefile").is_file() and (root / CPU_LIST).is_file() else None


def install_command(*packages: str) -> str:
    """The command that installs optional packages: make in a checkout, elsewhere pip with vlrank's own bounds.

    vlrank is not on PyPI, so pip knows no extras of it.
    """
    root = checkout()
    if root is not None:
        return f"make -C {shlex.quote(str(root))} {'gpu' if driver_cuda() else 'venv'}"
    if not driver_cuda() and "vllm" in packages:
        return "make venv, in a checkout of vlrank: PyPI alone cannot install vLLM's CPU build"
    return "pip install " + " ".join(shlex.quote(_bounded(package)) for package in packages)


def _bounded(package: str) -> str:
    try:
        lines = requires("vlrank") or []
    except PackageNotFoundError:
        lines = []
    found = (line.partition(";")[0].strip() for line in lines)
    return next((line for line in found if re.split(r"[^\w.-]", line)[0] == package), package)


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that this machine's NVIDIA driver serves, e.g. ``(13, 0)``; None without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def tried_versions(name: str) -> dict[str, str]:
    """Package -> version of a list of pins: the checkout's, or the one in the wheel."""
    root = checkout()
    folder = Path(__file__).parent / "_lists" if root is None else root
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {package.lower().replace("_", "-"): version for package, version in pins}

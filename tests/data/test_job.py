"""jobs/data_prepare.py with its historic flags."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlrank.config import GenerateConfig
from vlrank.console import Summary
from vlrank.generation import pipeline

JOB = Path(__file__).resolve().parents[2] / "jobs" / "data_prepare.py"


@pytest.fixture
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("data_prepare", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(job: ModuleType, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as exit_:
        job.job(argv)
    return int(exit_.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    rows = [{"reviewerID": f"u{n % 3}", "asin": f"i{n % 4}", "overall": 5.0, "unixReviewTime": n} for n in range(24)]
    (tmp_path / "reviews_Beauty_5.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "meta_Beauty.json").write_text("\n".join(repr({"asin": f"i{n}", "title": f"T{n}"}) for n in range(4)))
    return tmp_path


FLAGS = ("--dataset_code", "beauty", "--min_rating", "3", "--min_uc", "2", "--min_sc", "2", "--use_image")


def test_the_historic_flags_prepare_and_then_generate(
    job: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raw: Path
) -> None:
    seen: list[GenerateConfig] = []

    def generate(config: GenerateConfig) -> Summary:
        seen.append(config)
        return Summary("generated", output=config.dataset, counts={"rows": 4})

    monkeypatch.setattr(pipeline, "run", generate)
    flags = (*FLAGS, "--raw_dir", str(raw), "--out", str(raw / "ds"))
    code, line = outcome(
        job,
        capsys,
        *flags,
        "--generate_caption",
        "--generate_semantic_summary",
        "--generate",
        "model=tiny",
        "--generate",
        "seed=3",
    )
    assert (code, line["status"], line["counts"]) == (0, "ok", {"rows": 4})
    assert [(config.what, config.model, config.seed) for config in seen] == [
        ("caption", "tiny", 3),
        ("semantic_summary", "tiny", 3),
    ]
    assert (raw / "ds" / "manifest.json").is_file()


def test_a_wrong_key_of_the_next_stage_stops_before_anything_is_done(
    job: ModuleType, capsys: pytest.CaptureFixture[str], raw: Path
) -> None:
    flags = (*FLAGS, "--raw_dir", str(raw), "--out", str(raw / "ds"))
    code, line = outcome(job, capsys, *flags, "--generate_caption", "--generate", "modle=tiny")
    assert code == 2
    assert "did you mean `model`" in line["message"]
    assert not (raw / "ds").exists()

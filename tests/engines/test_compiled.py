"""What a run has compiled, the next one and every trial find."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlrank.engines.compiled import keep_compiled

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLRANK_CACHE", str(tmp_path / "cache"))
    for name in (*NAMES, "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return tmp_path / "cache"


def test_compilers_share_the_cache_of_this_node(cache: Path) -> None:
    assert not keep_compiled()
    assert [os.environ[name] for name in NAMES] == [str(cache / "compiled"), str(cache / "compiled" / "attention")]
    (cache / "compiled").mkdir(parents=True)
    assert keep_compiled()


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_a_cache_that_cannot_be_written_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlrank.engines.compiled.writable", lambda place: False)
    keep_compiled()
    assert not set(NAMES) & set(os.environ)

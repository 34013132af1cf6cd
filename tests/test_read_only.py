"""A dataset on a read-only file system or of somebody else: stages that read it work, others say so before they start.

What a user would lose: hours of work that cannot be written at the end. Root passes every permission, so that the file
system itself is mounted read-only here where the machine allows that; elsewhere the system's answers are stood in for.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from vlrank import storage
from vlrank.cli import cli
from vlrank.config import RayConfig
from vlrank.console import Summary
from vlrank.data.dataset import Dataset
from vlrank.errors import UserError
from vlrank.options import main
from vlrank.runtime import ray_session
from vlrank.training.data import pictures_folder

_READ_ONLY, _REMOUNT, _BIND, _DETACH = 1, 32, 4096, 2  # of Linux's <sys/mount.h>


def mount_read_only(folder: Path) -> bool:
    """Whether a bind mount of the folder on itself, read-only, could be made; it shows errors EROFS to root as well."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = os.fsencode(folder)
    if libc.mount(place, place, None, _BIND, None) != 0:
        return False
    return libc.mount(place, place, None, _BIND | _REMOUNT | _READ_ONLY, None) == 0


@pytest.fixture
def dataset(shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A dataset with candidates that cannot be written to."""
    folder = tmp_path / "shop"
    shutil.copytree(shop.path, folder)
    vlrank("retrieve", folder, "--method", "popularity")
    mounted = mount_read_only(folder)
    if not mounted and os.geteuid() == 0:
        access = os.access
        monkeypatch.setattr(
            storage.os, "access", lambda path, mode: access(path, mode) and folder not in (path, *Path(path).parents)
        )
    elif not mounted:
        folder.chmod(0o555)
        for place in folder.iterdir():
            place.chmod(0o555)
    try:
        before = snapshot(folder)
        yield folder
        assert snapshot(folder) == before
    finally:
        if mounted:
            ctypes.CDLL(None).umount2(os.fsencode(folder), _DETACH)
        else:
            subprocess.run(["chmod", "-R", "u+w", folder], check=True)


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def vlrank(*arguments: object) -> Summary:
    summary = cli.main([str(argument) for argument in arguments], standalone_mode=False)
    assert isinstance(summary, Summary)
    return summary


def test_retrieve_and_generate_say_at_once_what_must_be_writable(dataset: Path, tiny_vision_model: Path) -> None:
    for command in (
        ("retrieve", dataset, "--method", "item_knn"),
        ("generate", dataset, "--what", "caption", "--model", tiny_vision_model, "engine.name=transformers"),
    ):
        with pytest.raises(UserError, match="cannot be written to: the file system is read-only"):
            vlrank(*command)
        with pytest.raises(SystemExit) as ended:
            main(cli, [str(word) for word in command])
        assert ended.value.code == 2


def test_an_output_that_could_not_be_written_is_refused_before_the_work(dataset: Path) -> None:
    rankings = dataset / "candidates" / "popularity.parquet"
    with pytest.raises(UserError, match=r"report cannot be written to: .*\nChoose another --out"):
        vlrank("evaluate", dataset, "--rankings", rankings, "--out", dataset / "report")


def test_evaluate_reads(dataset: Path, tmp_path: Path) -> None:
    rankings = dataset / "candidates" / "popularity.parquet"
    vlrank("evaluate", dataset, "--rankings", rankings, "--out", tmp_path / "report", "--bootstrap", 100)
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.stack
def test_train_and_rerank_read_and_keep_what_they_set_aside_elsewhere(
    dataset: Path, tmp_path: Path, tiny_vision_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLRANK_CACHE", str(tmp_path / "cache"))
    small = ["ranking.max_history=3", "ranking.max_image_pixels=1024"]
    run = ["--mode", "raw_image", "--model", tiny_vision_model, "--method", "lora", "--out", tmp_path / "run"]
    run += ["--epochs", 1, "--val_users", 8, "--negatives", 4, "--batch_size", 32, "--metric", "recall@1"]
    ranked = tmp_path / "ranked.parquet"
    rerank = ["--model", tmp_path / "run", "--candidates", "popularity", "--out", ranked, "--limit", 10]
    with ray_session(RayConfig(num_cpus=4)):
        vlrank("train", dataset, *run, *small)
        vlrank("rerank", dataset, *rerank, "engine.name=transformers")
    assert pl.read_parquet(ranked).height == 10
    assert list((tmp_path / "cache" / "vision_features").iterdir())


def test_features_of_pictures_lie_in_the_cache(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlrank.config import TrainConfig, load_config

    monkeypatch.setenv("VLRANK_CACHE", str(tmp_path / "cache"))
    config = load_config(TrainConfig, dataset=dataset, out=tmp_path / "run", mode="raw_image")
    assert pictures_folder(config) == tmp_path / "cache" / "vision_features"

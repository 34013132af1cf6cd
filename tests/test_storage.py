"""Datasets, runs and rankings in a bucket, on a real S3 server (moto's) and with real stages.

What a user would lose: work committed before a crash, or a dataset that readers see half of; and hours of looking for
the reason when a bucket's name or a key is wrong.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import polars as pl
import pytest
from PIL import Image

from tests.processes import Program, two_shards
from vlrank import storage
from vlrank.cli import cli
from vlrank.config import RayConfig, RerankConfig, load_config
from vlrank.console import Summary
from vlrank.data import pictures
from vlrank.data.dataset import Dataset, DatasetWriter
from vlrank.data.schemas import GENERATED
from vlrank.data.tables import read_parquet
from vlrank.errors import UserError
from vlrank.options import main
from vlrank.runtime import ray_session
from vlrank.storage import BucketPath, claim, fetch, location, remove_tree, upload_tree


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server of its own, and the environment that leads there; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    program = Program(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("VLRANK_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(storage, "LEASE_S", 4.0)
        try:
            program.wait_for(lambda: answers(url), "the server's first answer")
            yield url
        finally:
            program.kill()
            storage._connected.cache_clear()


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/moto-api/").status == 200)
    except OSError:
        return False


@pytest.fixture
def bucket(server: str) -> BucketPath:
    """A new, empty bucket."""
    from pyarrow.fs import S3FileSystem

    place = BucketPath("s3", f"b{time.time_ns()}")
    creator = S3FileSystem(
        endpoint_override=server.removeprefix("http://"), scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    creator.create_dir(place.bucket)
    return place


@pytest.fixture
def another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forget all that this machine has copied from buckets."""

    def move() -> None:
        monkeypatch.setenv("VLRANK_CACHE", str(tmp_path / f"cache-{time.time_ns()}"))

    return move


def vlrank(*arguments: object) -> Summary:
    summary = cli.main([str(argument) for argument in arguments], standalone_mode=False)
    assert isinstance(summary, Summary)
    return summary


def names(folder: BucketPath) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.files())


# ---- places ---------------------------------------------------------------------------------------------------------


def test_urls_and_paths_are_told_apart() -> None:
    assert location("data/beauty") == Path("data/beauty")
    assert location("file:///data/my%20shop") == Path("/data/my shop")
    place = location("s3://shop/data/beauty.v1/")
    assert isinstance(place, BucketPath)
    assert (str(place), place.name, place.stem, place.suffix) == (
        "s3://shop/data/beauty.v1",
        "beauty.v1",
        "beauty",
        ".v1",
    )
    assert str(place.parent / "x" / "y.parquet") == "s3://shop/data/x/y.parquet"
    assert str(location("gcs://shop/x")) == "gs://shop/x"
    for wrong in ("ftp://shop/x", "s3:///x", "s3://shop/../other", "s3://key:secret@shop/x"):
        with pytest.raises(UserError):
            location(wrong)


def test_a_config_keeps_urls_on_its_way_to_a_cluster() -> None:
    config = load_config(RerankConfig, dataset="s3://shop/beauty", model="s3://shop/run", out="s3://shop/r.parquet")
    assert RerankConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    from vlrank.paths import absolute_paths

    assert absolute_paths(config, None)["out"] == "s3://shop/r.parquet", "no --workdir is needed"
    with pytest.raises(UserError, match="`out`: only a local or shared folder"):
        vlrank("tune", "s3://shop/beauty", "--out", "s3://shop/sweep")


def test_objects_and_folders(bucket: BucketPath) -> None:
    folder = bucket / "a" / "b"
    assert not folder.exists()
    assert not list(folder.iterdir())
    (folder / "one.txt").write_bytes(b"1")
    (folder / "deep" / "two.txt").write_bytes(b"")
    assert folder.is_dir()
    assert not folder.is_file()
    assert [place.name for place in folder.glob("*.txt")] == ["one.txt"]
    assert [place.name for place in folder.glob("*/*.txt")] == ["two.txt"]
    assert (folder / "one.txt").read_text() == "1"
    assert fetch(folder / "deep" / "two.txt").read_bytes() == b""
    for missing in (folder.read_bytes, (folder / "no").read_bytes, (folder / "no").unlink):
        with pytest.raises(FileNotFoundError):
            missing()
    (folder / "one.txt").unlink()
    remove_tree(folder / "deep")
    assert not folder.exists(), "a folder that was emptied is gone"


def test_a_changed_object_is_fetched_again_even_within_a_second(bucket: BucketPath) -> None:
    place = bucket / "rankings.parquet"
    for content in (b"old", b"new"):
        place.write_bytes(content)
        assert fetch(place).read_bytes() == content


def test_two_runs_do_not_write_to_one_folder_and_a_dead_one_does_not_bar_it(bucket: BucketPath) -> None:
    folder = bucket / "captions"
    with claim(folder), pytest.raises(UserError, match="another run"), claim(folder):
        pass
    (bucket / ".captions.lock" / "killed").write_bytes(b"on host, process 1 7")
    with claim(folder):
        assert not (bucket / ".captions.lock" / "killed").exists()
    assert not names(bucket)


def loses(held: Callable[[], None]) -> bool:
    try:
        held()
    except UserError as error:
        return "another run has taken over" in error.problem
    return False


def until(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_claim_that_another_run_removed_is_not_written_anew(bucket: BucketPath) -> None:
    # Cut off for a lease, then back: two runs would go on writing to one folder, each thinking it is alone.
    folder, lock = bucket / "captions", bucket / ".captions.lock"
    with claim(folder) as held:
        (token,) = lock.iterdir()
        until(lambda: not token.read_text().endswith(" 1"))
        held()  # renewed, and still its own
        token.unlink()
        until(lambda: loses(held))
        assert not names(bucket)
    assert not names(bucket)


def test_a_claim_that_cannot_be_renewed_is_lost_after_a_lease(
    bucket: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LEASE_S", 0.4)
    with claim(bucket / "captions") as held:
        monkeypatch.setattr(BucketPath, "write_bytes", lambda *_: (_ for _ in ()).throw(UserError("not now")))
        until(lambda: loses(held))


def test_a_dataset_is_not_written_over_that_of_a_run_which_took_over(bucket: BucketPath) -> None:
    place = bucket / "toy"
    with DatasetWriter(place) as writer:
        for token in (bucket / ".toy.lock").iterdir():
            token.unlink()
        (place / "items.parquet").write_bytes(b"the other's")
        until(lambda: loses(writer._still_held))
        with pytest.raises(UserError, match="another run has taken over"):
            writer.commit(items=[], sequences=[], options={})
    assert (place / "items.parquet").read_bytes() == b"the other's"


# ---- wrong names, keys and addresses --------------------------------------------------------------------------------


def refusal(*arguments: object) -> str:
    """What a command that cannot work says before it ends with 2."""
    storage._connected.cache_clear()
    with pytest.raises(UserError) as caught:
        vlrank(*arguments)
    with pytest.raises(SystemExit) as ended:
        main(cli, [str(argument) for argument in arguments])
    assert ended.value.code == 2
    return str(caught.value)


def test_what_is_wrong_with_a_place_is_said_in_one_message(
    bucket: BucketPath, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = ("--method", "popularity")
    assert "bucket s3://no-such-bucket does not exist" in refusal("retrieve", "s3://no-such-bucket/beauty", *report)
    assert f"dataset {bucket}/beauty does not exist" in refusal("retrieve", bucket / "beauty", *report)
    assert "`hdfs://` is not known" in refusal("retrieve", "hdfs://shop/beauty", *report)
    (bucket / "full" / "x").write_bytes(b"")
    interactions = ("prepare", "--reviews", __file__, "--keep_untitled", "--out")
    assert "exists and is not a dataset" in refusal(*interactions, bucket / "full")
    assert "does not exist" in refusal("prepare", "--reviews", bucket / "no.csv", "--out", bucket / "beauty")

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "does not answer" in refusal("retrieve", bucket / "beauty", *report)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    with authorised(server, after=0):
        message = refusal("retrieve", bucket / "beauty", *report)
        assert "credentials were refused" in message
        assert "AWS_ACCESS_KEY_ID" in message
    storage._connected.cache_clear()


class authorised:
    """The server asks for a known key after so many requests, which no key of these tests is."""

    def __init__(self, server: str, after: int) -> None:
        self.server, self.after = server, after

    def _set(self, after: str) -> None:
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.server}/moto-api/reset-auth", after.encode(), headers, method="POST")
        urllib.request.urlopen(request)

    def __enter__(self) -> None:
        self._set(str(self.after))

    def __exit__(self, *error: object) -> None:
        self._set("inf")


# ---- datasets and rankings ------------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Reviews and items with pictures, one of them missing."""
    folder = tmp_path / "raw"
    (folder / "pictures").mkdir(parents=True)
    with (folder / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", "item_id", "timestamp"])
        rows.writerows((f"u{u}", f"i{(u * 3 + t * t) % 11}", 1000 + t) for u in range(24) for t in range(7))
    with (folder / "items.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "title", "image"])
        rows.writerows((f"i{n}", f"thing {n}", f"pictures/{n}.png") for n in range(11))
    for n in range(10):
        Image.new("RGB", (32, 32), (20 * n, 100, 50)).save(folder / "pictures" / f"{n}.png")
    return folder


def prepare(raw: Path, out: object, *more: object) -> Summary:
    return vlrank(
        *("prepare", "--reviews", raw / "reviews.csv", "--meta", raw / "items.csv", "--out", out, "--min_uc", 1),
        *("--min_sc", 1, "--use_image", "pictures.workers=0", *more),
    )


def test_a_dataset_in_a_bucket_is_the_one_on_a_disk(
    bucket: BucketPath, raw: Path, tmp_path: Path, another_node: Callable[[], None]
) -> None:
    place = bucket / "data" / "toy"
    prepare(raw, tmp_path / "toy")
    summary = prepare(raw, place)
    assert str(summary.output) == str(place)
    disk, remote = Dataset.open(tmp_path / "toy"), Dataset.open(place)
    assert remote.manifest == disk.manifest
    on_disk = sorted(
        str(path.relative_to(tmp_path / "toy")) for path in (tmp_path / "toy").rglob("*") if path.is_file()
    )
    assert [Path(name).parent for name in names(place)] == [Path(name).parent for name in on_disk]
    assert names(place / "images") == [name.removeprefix("images/") for name in on_disk if name.startswith("images/")]
    assert names(bucket) == [f"data/toy/{name}" for name in names(place)], "no leftovers beside it"
    picture = remote.item_meta()[1]["image_path"]
    assert fetch(str(picture)).read_bytes() == fetch(str(disk.item_meta()[1]["image_path"])).read_bytes()
    assert "nothing to do" in prepare(raw, place).title

    another_node()
    for dataset in (tmp_path / "toy", place):
        vlrank("retrieve", dataset, "--method", "popularity", "--top_k", 5)
        rankings = location(str(dataset)) / "candidates" / "popularity.parquet"
        report = location(f"{dataset}-report")
        vlrank("evaluate", dataset, "--rankings", rankings, "--out", report, "--bootstrap", 100)
    assert Dataset.open(place).candidates("popularity").equals(Dataset.open(tmp_path / "toy").candidates("popularity"))
    assert (bucket / "data" / "toy-report" / "metrics.json").read_text() == (
        tmp_path / "toy-report" / "metrics.json"
    ).read_text()
    assert "data:image/webp" in (bucket / "data" / "toy-report" / "report.html").read_text()


def test_readers_never_see_half_a_dataset_and_the_next_run_mends_it(
    bucket: BucketPath, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = bucket / "toy"
    upload = BucketPath.upload

    def breaks_down(target: BucketPath, source: Path) -> None:
        if target.name == "manifest.json":
            raise KeyboardInterrupt
        upload(target, source)

    monkeypatch.setattr(BucketPath, "upload", breaks_down)
    with pytest.raises(click.Abort):
        prepare(raw, place)
    assert not place.exists()
    fetched = names(bucket / ".toy.pictures" / "images")
    assert len(fetched) == 10, "what was fetched stays for the next run"

    # A killed writer cleans nothing up.
    monkeypatch.setattr("vlrank.data.dataset.DatasetWriter._leave_bucket", lambda *_: None)
    with pytest.raises(click.Abort):
        prepare(raw, place)
    assert (place / "items.parquet").is_file()
    with pytest.raises(UserError, match="is not a dataset"):
        Dataset.open(place)
    monkeypatch.undo()

    monkeypatch.setattr(pictures, "fetch_pictures", lambda *_: pytest.fail("all pictures are there"))
    prepare(raw, place)
    assert Dataset.open(place).manifest["pictures"]["stored"] == 10
    assert all(name.startswith("toy/") for name in names(bucket))

    with pytest.raises(UserError, match="made differently"):
        prepare(raw, place, "--min_uc", 2)
    vlrank("retrieve", place, "--method", "popularity")
    prepare(raw, place, "--min_uc", 2, "--overwrite")
    assert Dataset.open(place).manifest["options"]["min_uc"] == 2
    assert not Dataset.open(place).candidate_names(), "they belonged to the one that was replaced"
    assert len(names(place / "images")) == 10


# ---- generation, training, reranking --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(server: str) -> Iterator[None]:
    with ray_session(RayConfig(address="local", num_cpus=8)):
        yield


@pytest.fixture
def shop_url(bucket: BucketPath, shop: Dataset, monkeypatch: pytest.MonkeyPatch) -> BucketPath:
    """The small shop, in a bucket."""
    monkeypatch.setattr(storage, "LEASE_S", 15.0)  # a busy machine may hold a run up for some seconds
    assert isinstance(shop.path, Path)
    upload_tree(shop.path, bucket / "shop", last="manifest.json")
    return bucket / "shop"


def start(*arguments: object) -> Program:
    return Program(sys.executable, "-m", "vlrank", *arguments, "ray.address=local")


@pytest.mark.stack
def test_captions_that_were_committed_before_a_crash_are_not_made_again(
    cluster: None, shop_url: BucketPath, tiny_vision_model: Path, another_node: Callable[[], None], tmp_path: Path
) -> None:
    arguments = (
        *("generate", shop_url, "--what", "caption", "--model", tiny_vision_model, "--max_tokens", 24),
        *("--image_side", 64, "--no_quality", "--shard_rows", 4, "engine.name=transformers", "engine.batch_size=2"),
    )
    folder = shop_url / "captions"
    process = two_shards(tmp_path, *arguments)
    process.wait_for(lambda: len(list(folder.glob("*.parquet"))) >= 2, "the second shard")
    process.lose_power()
    before = {name: digest(folder / name) for name in names(folder) if name.endswith(".parquet")}
    kept = sum(read_parquet(folder / name, GENERATED).height for name in before)
    items = Dataset.open(shop_url).n_items
    assert 0 < kept < items, "killed in the middle"

    another_node()
    counts = vlrank(*arguments).counts
    assert counts["reused"] >= kept
    assert (counts["reused"] + counts["done"], counts["quarantined"]) == (items, 0)
    assert {name: digest(folder / name) for name in before} == before
    rows = pl.concat([read_parquet(folder / name, GENERATED) for name in names(folder)])
    assert sorted(rows["item_id"]) == list(range(1, items + 1)), "every item once, and no leftovers"
    assert not names(shop_url / ".captions.lock")


def digest(place: BucketPath) -> str:
    return hashlib.sha256(place.read_bytes()).hexdigest()


@pytest.mark.stack
def test_a_run_in_a_bucket_goes_on_after_a_crash_and_its_model_ranks(
    cluster: None, shop_url: BucketPath, bucket: BucketPath, tiny_vision_model: Path, another_node: Callable[[], None]
) -> None:
    run = bucket / "runs" / "raw"
    # The base model lies in the bucket, too.
    upload_tree(tiny_vision_model, bucket / "models" / "tiny")
    arguments = (
        *("train", shop_url, "--mode", "raw_image", "--model", bucket / "models" / "tiny", "--out", run, "--epochs", 3),
        *("--batch_size", 16, "--lr", "1e-3", "--val_users", 16, "--method", "lora", "--negatives", 5),
        *(
            "ranking.max_history=3",
            "ranking.max_item_chars=60",
            "ranking.max_image_pixels=1024",
            "--metric",
            "recall@1",
        ),
    )
    process = start(*arguments)
    process.wait_for(lambda: (run / "history.jsonl").is_file())
    process.lose_power()
    assert not (run / "result.json").exists()
    first = json.loads((run / "history.jsonl").read_text().splitlines()[0])

    another_node()
    vlrank(*arguments)
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history[0] == first, "the first epoch was not trained again"
    assert "is finished already" in said_by(lambda: vlrank(*arguments))
    checkpoints = {name.split("/")[1] for name in names(run) if name.startswith("qwen3vl_rerank_vl/checkpoint-")}
    known = json.loads((run / "qwen3vl_rerank_vl" / "checkpoint_manager_snapshot.json").read_text())
    assert checkpoints == {result["checkpoint_dir_name"] for result in known["checkpoint_results"]}

    another_node()
    rankings = bucket / "rankings" / "raw.parquet"
    ranked = vlrank("rerank", shop_url, "--model", run, "--out", rankings, "--limit", 20, "engine.name=transformers")
    assert ranked.counts["done"] == 20
    again = vlrank("rerank", shop_url, "--model", run, "--out", rankings, "--limit", 20, "engine.name=transformers")
    assert (again.counts["done"], again.counts["reused"]) == (0, 20)
    another_node()
    vlrank("evaluate", shop_url, "--rankings", rankings, "--runs", run, "--out", bucket / "report", "--bootstrap", 100)
    metrics = json.loads((bucket / "report" / "metrics.json").read_text())
    assert metrics["groups"][0]["protocol"]["users"] == 20


def said_by(work: Callable[[], object]) -> str:
    from vlrank.console import console

    with console.capture() as captured:
        work()
    return captured.get()


def test_a_name_that_is_not_utf_8_is_named() -> None:
    with pytest.raises(UserError, match=r"the name 'caf\\udce9\.csv' is not utf-8"):
        location(os.fsdecode(b"caf\xe9.csv"))

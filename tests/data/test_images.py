"""Pictures from a web that times out, redirects, lies and attacks."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlrank.config import PicturesConfig, PrepareConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.data.images import Fetched, Fetcher, PictureError, check_url, is_public, normalise
from vlrank.data.prepare import run
from vlrank.errors import UserError

from .hostile import HostileServer, hostile_server, huge_png, picture

LIMITS = {"attempts": 4, "backoff_s": 0.01, "timeout_s": 20, "max_bytes": 1_000_000, "requests_per_second": 1000}


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with hostile_server() as running:
        yield running


def fetch(*sources: str, **options: Any) -> list[Fetched]:
    return Fetcher(PicturesConfig.model_validate(LIMITS | {"allow_private": True} | options)).fetch(sources)


def open_picture(data: bytes | None) -> Image.Image:
    assert data is not None
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# ---- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_upright_rgb_picture_keeps_its_bytes(kind: str) -> None:
    data = picture(kind)
    assert normalise(data, 10**6) == (data, "jpg" if kind == "JPEG" else "png")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("JPEG", "CMYK"),
        ("JPEG", "L"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("PNG", "I;16"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("WEBP", "RGB"),
    ],
)
def test_other_kinds_and_modes_become_rgb(kind: str, mode: str) -> None:
    source = Image.new("I;16", (20, 20), 40_000) if mode == "I;16" else None
    if source is not None:
        buffer = io.BytesIO()
        source.save(buffer, "PNG")
        data = buffer.getvalue()
    else:
        data = picture(kind, mode=mode)
    encoded, suffix = normalise(data, 10**6)
    image = open_picture(encoded)
    assert image.mode == "RGB"
    assert image.format == {"jpg": "JPEG", "png": "PNG"}[suffix]
    if mode == "I;16":
        assert image.getpixel((5, 5)) == (156, 156, 156)  # 40,000 of 65,535, not clipped to white


def test_transparency_is_laid_on_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(buffer, "PNG")
    assert open_picture(normalise(buffer.getvalue(), 10**6)[0]).getpixel((3, 3)) == (255, 255, 255)


def test_exif_orientation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    data = picture(size=(40, 20), exif=exif)
    encoded, _ = normalise(data, 10**6)
    image = open_picture(encoded)
    assert image.size == (20, 40)
    assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("data", "error_type"),
    [
        (b"", "NotAPicture"),
        (b"<html>", "NotAPicture"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "NotAPicture"),
        (picture(size=(200, 200))[:-300], "Undecodable"),
        (picture("PNG", size=(200, 200))[:-200], "Undecodable"),
        (huge_png(), "TooManyPixels"),
        (picture("GIF", (1, 1)), "BadShape"),
        (picture("PNG", (8, 2000)), "BadShape"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "NotAPicture"),  # would start Ghostscript
    ],
)
def test_what_is_no_usable_picture_is_named(data: bytes, error_type: str) -> None:
    with pytest.raises(PictureError) as error:
        normalise(data, 10_000_000)
    assert error.value.error_type == error_type


# ---- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "2002:7f00:1::",
     "64:ff9b::7f00:1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_public_addresses() -> None:
    assert is_public("8.8.8.8")
    assert is_public("2606:4700:4700::1111")


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://e.com/a.jpg", "gopher://e.com", "data:image/png;base64,xx", "http://", "http://[::1]/a",
     "http://127.0.0.1/a", "http://169.254.169.254/latest/meta-data", "https://user@10.0.0.1/", "http://e.com:port/"],
)  # fmt: skip
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(PictureError):
        check_url(url, allow_private=False)


def test_a_name_that_resolves_to_a_private_address_is_refused_at_the_connection(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.url.rsplit(":", 1)[1]
    (result,) = fetch(f"http://localhost:{port}/secret", allow_private=False)
    assert result.error_type == "PrivateAddress"
    assert not server.requests


def test_a_redirect_to_a_private_address_is_refused(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address passes for public, as an attacker's server would be."""
    from vlrank.data import images

    port = int(server.url.rsplit(":", 1)[1])
    original = images._public_resolver

    def resolver() -> Any:
        inner = original()

        async def resolve(host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
            if host == "shop.example":
                flags = socket.AI_NUMERICHOST
                return [
                    {"hostname": host, "host": "127.0.0.1", "port": port, "family": family, "proto": 0, "flags": flags}
                ]
            return await type(inner).resolve(inner, host, port, family)

        inner.resolve = resolve
        return inner

    monkeypatch.setattr(images, "_public_resolver", resolver)
    results = fetch(
        f"http://shop.example:{port}/to_private", f"http://shop.example:{port}/to_file", allow_private=False
    )
    assert [result.error_type for result in results] == ["PrivateAddress", "BadAddress"]
    assert server.requests["/secret"] == 0
    assert server.requests["/to_private"] == 1


# ---- a hostile server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error_type", "requests"),
    [
        ("slow", "Timeout", 2),
        ("drip", "Timeout", 2),
        ("html", "NotAPicture", 1),
        ("truncated", "Undecodable", 1),
        ("cutoff", "Connection", 2),
        ("huge", "TooManyPixels", 1),
        ("big", "TooLarge", 1),
        ("endless", "TooLarge", 1),
        ("never", "HttpStatus", 2),
        ("gone", "HttpStatus", 1),
        ("loop", "TooManyRedirects", 6),
        ("to_file", "BadAddress", 1),
        ("gzip", "NotAPicture", 1),
    ],
)
def test_each_failure_has_its_reason_and_is_tried_again_only_where_that_may_help(
    server: HostileServer, name: str, error_type: str, requests: int
) -> None:
    (result,) = fetch(f"{server.url}/{name}", attempts=2, timeout_s=0.5 if error_type == "Timeout" else 20)
    assert (result.data, result.error_type) == (None, error_type)
    assert result.message
    assert server.requests[f"/{name}"] == requests


def test_what_passes_is_waited_for(server: HostileServer) -> None:
    results = fetch(*(f"{server.url}/{name}" for name in ("busy", "flaky", "redirect", "good")))
    assert [result.error_type for result in results] == [None] * 4
    assert all(open_picture(result.data).mode == "RGB" for result in results)
    assert server.requests["/busy"] == 2
    assert server.requests["/flaky"] == 3
    busy = [start for start in server.starts if start - server.starts[0] >= 0.95]
    assert busy, "the server asked for one second of patience"


def test_one_host_sees_no_more_requests_at_once_and_per_second_than_allowed(server: HostileServer) -> None:
    results = fetch(*(f"{server.url}/good{n}" for n in range(40)), concurrency_per_host=3, requests_per_second=50)
    assert all(result.data for result in results)
    assert server.most_open <= 3
    assert server.starts[-1] - server.starts[0] >= 39 / 50 * 0.9


def test_a_host_that_is_not_there(server: HostileServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = fetch(f"http://127.0.0.1:{port}/a", "http://nowhere.invalid/a", attempts=1)
    assert [result.error_type for result in results] == ["Connection", "Connection"]


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("PNG"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.jpg").write_bytes(b"x" * 2_000_000)
    names = ["a.png", "no.png", "pipe", "large.jpg", ""]
    results = fetch(*(str(tmp_path / name) for name in names))
    assert [result.error_type for result in results] == [None, "FileNotFound", "NotAFile", "TooLarge", "NotAFile"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (picture("TIFF"), "a TIFF picture of"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture"),  # what telephones make
        (b"\0\0\0\x1cftypavif\0\0\0\0", "an AVIF picture"),
        (b"<?xml version='1.0'?><svg width='9'/>", "an SVG drawing"),
        (b"<!DOCTYPE html><p>404", "an HTML page"),
        (b"", "an empty file"),
    ],
)
def test_a_picture_of_another_format_is_named_with_the_formats_that_are_read(data: bytes, kind: str) -> None:
    with pytest.raises(PictureError) as error:
        normalise(data, 10_000_000)
    assert str(error.value).startswith(kind)
    assert ("expected JPEG, PNG" in str(error.value)) == bool(data)


# ---- the stage ------------------------------------------------------------------------------------------------------


def inputs(folder: Path, pictures: dict[str, str]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    rows = [{"user": "u", "item": item, "timestamp": n} for n, item in enumerate(pictures)]
    meta = [{"item": item, "title": item, "image": source} for item, source in pictures.items()]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, meta)))
    options = {"workers": 0, "shard_rows": 2, "allow_private": True, "backoff_s": 0.01, "attempts": 2, "timeout_s": 5}
    return {
        "reviews": [folder / "r.jsonl"], "meta": [folder / "m.jsonl"], "out": folder / "ds", "min_uc": 1, "min_sc": 1,
        "use_image": True, "pictures": options,
    }  # fmt: skip


def prepare(**options: Any) -> Dataset:
    return Dataset.open(str(run(load_config(PrepareConfig, **options)).output))


def test_a_second_run_downloads_nothing_and_retry_failed_only_the_failures(
    tmp_path: Path, server: HostileServer
) -> None:
    names = {"a": "good1", "b": "good2", "c": "healing", "d": "gone", "e": "good1"}
    options = inputs(tmp_path, {item: f"{server.url}/{name}" for item, name in names.items()})
    dataset = prepare(**options)
    have = dict(dataset.items().select("source_id", "image_path").iter_rows())
    assert have["a"] == have["e"] is not None  # one address, one picture
    assert server.requests["/good1"] == 1
    assert (have["c"], have["d"]) == (None, None)
    assert dataset.manifest["pictures"] == {"asked": True, "sources": 5, "stored": 3, "failed": 2}
    failures = {row["key"]: row["message"] for row in dataset.quarantine("pictures").to_dicts()}
    assert "HTTP 503" in failures["3"]
    assert "HTTP 404" in failures["4"]

    before = sum(server.requests.values())
    assert prepare(**options).manifest == dataset.manifest
    assert sum(server.requests.values()) == before

    server.healed = True
    healed = prepare(**options, retry_failed=True)
    assert sum(server.requests.values()) == before + 2  # c and d, nothing else
    assert healed.manifest["pictures"]["stored"] == 4
    assert healed.quarantine("pictures")["key"].to_list() == ["4"]
    assert open_picture(Path(str(healed.item_meta()[3]["image_path"])).read_bytes()).size == (32, 24)
    healed.verify()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pictures_can_be_added_to_a_dataset_that_was_made_without(tmp_path: Path, server: HostileServer) -> None:
    options = inputs(tmp_path, {"a": f"{server.url}/good1", "b": f"{server.url}/good2"})
    dataset = prepare(**options | {"use_image": False})
    assert dataset.items()["image_path"].null_count() == 2
    assert not server.requests
    dataset.add_generated("caption", [{"item_id": 1, "text": "c", "model": "m", "prompt_id": "p", "input_hash": "h"}])
    dataset = prepare(**options)
    assert dataset.items()["image_path"].null_count() == 0
    assert dataset.item_meta()[1]["caption"] == "c"


def test_a_wrong_picture_folder_stops_before_anything_is_made_and_the_right_one_needs_no_retry(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture("PNG"))
    options = inputs(tmp_path / "in", {"a": "a.png", "b": "b.png"})
    with pytest.raises(UserError, match=r"no picture .* exists: .*a.png and 1 more\n.*--image_root") as told:
        prepare(**options)
    assert str(told.value).count("a.png") == 1
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["m.jsonl", "r.jsonl"]
    dataset = prepare(**options, image_root=tmp_path / "photos")
    assert dataset.manifest["pictures"] == {"asked": True, "sources": 2, "stored": 1, "failed": 1}
    (message,) = dataset.quarantine("pictures")["message"].to_list()
    assert message.count("b.png") == 1


def test_an_interrupted_run_goes_on_with_what_is_missing(tmp_path: Path, server: HostileServer) -> None:
    """The process gets Ctrl-C after the first committed shard of two pictures."""
    options = inputs(tmp_path, {f"i{n}": f"{server.url}/good{n}" for n in range(6)})
    program = """
import json, sys, time
from vlrank.config import PrepareConfig, load_config
from vlrank.data import pictures, prepare
commit = pictures._commit
def first(*arguments):
    done = commit(*arguments)
    print("committed", flush=True)
    time.sleep(60)
    return done
pictures._commit = first
prepare.run(load_config(PrepareConfig, **json.loads(sys.argv[1])))
"""
    command = [sys.executable, "-c", program, json.dumps(options, default=str)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "committed\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert not (tmp_path / "ds").exists()
    assert sum(server.requests.values()) == 2
    dataset = prepare(**options)
    assert sum(server.requests.values()) == 6
    assert dataset.items()["image_path"].null_count() == 0


@pytest.mark.stack
def test_the_ray_stage_shares_the_limits_between_its_workers(tmp_path: Path, server: HostileServer) -> None:
    (tmp_path / "local.png").write_bytes(picture("PNG", (50, 50)))
    pictures = {f"i{n:02}": f"{server.url}/good{n}" for n in range(12)}
    options = inputs(tmp_path, pictures | {"local": "local.png", "bad": f"{server.url}/html"})
    options["pictures"] |= {"workers": 2, "concurrency_per_host": 2, "shard_rows": 4}
    dataset = prepare(**options, ray={"num_cpus": 4})
    assert dataset.manifest["pictures"] == {"asked": True, "sources": 14, "stored": 13, "failed": 1}
    assert server.most_open <= 2
    assert server.requests["/html"] == 1
    assert dataset.quarantine("pictures")["error_type"].to_list() == ["NotAPicture"]

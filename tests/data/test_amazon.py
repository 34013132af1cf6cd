"""Data sets by code: found, downloaded with resumption, or exactly asked for."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vlrank.config import PrepareConfig, load_config
from vlrank.data import amazon
from vlrank.data.amazon import NetworkError, RemoteFile, download, files_of, locate
from vlrank.data.prepare import dry_run, run
from vlrank.errors import UserError

CONTENT = bytes(range(256)) * 1000


class Server:
    """Serves `CONTENT` with ranges; can break off, change its file, or ignore ranges."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.etag = '"one"'
        self.break_after: int | None = None
        self.ranges: list[str | None] = []
        self.with_etag = True
        self.status: int | None = None


@contextmanager
def serving() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            if state.status:
                self.send_error(state.status)
                return
            start = 0
            if wanted and self.headers.get("If-Range") == state.etag:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1))  # type: ignore[union-attr]
                if start >= len(CONTENT):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            if state.with_etag:
                self.send_header("ETag", state.etag)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            end = len(CONTENT) if state.break_after is None else start + state.break_after
            self.wfile.write(CONTENT[start:end])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{server.server_address[1]}/f.gz")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def test_a_broken_download_goes_on_where_it_stopped(tmp_path: Path, server: Server) -> None:
    server.break_after = 100_000
    path = tmp_path / "raw" / "f.gz"
    for _ in range(2):
        with pytest.raises(NetworkError, match=r"stopped after .* of 256,000 bytes"):
            download(server.url, path)
        assert not path.exists()
    server.break_after = None
    download(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]
    assert [entry.name for entry in path.parent.iterdir()] == ["f.gz"]


@pytest.mark.parametrize("change", ["another file", "no version"])
def test_a_part_of_another_version_is_not_continued(tmp_path: Path, server: Server, change: str) -> None:
    server.break_after = 100_000
    server.with_etag = change != "no version"
    with pytest.raises(NetworkError):
        download(server.url, tmp_path / "f.gz")
    server.break_after, server.etag = None, '"two"'
    download(server.url, tmp_path / "f.gz")
    assert (tmp_path / "f.gz").read_bytes() == CONTENT


def test_a_part_that_is_longer_than_the_file_starts_anew(tmp_path: Path, server: Server) -> None:
    (tmp_path / "f.gz.part").write_bytes(b"x" * 300_000)
    (tmp_path / "f.gz.part.version").write_text('"one"')
    download(server.url, tmp_path / "f.gz")
    assert (tmp_path / "f.gz").read_bytes() == CONTENT


def test_without_a_connection_the_message_says_which_files_to_put_where(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 403
    files = (RemoteFile("reviews_Beauty_5.json.gz", server.url), RemoteFile("meta_Beauty.json.gz", server.url))
    monkeypatch.setattr(amazon, "files_of", lambda *_: files)
    for options in ({}, {"download": False}):
        with pytest.raises(UserError) as error:
            run(
                load_config(
                    PrepareConfig, dataset_code="beauty", raw_dir=tmp_path / "raw", out=tmp_path / "ds", **options
                )
            )
        assert str(tmp_path / "raw" / "reviews_Beauty_5.json.gz") in str(error.value)
        assert str(tmp_path / "raw" / "meta_Beauty.json.gz") in str(error.value)
        assert server.url in str(error.value)
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize(
    ("code", "release", "reviews", "meta"),
    [
        ("beauty", "2014", "reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"),
        ("games", "2014", "reviews_Video_Games_5.json.gz", "meta_Video_Games.json.gz"),
        ("Video_Games", "2018", "Video_Games_5.json.gz", "meta_Video_Games.json.gz"),
        ("beauty", "2018", "All_Beauty_5.json.gz", "meta_All_Beauty.json.gz"),
        ("toys", "2023", "Toys_and_Games.jsonl.gz", "meta_Toys_and_Games.jsonl.gz"),
    ],
)
def test_codes_name_the_files_of_each_release(code: str, release: str, reviews: str, meta: str) -> None:
    files = files_of(code, release)
    assert [file.name for file in files] == [reviews, meta]
    assert all(file.url.startswith("https://") and file.url.endswith(file.name) for file in files)


def test_a_code_cannot_leave_the_folder() -> None:
    with pytest.raises(UserError, match="is not a name"):
        files_of("../secret", "2014")


@pytest.mark.parametrize("place", [".", "sub"])
def test_files_are_found_in_the_folder_or_one_below_packed_or_not(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "reviews_Beauty_5.json").write_text("")
    (folder / "meta_Beauty.json.gz").write_text("")
    found = locate("beauty", "2014", tmp_path, allow_download=False)
    assert [path.name for path in found] == ["reviews_Beauty_5.json", "meta_Beauty.json.gz"]


@pytest.mark.shared_data
def test_gift_cards_by_their_code(tmp_path: Path, shared_data: Path) -> None:
    options: dict[str, Any] = {
        "dataset_code": "gifts",
        "release": "2018",
        "raw_dir": shared_data,
        "out": tmp_path / "ds",
    }
    assert "about 2,972 rows" in str(dry_run(load_config(PrepareConfig, **options)).lines["reviews"])
    assert run(load_config(PrepareConfig, **options)).counts["users"] > 400

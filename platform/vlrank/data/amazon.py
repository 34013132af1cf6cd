"""Amazon data sets by code: their files, addresses and download.

Releases: 2014 (McAuley et al. 2015), 2018 (Ni et al. 2019), 2023 (Hou et al. 2024). The 5-core review files are used
where a release has them, because the benchmarks of the field start from those.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vlrank.console import console, progress
from vlrank.data.tables import disk_errors
from vlrank.errors import UserError

CODES: dict[str, dict[str, str]] = {
    "2014": {
        "automotive": "Automotive",
        "baby": "Baby",
        "beauty": "Beauty",
        "books": "Books",
        "cds": "CDs_and_Vinyl",
        "clothing": "Clothing_Shoes_and_Jewelry",
        "electronics": "Electronics",
        "food": "Grocery_and_Gourmet_Food",
        "games": "Video_Games",
        "garden": "Patio_Lawn_and_Garden",
        "health": "Health_and_Personal_Care",
        "home": "Home_and_Kitchen",
        "instruments": "Musical_Instruments",
        "kindle": "Kindle_Store",
        "movies": "Movies_and_TV",
        "music": "Digital_Music",
        "office": "Office_Products",
        "pets": "Pet_Supplies",
        "phones": "Cell_Phones_and_Accessories",
        "sports": "Sports_and_Outdoors",
        "tools": "Tools_and_Home_Improvement",
        "toys": "Toys_and_Games",
    }
}
CODES["2018"] = {code: name for code, name in CODES["2014"].items() if code not in ("baby", "health")} | {
    "beauty": "All_Beauty",
    "fashion": "AMAZON_FASHION",
    "gifts": "Gift_Cards",
    "luxury": "Luxury_Beauty",
    "magazines": "Magazine_Subscriptions",
    "pantry": "Prime_Pantry",
    "scientific": "Industrial_and_Scientific",
    "software": "Software",
}
CODES["2023"] = {code: name for code, name in CODES["2018"].items() if code not in ("luxury", "pantry")} | {
    "baby": "Baby_Products",
    "fashion": "Amazon_Fashion",
    "health": "Health_and_Personal_Care",
}
"""Short codes of each release; any other code is taken as the full name of a category, e.g. ``Video_Games``."""

_BASES = {
    "2014": "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles",
    "2018": "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2",
    "2023": "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw",
}
_CHUNK = 1 << 20


class NetworkError(UserError):
    """A file that cannot be downloaded, for now or from here."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One raw file: its name in ``raw_dir`` and its public address."""

    name: str
    url: str


def files_of(code: str, release: str) -> tuple[RemoteFile, RemoteFile]:
    """(reviews, metadata) of a data set.

    Raises:
        UserError: a code that cannot be a category's name.
    """
    name = CODES[release].get(code.lower(), code)
    if not name.replace("_", "").isalnum():
        raise UserError(
            f"dataset_code {code!r} is not a name", f"Known for {release}: {', '.join(sorted(CODES[release]))}."
        )
    base = _BASES[release]
    if release == "2014":
        reviews, meta = f"reviews_{name}_5.json.gz", f"meta_{name}.json.gz"
        return RemoteFile(reviews, f"{base}/{reviews}"), RemoteFile(meta, f"{base}/{meta}")
    if release == "2018":
        reviews, meta = f"{name}_5.json.gz", f"meta_{name}.json.gz"
        return RemoteFile(reviews, f"{base}/categoryFilesSmall/{reviews}"), RemoteFile(
            meta, f"{base}/metaFiles2/{meta}"
        )
    reviews, meta = f"{name}.jsonl.gz", f"meta_{name}.jsonl.gz"
    return RemoteFile(reviews, f"{base}/review_categories/{reviews}"), RemoteFile(
        meta, f"{base}/meta_categories/{meta}"
    )


def locate(code: str, release: str, raw_dir: Path, *, allow_download: bool) -> tuple[Path, Path]:
    """The (reviews, metadata) files of a data set, downloaded first where they are missing.

    Raises:
        UserError: missing and not downloadable; the message says which files to put where.
    """
    remote = files_of(code, release)
    found = [_find(raw_dir, file.name) for file in remote]
    missing = [file for file, path in zip(remote, found, strict=True) if path is None]
    if missing and allow_download:
        try:
            for file in missing:
                download(file.url, raw_dir / file.name)
        except UserError as error:
            if not isinstance(error.__cause__, OSError | http.client.HTTPException):
                raise
            raise UserError(
                f"dataset_code {code}: {error.problem}", _instructions(remote, raw_dir)
            ) from error.__cause__
        found = [_find(raw_dir, file.name) for file in remote]
    elif missing:
        names = " and ".join(file.name for file in missing)
        raise UserError(f"dataset_code {code}: {names} not found in {raw_dir}", _instructions(remote, raw_dir))
    reviews, meta = found
    assert reviews is not None
    assert meta is not None
    return reviews, meta


def _find(raw_dir: Path, name: str) -> Path | None:
    """The file in the folder or one below, also unpacked."""
    for wanted in (name, name.removesuffix(".gz")):
        for path in (raw_dir / wanted, *sorted(raw_dir.glob(f"*/{wanted}"))):
            if path.is_file():
                return path
    return None


def _instructions(files: tuple[RemoteFile, ...], raw_dir: Path) -> str:
    lines = [f"  {raw_dir / file.name}\n    from {file.url}" for file in files]
    return "Put these files there (plain or unpacked) and run the same command again:\n" + "\n".join(lines)


def download(url: str, path: Path, *, timeout_s: float = 60) -> None:
    """Download to ``path``, going on where an earlier try stopped; the file appears when it is whole.

    Received bytes are kept in ``NAME.part``. A later call asks for the rest, on the condition that the server's file is
    still the same (ETag or date, RFC 9110 If-Range); the size is checked against what the server announced.

    Raises:
        NetworkError: no connection, an error of the server, or a wrong size.
        UserError: no space left.
    """
    part = path.with_name(f"{path.name}.part")
    version = path.with_name(f"{path.name}.part.version")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() and version.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "vlrank", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", version.read_text(encoding="utf-8"))
    with _network_errors(url):
        try:
            response = urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # the part is longer than the file: start over
                raise
            part.unlink()
            return download(url, path, timeout_s=timeout_s)
        with response:
            have = have if response.status == 206 else 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length is not None else None
            with disk_errors(path), part.open("ab" if have else "wb") as target:
                _note_version(version, response.headers.get("ETag") or response.headers.get("Last-Modified"))
                _copy(response, target, path.name, have, total)
    size = part.stat().st_size
    if total is not None and size != total:
        raise NetworkError(f"{url} stopped after {size:,} of {total:,} bytes", "The same command goes on from there.")
    with disk_errors(path):
        part.replace(path)
        version.unlink(missing_ok=True)
    console.print(f"downloaded {path} ({size:,} bytes)")
    return None


def _note_version(path: Path, version: str | None) -> None:
    if version is None or version.startswith("W/"):  # not accepted by If-Range: a later attempt starts over
        path.unlink(missing_ok=True)
    else:
        path.write_text(version, encoding="utf-8")


def _copy(source: IO[bytes], target: IO[bytes], name: str, have: int, total: int | None) -> None:
    megabytes = None if total is None else -(-total // _CHUNK)
    with progress(f"{name} (MiB)", megabytes) as bar:
        bar.advance(have // _CHUNK)
        while chunk := source.read(_CHUNK):
            target.write(chunk)
            bar.advance(1)


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        raise NetworkError(f"{url} answers {error.code} {error.reason}") from error
    except UserError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise NetworkError(f"{url} cannot be downloaded: {reason}") from error

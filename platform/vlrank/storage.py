"""Places by URL: datasets, runs and rankings in a bucket (``s3://``, ``gs://``) as well as in a folder.

A place is a `pathlib.Path` or a `BucketPath`, which answers to the part of pathlib's interface that stages use, so most
code does not know which it has. What is different about buckets, and how it is kept safe:

- **There is no rename.** A file is written on the local disk first and uploaded in one piece; object stores show an
  object whole or not at all. What belongs together is uploaded before the file that commits it (a dataset's manifest,
  Ray Train's list of checkpoints), so readers see all of it or none.
- **There is no lock.** `claim` stands in for it with an object that its holder keeps renewing.
- **There are no local files.** Libraries that need them (Pillow, safetensors, vLLM) get a copy from this node's cache:
  `fetch`, `fetch_model`.

Credentials are the providers' own: ``AWS_*`` (with ``AWS_ENDPOINT_URL`` for other S3 servers), ``~/.aws``, the
machine's role; ``GOOGLE_APPLICATION_CREDENTIALS``. PyArrow brings the clients.

universal-pathlib (fsspec with s3fs and gcsfs) has pathlib's names for buckets but does not keep these promises. Tested
with 0.3.10 and s3fs 2026.9.0: a file whose writing fails is committed half, and listings are cached, so `claim` would
miss another run's object. Claims and a cache that the processes of a node share would still have to be written here,
over a second set of clients: Parquet, Ray Data and Ray Train use PyArrow's.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import functools
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar, Union
from urllib.parse import unquote, urlsplit

from pydantic import BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from vlrank.errors import UserError

if TYPE_CHECKING:
    import pyarrow.fs

T = TypeVar("T")
R = TypeVar("R")

SCHEMES = ("s3", "gs")
LEASE_S = 30.0
"""Seconds without renewal after which a claim counts as abandoned."""

_AT_ONCE = 16  # concurrent requests; a bucket answers each in tens of milliseconds
_MODEL_FILES = (
    ".safetensors",
    ".json",
    ".jinja",
    ".txt",
    ".model",
)  # the other files of a checkpoint serve to resume training
_CONTENT_NAME = re.compile(r"[0-9a-f]{64}")


def is_url(text: object) -> bool:
    """Whether this names a place by URL."""
    return isinstance(text, str) and "://" in text


def location(place: str | os.PathLike[str] | BucketPath) -> Location:
    """The place that a path or URL names; ``file://`` URLs are paths.

    Raises:
        UserError: a scheme that is not known, a URL without a bucket, or a name that is not UTF-8.
    """
    if isinstance(place, BucketPath):
        return place
    text = os.fspath(place)
    _check_utf8(text)
    if not is_url(text):
        return Path(text)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return BucketPath.parse(text)


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that Python keeps as lone surrogates; Arrow and JSON have no such text
        raise UserError(
            f"the name {text!r} is not {sys.getfilesystemencoding()}",
            "Rename it, or set LC_ALL=C.UTF-8 if the terminal's language is what makes it so.",
        ) from None


@dataclass(frozen=True, slots=True, order=True)
class BucketPath:
    """An object, or the folder that a common beginning of keys stands for.

    Methods mean what they mean in pathlib. A missing object raises FileNotFoundError; refused credentials, a missing
    bucket and an unreachable server raise `UserError`.

    Attributes:
        scheme: One of `SCHEMES`.
        bucket: Name of the bucket.
        key: Without slashes at its ends; empty for the bucket itself.
    """

    scheme: str
    bucket: str
    key: str = ""

    @classmethod
    def parse(cls, url: str) -> BucketPath:
        """From a URL.

        Raises:
            UserError: a scheme that is not known, no bucket, or a key that is no path.
        """
        scheme, _, rest = url.partition("://")
        scheme = {"gcs": "gs", "s3a": "s3"}.get(scheme.lower(), scheme.lower())
        if scheme not in SCHEMES:
            raise UserError(
                f"{url}: storage `{scheme}://` is not known", "Give a folder, or a URL with s3://, gs:// or file://."
            )
        bucket, _, key = rest.partition("/")
        parts = [part for part in key.split("/") if part]
        if not bucket or "@" in bucket or {".", ".."} & set(parts):
            raise UserError(f"{url} is not of the form {scheme}://BUCKET/PATH")
        return cls(scheme, bucket, "/".join(parts))

    # ---- names ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return f"{self.scheme}://{self._path}"

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __truediv__(self, other: str | PurePosixPath) -> BucketPath:
        return BucketPath(self.scheme, self.bucket, str(PurePosixPath(self.key) / other))

    @property
    def _path(self) -> str:
        """As PyArrow names it: the bucket is the first folder."""
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    @property
    def name(self) -> str:
        """The last part; the bucket's name at its top."""
        return PurePosixPath(self._path).name

    @property
    def stem(self) -> str:
        """`name` without its suffix."""
        return PurePosixPath(self._path).stem

    @property
    def suffix(self) -> str:
        """``.parquet``."""
        return PurePosixPath(self._path).suffix

    @property
    def parent(self) -> BucketPath:
        """The folder around it."""
        return BucketPath(self.scheme, self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> BucketPath:
        """A sibling."""
        return self.parent / name

    def relative_to(self, other: BucketPath) -> PurePosixPath:
        """The way from a folder around it."""
        return PurePosixPath(self._path).relative_to(other._path)

    def resolve(self) -> BucketPath:
        """Itself: URLs are absolute."""
        return self

    absolute = resolve

    # ---- looking ----------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is an object, or a folder with something in it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        import pyarrow.fs

        with _explained(self):
            return bool(self.file_system.get_file_info(self._path).type == pyarrow.fs.FileType.File)

    def is_dir(self) -> bool:
        """Whether an object exists below; an emptied folder does not exist."""
        entries = self._listed(recursive=False)
        # S3 clients mark emptied folders by objects of no size, which PyArrow shows as folders.
        return any(info.is_file for info in entries) or (bool(entries) and any(True for _ in self.files()))

    def files(self) -> Iterator[BucketPath]:
        """All objects below, at any depth."""
        return (self._child(info.path) for info in self._listed(recursive=True) if info.is_file)

    def iterdir(self) -> Iterator[BucketPath]:
        """The folder's direct entries."""
        return (self._child(info.path) for info in self._listed(recursive=False))

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Entries below that match, part by part; ``**`` is not supported."""
        parts = pattern.split("/")
        for info in self._listed(recursive=len(parts) > 1):
            place = self._child(info.path)
            names = place.relative_to(self).parts
            if len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts)):
                yield place

    def _listed(self, *, recursive: bool) -> list[Any]:
        """PyArrow's ``FileInfo`` of everything below."""
        from pyarrow.fs import FileInfo, FileSelector, FileType

        # In gs:// PyArrow lists only folders that it created itself: folders are derived from the objects in them.
        derived = self.scheme == "gs" and not recursive
        selector = FileSelector(self._path, allow_not_found=True, recursive=recursive or derived)
        with _explained(self):
            found = list(self.file_system.get_file_info(selector))
        if not derived:
            return found
        top: dict[str, Any] = {}
        for info in found:
            name, _, deeper = info.path.removeprefix(f"{self._path}/").partition("/")
            top.setdefault(name, FileInfo(f"{self._path}/{name}", FileType.Directory) if deeper else info)
        return list(top.values())

    def _child(self, path: str) -> BucketPath:
        return BucketPath(self.scheme, self.bucket, path.partition("/")[2].rstrip("/"))

    # ---- reading and writing ----------------------------------------------------------------------------------------

    def open(self, mode: str = "rb") -> Any:
        """The object as a readable, seekable stream; each read is a request."""
        assert mode == "rb"
        with _explained(self):
            return self.file_system.open_input_file(self._path)

    def read_bytes(self) -> bytes:
        """The whole object."""
        with _explained(self), self.open() as stream:
            return bytes(stream.read(stream.size()))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: Any) -> None:
        """Put the object: whole or not at all. ``data`` is anything with the buffer protocol."""
        with _explained(self), self.file_system.open_output_stream(self._path) as stream:
            stream.write(
                data
            )  # in one write: closing a stream commits its content, even after an error between two writes

    def upload(self, source: Path) -> None:
        """Put a local file, of any size."""
        import pyarrow as pa

        if source.stat().st_size == 0:
            self.write_bytes(b"")
            return
        with pa.memory_map(str(source)) as content:
            self.write_bytes(content.read_buffer())

    def download(self, target: Path) -> None:
        """Write the object to a local file; whole or not at all."""
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _explained(self), self.open() as stream, temporary.open("wb") as file:
                shutil.copyfileobj(stream, file, 32 << 20)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def copy_to(self, target: BucketPath) -> None:
        """Copy within a bucket, on the server."""
        with _explained(target):
            self.file_system.copy_file(self._path, target._path)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            with _explained(self):
                self.file_system.delete_file(self._path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Does nothing: a folder exists as soon as it holds an object."""

    def size(self) -> int:
        """Bytes of the object."""
        with self.open() as stream:
            return int(stream.size())

    def version(self) -> str:
        """A value that changes with the content: the entity tag, else time and size."""
        with self.open() as stream:
            tags = {key.lower(): value for key, value in dict(stream.metadata() or {}).items()}
            tag = tags.get(b"etag") or tags.get("etag")
            return str(tag or f"{tags}{stream.size()}")

    @property
    def file_system(self) -> pyarrow.fs.FileSystem:
        """The connected file system; the first use of a bucket checks that it exists.

        Raises:
            UserError: it is not, or the credentials are refused, or nothing answers.
        """
        return _connected(self.scheme, self.bucket, os.getpid())

    @property
    def in_file_system(self) -> str:
        """The path in `file_system`, for libraries that take both."""
        return self._path

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.is_instance_schema(cls, serialization=core_schema.to_string_ser_schema())


Location: TypeAlias = Union[Path, BucketPath]  # noqa: UP007 (evaluated before BucketPath can be joined by |)
"""A file or folder, on a disk or in a bucket."""


def _location_key(value: Any) -> Any:
    if not isinstance(value, str | Path | BucketPath):
        raise ValueError("a path or URL is expected")
    return location(value)


def _local_key(value: Any) -> Any:
    if not isinstance(value, str | Path):
        return value
    place = location(value)
    if isinstance(place, BucketPath):
        raise ValueError("only a local or shared folder or file can be used here")
    return place


ConfigLocation: TypeAlias = Annotated[Location, BeforeValidator(_location_key)]
"""A config key that takes paths and URLs."""
LocalPath: TypeAlias = Annotated[Path, BeforeValidator(_local_key)]
"""A config key that takes paths only, and says so."""


# ---- connecting ------------------------------------------------------------------------------------------------------


@functools.cache
def _connected(scheme: str, bucket: str, process: int) -> pyarrow.fs.FileSystem:
    """A client of the bucket, per process: the SDKs do not survive a fork."""
    import pyarrow.fs

    place = BucketPath(scheme, bucket)
    with _explained(place):
        # A wrong address or key is reported at once; running work waits out an unavailable server.
        if _client(scheme, bucket, patient=False).get_file_info(bucket).type == pyarrow.fs.FileType.NotFound:
            raise UserError(f"bucket {place} does not exist", "Check its name, or make it: vlrank makes no buckets.")
        return _client(scheme, bucket, patient=True)


def _client(scheme: str, bucket: str, *, patient: bool) -> pyarrow.fs.FileSystem:
    import pyarrow.fs

    if scheme == "gs":
        return pyarrow.fs.GcsFileSystem(retry_time_limit=timedelta(seconds=120 if patient else 4))
    retries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=8 if patient else 2)
    options: dict[str, Any] = {"retry_strategy": retries, "allow_delayed_open": True}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        parts = urlsplit(endpoint if is_url(endpoint) else f"https://{endpoint}")
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    elif not region:
        region = pyarrow.fs.resolve_s3_region(bucket)
    return pyarrow.fs.S3FileSystem(region=region or "us-east-1", **options)


_REFUSED = (
    *("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT", "EXPIRED_TOKEN", "HTTP status 401"),
    *("HTTP status 403", "PERMISSION_DENIED", "Permission denied", "InvalidAccessKeyId", "UNAUTHENTICATED"),
    "OAuth2 access token",
)
_UNREACHABLE = ("NETWORK_CONNECTION", "curlCode", "UNAVAILABLE", "Could not connect", "Couldn't resolve")


@contextmanager
def _explained(place: BucketPath) -> Iterator[None]:
    """The clients' errors as messages that say what to do."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            remedy = f"Free some in {cache_folder()}, or set VLRANK_CACHE to a folder on another disk."
            raise UserError(f"no space is left on this machine for a copy of {place}", remedy) from error
        raise _user_error(place, str(error)) from error


def _user_error(place: BucketPath, text: str) -> UserError:
    said = text if len(text) <= 300 else f"{text[:297]}..."
    if "NO_SUCH_BUCKET" in text or ("Bucket" in text and "not found" in text):
        return UserError(f"bucket {place.scheme}://{place.bucket} does not exist", "Check its name, or make it.")
    if any(sign in text for sign in _REFUSED):
        return UserError(f"{place}: the credentials were refused ({said})", _CREDENTIALS[place.scheme])
    if any(sign in text for sign in _UNREACHABLE):
        return UserError(f"{place}: the storage server does not answer ({said})", _ADDRESS[place.scheme])
    return UserError(f"{place}: {said}", "Run the same command again: what was committed is intact.")


_CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or the machine's role) with the right to "
    "list, read, write and delete in the bucket, on every node.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to the key file of an account with the right to list, read, write and "
    "delete in the bucket, on every node.",
}
_ADDRESS = {
    "s3": "Check the network, AWS_REGION and AWS_ENDPOINT_URL, then run the same command again.",
    "gs": "Check the network, then run the same command again.",
}


# ---- this node's cache -----------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where this node keeps copies: ``VLRANK_CACHE``, by default ``~/.cache/vlrank``. It may be deleted at any time."""
    return Path(os.environ.get("VLRANK_CACHE") or Path.home() / ".cache" / "vlrank")


def fetch(place: str | Location) -> Path:
    """A local file with the content of ``place``: itself, or a copy in this node's cache.

    Raises:
        FileNotFoundError: no such object.
    """
    remote = location(place)
    if isinstance(remote, Path):
        return remote
    # Pictures of datasets are named by their content: no need to ask whether they have changed.
    version = "" if _CONTENT_NAME.fullmatch(remote.stem) else remote.version()
    digest = hashlib.sha256(f"{remote}\0{version}".encode()).hexdigest()
    target = cache_folder() / "files" / digest[:2] / digest[2:] / remote.name
    if not target.is_file():
        remote.download(target)
    return target


def fetch_model(model: str | Location) -> str:
    """A model's folder on this node; hub names and local folders stay what they are.

    Raises:
        UserError: nothing there.
    """
    if not isinstance(model, BucketPath) and not is_url(model):
        return str(model)
    remote = location(model)
    if isinstance(remote, Path):
        return str(remote)
    listed = [info for info in remote._listed(recursive=False) if info.is_file]
    files = sorted(f"{info.path}\0{info.size}\0{info.mtime_ns}" for info in listed)
    if not files:
        raise UserError(f"{remote} holds no model", "Give a run folder of `vlrank train` or a checkpoint.")
    digest = hashlib.sha256("\n".join([str(remote), *files]).encode()).hexdigest()[:32]
    target = cache_folder() / "models" / digest / remote.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one engine per node downloads the model; the others wait
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as draft:
                places = [remote._child(info.path) for info in listed]
                wanted = [place for place in places if place.suffix in _MODEL_FILES]
                list(each(lambda place: place.download(Path(draft) / "model" / place.name), wanted))
                (Path(draft) / "model").rename(target)
    return str(target)


# ---- for places of both kinds ----------------------------------------------------------------------------------------


def each(work: Callable[[T], R], places: Sequence[T]) -> Iterator[R]:
    """Results of ``work`` for every place, in order: one at a time on a disk, concurrently in a bucket.

    Lazy: only a few results wait in memory, and only requested results are computed.
    """
    return several(work, places, at_once=bool(places) and isinstance(places[0], BucketPath))


def several(work: Callable[[T], R], places: Sequence[T], *, at_once: bool) -> Iterator[R]:
    """`each`, for arguments that are no places: the caller says whether to run concurrently."""
    if not at_once:
        yield from map(work, places)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting: deque[Future[R]] = deque()
        for place in places:
            waiting.append(pool.submit(work, place))
            if len(waiting) >= 2 * _AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def listing(folder: Location, pattern: str) -> list[Location]:
    """Matching entries of a folder, sorted by name; empty where the folder does not exist."""
    found: list[Any] = list(folder.glob(pattern))
    return sorted(found)


def remove_tree(place: Location, *, keep: Sequence[Location] = ()) -> None:
    """Delete a folder and its content, if it exists; in a bucket some files can be kept."""
    if isinstance(place, Path):
        assert not keep
        if place.exists():
            shutil.rmtree(place)
    elif keep:
        kept = set(keep)
        list(each(lambda file: file.unlink(missing_ok=True), [file for file in place.files() if file not in kept]))
    else:
        with suppress(FileNotFoundError), _explained(place):
            place.file_system.delete_dir(place.in_file_system)


def writable(place: Location) -> bool:
    """Whether the system allows writing there; always true for a bucket, where only an attempt can tell."""
    if isinstance(place, BucketPath):
        return True
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0))


def require_writable(place: Location, remedy: str) -> None:
    """Refuse a place that cannot be written to, before any work is done.

    Raises:
        UserError: on a read-only file system, or no permission.
    """
    if not writable(place):
        raise UserError(f"{place} cannot be written to: the file system is read-only, or permission is missing", remedy)


def upload_tree(source: Path, target: BucketPath, *, last: str | None = None) -> None:
    """Upload every file of a local folder; the file called ``last`` comes after all others."""
    files = {str(path.relative_to(source)): path for path in sorted(source.rglob("*")) if path.is_file()}
    early = [name for name in files if name != last]
    list(several(lambda name: (target / name).upload(files[name]), early, at_once=True))
    if last is not None:
        (target / last).upload(files[last])


# ---- locks and claims ------------------------------------------------------------------------------------------------


def take_lock(opened: int | IO[Any], refusal: UserError) -> None:
    """Lock an open file or folder, without waiting; the system releases the lock when it is closed or the process ends.

    Raises:
        UserError: ``refusal``, where another process holds the lock.
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise refusal from None
        raise


Held = Callable[[], None]
"""Raises a `UserError` once the claim has been lost."""


@contextmanager
def claim(folder: BucketPath) -> Iterator[Held]:
    """Claim a folder of a bucket while the block runs; yields a check that the claim is still held.

    Each claimant puts an object of its own into ``.NAME.lock/`` beside the folder, keeps renewing it, and *then* looks
    for others: of two simultaneous claimants at least one sees the other. An object that is not renewed during a whole
    lease belongs to a dead process and is removed, so a run after a crash waits for half a minute. A process that was
    cut off from the storage for that long has lost its claim: call the check before any step that two processes must
    not both take.

    Raises:
        UserError: another run is at work there, or the folder cannot be written to.
    """
    own = folder.with_name(f".{folder.name}.lock") / uuid.uuid4().hex
    with _renewed(own) as lost:

        def held() -> None:
            if lost.is_set():
                raise UserError(
                    f"another run has taken over {folder}, or may have: this one was cut off from the storage",
                    "See that no other run is at work there, then run the same command again: "
                    "what was committed is intact.",
                )

        before = _claims(own)
        end = time.monotonic() + LEASE_S
        while before and time.monotonic() < end:
            time.sleep(LEASE_S / 10)
            now = _claims(own)
            # A later claimant sees this claim and waits: no need to wait for it.
            alive = [token for token in before if token in now and now[token] != before[token]]
            if alive:
                raise UserError(
                    f"another run ({now[alive[0]].rpartition(' ')[0]}) is writing to {folder}",
                    "Wait until it has finished, or stop it.",
                )
            before = {token: text for token, text in before.items() if token in now}
        list(each(lambda token: token.unlink(missing_ok=True), list(before)))
        yield held


@contextmanager
def exclusive(folder: Location) -> Iterator[Held]:
    """Hold the folder's lock, and give a check that it is still held; the system releases it when the process ends."""
    if isinstance(folder, BucketPath):
        with claim(folder) as held:
            yield held
        return
    with (folder / ".lock").open("w") as file:
        try:
            take_lock(file, UserError(f"another run is writing to {folder}", "Wait until it has finished, or stop it."))
        except OSError as error:
            raise UserError(
                f"{folder} is on a file system without locks ({error.strerror}): two runs could write there at once",
                "Have it mounted with locks (Lustre: the option flock; NFS: version 4, or lockd on server and client), "
                "or use another folder or a bucket.",
            ) from error
        yield lambda: None  # a lock of the system is not lost


def _claims(own: BucketPath) -> dict[BucketPath, str]:
    """The other claims and what they say."""
    found = {}
    for token in own.parent.iterdir():
        if token != own:
            with suppress(FileNotFoundError):
                found[token] = token.read_text()
    return found


@contextmanager
def _renewed(token: BucketPath) -> Iterator[threading.Event]:
    """The object, rewritten four times per lease while the block runs, then deleted.

    Yields an event that is set once the object is gone, or was not renewed for a lease and counts as abandoned.
    """
    who = f"on {socket.gethostname()}, process {os.getpid()}"
    done, lost = threading.Event(), threading.Event()

    def renew() -> None:
        number, renewed = 1, time.monotonic()
        while not done.wait(LEASE_S / 4):
            number, now = number + 1, time.monotonic()
            with suppress(UserError, OSError):  # the next renewal may succeed
                if not token.is_file():
                    break  # rewriting it would put it beside the claim of the run that removed it
                token.write_bytes(f"{who} {number}".encode())
                if time.monotonic() - renewed < LEASE_S:
                    renewed = now
            if time.monotonic() - renewed >= LEASE_S:
                break
        else:
            return
        lost.set()

    token.write_bytes(f"{who} 1".encode())
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield lost
    finally:
        done.set()
        thread.join()
        with suppress(UserError, OSError):
            token.unlink(missing_ok=True)

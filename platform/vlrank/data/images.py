"""Pictures of items: fetched within limits, verified by decoding, brought to RGB and stored by content.

Metadata is not trusted: only http(s) is fetched, every redirect is checked like the first address, addresses that are
not public are refused when the connection is made (so a name cannot point elsewhere a moment later), sizes are
limited before and while reading, and pixels before decoding.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import os
import random
import socket
import stat
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from vlrank.config import PictureLimits, PicturesConfig, RayConfig
from vlrank.data.picture import is_strip, open_picture, orientation, to_rgb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MIN_SIDE = 8  # shops answer with one-pixel pictures where they have none
_REDIRECTS = {301, 302, 303, 307, 308}
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MAX_PAUSE_S = 120.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class PictureError(Exception):
    """A picture that cannot be fetched or read.

    Attributes:
        error_type: Kind, for counting.
        retry: Whether trying again may help.
        pause_s: What the server asked to wait, if it did.
    """

    def __init__(self, error_type: str, message: str, *, retry: bool = False, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.error_type = error_type
        self.retry = retry
        self.pause_s = pause_s


@dataclass(frozen=True, slots=True)
class Fetched:
    """One source and its picture, or why there is none.

    Attributes:
        source: URL or path.
        data: The encoded RGB picture; None after a failure.
        suffix: ``jpg`` or ``png``.
        error_type: None after a success.
        message: The reason of a failure.
    """

    source: str
    data: bytes | None = None
    suffix: str | None = None
    error_type: str | None = None
    message: str | None = None


# ---- decoding -------------------------------------------------------------------------------------------------------


def normalise(data: bytes, max_pixels: int) -> tuple[bytes, str]:
    """Verify a picture by decoding it, turn it upright (EXIF) and bring it to RGB.

    A picture that is upright RGB already keeps its bytes, so nothing is lost by encoding it again; transparency is
    laid on white; of an animation the first frame counts.

    Returns:
        (encoded picture, ``jpg`` or ``png``).

    Raises:
        PictureError: not a picture, damaged, or outside the limits.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            picture = open_picture(io.BytesIO(data), _FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError("TooManyPixels", str(error)) from None
    except Exception as error:
        message = f"{_kind(data)} of {len(data)} bytes ({type(error).__name__}), expected {', '.join(_FORMATS)}"
        raise PictureError("NotAPicture", message if data else "an empty file") from None
    width, height = picture.size
    if width * height > max_pixels:
        raise PictureError("TooManyPixels", f"{width} x {height} pixels, at most {max_pixels} are allowed")
    if min(width, height) < _MIN_SIDE or is_strip(width, height):
        raise PictureError("BadShape", f"{width} x {height} pixels: a placeholder or a strip, not a product's picture")
    source_format = picture.format
    try:
        picture.load()
        transparent = picture.has_transparency_data
        plain = picture.mode == "RGB" and not transparent and not getattr(picture, "is_animated", False)
        if plain and orientation(picture) == 1 and source_format in ("JPEG", "PNG"):
            return data, "jpg" if source_format == "JPEG" else "png"
        rgb = to_rgb(picture)
    except Exception as error:  # decoders raise many kinds of errors on hostile data
        raise PictureError("Undecodable", f"{source_format}: {type(error).__name__}: {error}") from None
    buffer = io.BytesIO()
    if source_format in ("JPEG", "WEBP") and not transparent:
        rgb.save(buffer, "JPEG", quality=95)
        return buffer.getvalue(), "jpg"
    rgb.save(buffer, "PNG")
    return buffer.getvalue(), "png"


def _kind(data: bytes) -> str:
    """What a file that cannot be opened seems to be."""
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if b"<svg" in start:
        return "an SVG drawing"
    if data.startswith((b"II*\0", b"MM\0*")):
        return "a TIFF picture"
    if data[4:8] == b"ftyp":
        return "an AVIF picture" if data[8:12] in (b"avif", b"avis") else "a HEIC picture or a film"
    return "no known picture"


# ---- fetching -------------------------------------------------------------------------------------------------------


def is_public(address: str) -> bool:
    """Whether an IP address is public: not private, local, shared, multicast or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def check_url(url: str, *, allow_private: bool) -> str:
    """The host of an address that may be fetched.

    Raises:
        PictureError: another scheme than http(s), no host, or the literal address of a private host.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise PictureError("BadAddress", f"{url[:200]}: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise PictureError("BadAddress", f"{url[:200]}: only http and https are fetched")
    if not host:
        raise PictureError("BadAddress", f"{url[:200]}: no host")
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not allow_private and not is_public(host):
        raise PictureError("PrivateAddress", f"{url[:200]}: {host} is not a public address")
    return host


def _public_resolver() -> Any:
    """A resolver that returns public addresses only, so that the connection uses the checked address."""
    from aiohttp.abc import AbstractResolver
    from aiohttp.resolver import ThreadedResolver

    class PublicResolver(AbstractResolver):
        def __init__(self) -> None:
            self._inner = ThreadedResolver()

        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> Any:
            found = await self._inner.resolve(host, port, family)
            public = [entry for entry in found if is_public(entry["host"])]
            if not public:
                raise PictureError("PrivateAddress", f"{host} resolves to no public address")
            return public

        async def close(self) -> None:
            await self._inner.close()

    return PublicResolver()


@dataclass(slots=True)
class Fetcher:
    """Fetches batches of pictures; keeps each host's pace between batches.

    Attributes:
        config: Limits. ``concurrency_per_host`` and ``requests_per_second`` are this fetcher's own share.
    """

    config: PictureLimits
    _next_start: dict[str, float] = field(default_factory=dict)
    _hosts: dict[str, asyncio.Semaphore] = field(default_factory=dict)

    def fetch(self, sources: Sequence[str]) -> list[Fetched]:
        """All of them, successes and failures, in order."""
        self._hosts = {}  # semaphores belong to the event loop of this call
        return asyncio.run(self.fetch_all(sources))

    async def fetch_all(self, sources: Sequence[str]) -> list[Fetched]:
        """`fetch` in the running event loop; all calls in it share the limits per host."""
        import aiohttp

        decoding = asyncio.Semaphore(max(1, min(4, os.cpu_count() or 1)))  # bounds the decoded pictures in memory
        private = self.config.allow_private
        connector = aiohttp.TCPConnector(limit=128, resolver=None if private else _public_resolver())
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "vlrank", "Accept": "image/*", "Accept-Encoding": "identity"},
            auto_decompress=False,
        ) as session:
            return await asyncio.gather(*(self._fetch_one(session, decoding, source) for source in sources))

    async def _fetch_one(self, session: aiohttp.ClientSession, decoding: asyncio.Semaphore, source: str) -> Fetched:
        try:
            if "://" in source or source.startswith(("data:", "javascript:", "file:")):
                data = await self._download(session, source)
            else:
                data = await asyncio.to_thread(self._read, Path(source))
            async with decoding:
                data, suffix = await asyncio.to_thread(normalise, data, self.config.max_pixels)
        except PictureError as error:
            return Fetched(source, error_type=error.error_type, message=str(error))
        return Fetched(source, data, suffix)

    def _read(self, path: Path) -> bytes:
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise PictureError("NotAFile", f"{path} is not a plain file")
            if found.st_size > self.config.max_bytes:
                raise PictureError("TooLarge", f"{found.st_size} bytes, at most {self.config.max_bytes} are allowed")
            return path.read_bytes()
        except FileNotFoundError:
            raise PictureError("FileNotFound", f"{path} does not exist") from None
        except OSError as error:
            raise PictureError("Unreadable", f"{path}: {error.strerror}") from None

    async def _download(self, session: aiohttp.ClientSession, url: str) -> bytes:
        """One picture; temporary failures are retried."""
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.pause_s if isinstance(error, PictureError) and error.pause_s is not None else 0.0
            doubled = self.config.backoff_s * 2 ** (state.attempt_number - 1)
            return min(_MAX_PAUSE_S, max(asked, doubled * random.uniform(0.5, 1.5)))

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.config.attempts),
            wait=pause,
            retry=retry_if_exception(lambda error: isinstance(error, PictureError) and error.retry),
            reraise=True,
        )
        data: bytes = await retrying(self._follow, session, url)
        return data

    async def _follow(self, session: aiohttp.ClientSession, url: str) -> bytes:
        """One try: the address and its redirects, each checked."""
        for _ in range(self.config.max_redirects + 1):
            host = check_url(url, allow_private=self.config.allow_private)
            async with self._slot(host):
                found = await self._request(session, url)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise PictureError(
            "TooManyRedirects", f"more than {self.config.max_redirects} redirects, the last to {url[:200]}"
        )

    @asynccontextmanager
    async def _slot(self, host: str) -> AsyncIterator[None]:
        """A slot at a host: bounds concurrent requests and their rate."""
        async with self._hosts.setdefault(host, asyncio.Semaphore(self.config.concurrency_per_host)):
            now = time.monotonic()
            start = max(now, self._next_start.get(host, now))
            self._next_start[host] = start + 1 / self.config.requests_per_second
            await asyncio.sleep(start - now)
            yield

    async def _request(self, session: aiohttp.ClientSession, url: str) -> bytes | str:
        """The body, or the address of a redirect."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=self.config.timeout_s)
        try:
            async with session.get(url, allow_redirects=False, timeout=timeout) as response:
                if response.status in _REDIRECTS and "Location" in response.headers:
                    return response.headers["Location"]
                if response.status in _TRANSIENT_STATUS:
                    pause = _retry_after(response.headers.get("Retry-After"))
                    raise PictureError("HttpStatus", f"HTTP {response.status}", retry=True, pause_s=pause)
                if response.status != 200:
                    raise PictureError("HttpStatus", f"HTTP {response.status}")
                return await self._body(response)
        except TimeoutError:
            raise PictureError("Timeout", f"no answer within {self.config.timeout_s:g} s", retry=True) from None
        except aiohttp.InvalidURL as error:
            raise PictureError("BadAddress", f"{url[:200]}: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise PictureError("Connection", f"{type(error).__name__}: {error}", retry=True) from None
        except (ValueError, UnicodeError) as error:
            raise PictureError("BadAddress", f"{url[:200]}: {error}") from None

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self.config.max_bytes
        if response.content_length is not None and response.content_length > limit:
            raise PictureError("TooLarge", f"{response.content_length} bytes, at most {limit} are allowed")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise PictureError("NotAPicture", "the server compressed the picture although it was asked not to")
        body = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            body += chunk
            if len(body) > limit:
                raise PictureError("TooLarge", f"more than {limit} bytes")
        return bytes(body)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3): a number or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


# ---- the stage ------------------------------------------------------------------------------------------------------


def fetch_pictures(sources: Sequence[str], config: PicturesConfig, ray_config: RayConfig) -> Iterator[list[Fetched]]:
    """All sources, fetched in shards; shards come back as they are done, in any order.

    A Ray Data stage of ``config.workers`` actors that share the limits per host between them, so the limits hold for
    the cluster. With 0 workers the same work is done in this process.
    """
    if config.workers == 0:
        fetcher = Fetcher(config)
        for start in range(0, len(sources), config.shard_rows):
            yield fetcher.fetch(sources[start : start + config.shard_rows])
        return
    yield from _fetch_on_ray(sources, config, ray_config)


def _fetch_on_ray(sources: Sequence[str], config: PicturesConfig, ray_config: RayConfig) -> Iterator[list[Fetched]]:
    import pyarrow as pa
    import ray.data

    from vlrank.runtime import quiet_data, ray_session

    workers = min(config.workers, config.concurrency_per_host, -(-len(sources) // config.shard_rows))
    share = config.model_copy(
        update={
            "concurrency_per_host": config.concurrency_per_host // workers,
            "requests_per_second": config.requests_per_second / workers,
        }
    )
    with ray_session(ray_config):
        quiet_data()
        fetched = (
            ray.data.from_arrow(pa.table({"source": pa.array(sources, pa.string())}))
            .repartition(target_num_rows_per_block=config.shard_rows)
            .map_batches(
                FetchStage,
                fn_constructor_args=(share.model_dump(),),
                batch_size=config.shard_rows,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=1,
            )
        )
        for batch in fetched.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield [Fetched(**row) for row in batch.to_pylist()]


class FetchStage:
    """Ray Data's view of a `Fetcher`: batches of ``source`` in, rows of `Fetched` out."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._fetcher = Fetcher(PicturesConfig.model_validate(config))

    def __call__(self, batch: Any) -> Any:
        """One batch, an Arrow table."""
        import pyarrow as pa

        rows = self._fetcher.fetch(batch["source"].to_pylist())
        columns = {
            "source": pa.array([row.source for row in rows], pa.string()),
            "data": pa.array([row.data for row in rows], pa.large_binary()),
            "suffix": pa.array([row.suffix for row in rows], pa.string()),
            "error_type": pa.array([row.error_type for row in rows], pa.string()),
            "message": pa.array([row.message for row in rows], pa.string()),
        }
        return pa.table(columns)

"""Pictures that come with requests: fetched or decoded within limits, and kept on disk for further requests.

A picture is named by its content, so the same one goes through the vision tower once, whoever sends it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from vlrank.config import PictureLimits
from vlrank.data.images import Fetcher, PictureError, normalise
from vlrank.serving.messages import Refused


class InlinePictures:
    """Belongs to one event loop.

    Args:
        limits: As for the pictures of a dataset.
        kept: Pictures that stay when no request shows them any more.
        forget: Told the path of a picture whose file is gone.
    """

    def __init__(self, limits: PictureLimits, kept: int, forget: Callable[[str], None]) -> None:
        self._limits, self._kept, self._forget = limits, kept, forget
        self._fetcher = Fetcher(limits)
        self._decoding = asyncio.Semaphore(2)
        self._folder = tempfile.TemporaryDirectory(prefix="vlrank-pictures-")
        self._shown: OrderedDict[str, int] = OrderedDict()  # path -> requests that show it; the latest used is last

    @asynccontextmanager
    async def files(self, sources: Sequence[tuple[str, str]]) -> AsyncIterator[list[str]]:
        """Paths of pictures, there for the time of the block.

        Args:
            sources: (place in the request, http(s) address or base64).

        Raises:
            Refused: a picture cannot be fetched or read, or is outside the limits.
        """
        paths = []
        try:
            for data, suffix in await asyncio.gather(*(self._load(*source) for source in sources)):
                paths.append(self._hold(data, suffix))
            yield paths
        finally:
            for path in paths:
                self._shown[path] -= 1
            self._evict()

    def close(self) -> None:
        """Delete the files."""
        self._folder.cleanup()

    async def _load(self, where: str, source: str) -> tuple[bytes, str]:
        if source.startswith(("http://", "https://")):
            [fetched] = await self._fetcher.fetch_all([source])
            if fetched.data is None or fetched.suffix is None:
                raise Refused(422, f"{where}: {fetched.error_type}: {fetched.message}")
            return fetched.data, fetched.suffix
        try:
            async with self._decoding:
                return await asyncio.to_thread(self._decode, source)
        except PictureError as error:
            raise Refused(422, f"{where}: {error.error_type}: {error}") from None

    def _decode(self, source: str) -> tuple[bytes, str]:
        text = source
        if source.startswith("data:"):
            head, _, text = source.partition(",")
            if not head.endswith(";base64"):
                raise PictureError("BadAddress", "a data: URL without base64")
        elif "://" in source[:64]:
            raise PictureError("BadAddress", f"{source[:200]}: only http and https are fetched")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise PictureError("NotAPicture", "neither an http(s) address nor base64") from None
        if len(data) > self._limits.max_bytes:
            raise PictureError("TooLarge", f"{len(data)} bytes, at most {self._limits.max_bytes} are allowed")
        return normalise(data, self._limits.max_pixels)

    def _hold(self, data: bytes, suffix: str) -> str:
        path = str(Path(self._folder.name) / f"{hashlib.sha256(data).hexdigest()}.{suffix}")
        if path not in self._shown:
            Path(path).write_bytes(data)
            self._shown[path] = 0
        self._shown[path] += 1
        self._shown.move_to_end(path)
        return path

    def _evict(self) -> None:
        idle = [path for path, requests in self._shown.items() if requests == 0]
        for path in idle[: max(0, len(self._shown) - self._kept)]:
            del self._shown[path]
            Path(path).unlink(missing_ok=True)
            self._forget(path)

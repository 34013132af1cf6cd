"""In Ray Serve's HTTP proxy, around its way to a replica: lost requests are repeated, and Serve's own errors are JSON.

Ray imports this module into every proxy whose environment says so (`CALLBACK`), so it must stay small.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "vlrank.serving.proxy:middlewares"}
"""Environment variable of the proxies of a Ray cluster."""
PATHS = ("/v1/rank", "/v1/rerank", "/v2/rerank", "/health", "/metrics")

_ATTEMPTS = 2
"""More would let a request that kills its replica end them all."""
_KEPT_BYTES = 64 * 2**20
"""Larger bodies are not kept to be sent again."""
_LOST = "the replica that had the request in work gave no answer; try again"


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around its proxy."""
    return [Middleware(Repeater)]


class Repeater:
    """ASGI middleware: sends a request whose replica dies to another one.

    All routes only read. If there is no other replica, Serve keeps the second attempt until the successor is up, for
    at most the server's time limit. Paths of other applications of the cluster pass as they are.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        request, answer = _Request(receive), _Answer(send)
        for _ in range(_ATTEMPTS):
            await self._app({**scope, "headers": [*scope["headers"]]}, request.from_the_start(), answer)
            if answer.begun or request.left:
                return
            if not request.whole:
                break
            answer.forget()
        await answer.refuse(503, _LOST)


class _Request:
    """A request's body, which can be read again.

    Attributes:
        left: The client has gone.
        whole: Everything that was read is kept.
    """

    def __init__(self, receive: Receive) -> None:
        self.left, self.whole = False, True
        self._receive, self._bytes = receive, 0
        self._kept: list[Message] = []

    def from_the_start(self) -> Receive:
        """Reads what was read before and then on."""
        again = iter(self._kept[:])

        async def receive() -> Message:
            return next(again, None) or await self._next()

        return receive

    async def _next(self) -> Message:
        message = await self._receive()
        self.left = message["type"] == "http.disconnect"
        self._bytes += len(message.get("body", b""))
        if self._bytes > _KEPT_BYTES:
            self.whole = False
            self._kept.clear()
        elif not self.left:
            self._kept.append(message)
        return message


class _Answer:
    """Sends an answer as soon as its body begins, until when the request can be repeated; Serve's own texts as JSON."""

    def __init__(self, send: Send) -> None:
        self.begun = False
        self._send = send
        self._start: Message | None = None
        self._text = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._start is None:
            await self._send(message)
            return
        if _is_serves_own(self._start):
            self._text += message.get("body", b"")
            if not message.get("more_body", False):
                await self.refuse(self._start["status"], self._text.decode(errors="replace"), self._start["headers"])
            return
        start, self._start, self.begun = self._start, None, True
        await self._send(start)
        await self._send(message)

    def forget(self) -> None:
        """What an attempt that was lost had begun with."""
        self._start, self._text = None, b""

    async def refuse(self, status: int, text: str, headers: Any = ()) -> None:
        """Answer in the form of the replica's refusals."""
        self._start, self.begun = None, True
        body = json.dumps({"message": text}).encode()
        fields = {name: value for name, value in headers if name not in (b"content-type", b"content-length")}
        fields |= {b"content-type": b"application/json", b"content-length": str(len(body)).encode()}
        if status == 503:
            fields.setdefault(b"retry-after", b"5")
        await self._send({"type": "http.response.start", "status": status, "headers": list(fields.items())})
        await self._send({"type": "http.response.body", "body": body})


def _is_serves_own(start: Message) -> bool:
    kind = dict(start["headers"]).get(b"content-type", b"")
    return start["status"] >= 400 and kind.startswith(b"text/plain")

"""Who may ask, and how much a request may carry: checked before a body is read whole."""

from __future__ import annotations

import hmac
import json
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from vlrank.serving.messages import Refused

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "VLRANK_SERVE_TOKEN"
"""Environment variable: the bearer token that requests have to carry."""

_LOCAL = ("127.0.0.1", "localhost", "::1")
_PROTECTED = ("/v1/", "/v2/", "/metrics")


def needs_token(host: str) -> bool:
    """Whether others than this machine's users could ask at this address."""
    return host not in _LOCAL


class Gate:
    """ASGI middleware: refuses what lacks the token, and bodies that are too large, however they are sent.

    Args:
        app: What is behind it.
        token: Asked for below /v1, /v2 and /metrics; None lets everybody in.
        max_body: Bytes.
    """

    def __init__(self, app: ASGIApp, token: str | None, max_body: int) -> None:
        self._app, self._token, self._max_body = app, token, max_body
        self._too_large = f"the body is larger than {max_body} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:
                raise HTTPException(413, self._too_large)  # FastAPI takes any other error for broken JSON
            return message

        try:
            self._check_token(scope["path"], headers)
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self._max_body:
                raise Refused(413, self._too_large, {"Connection": "close"})
        except Refused as error:
            await _answer(send, error)
            return
        await self._app(scope, limited, send)

    def _check_token(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._token is None or not path.startswith(_PROTECTED):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token.encode()):
            raise Refused(401, "give the server's token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})


async def _answer(send: Send, error: Refused) -> None:
    body = json.dumps({"message": str(error)}).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""What clients get when Ray Serve loses their request or answers it itself; Serve's proxy is played by an ASGI app."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vlrank.serving import proxy
from vlrank.serving.proxy import Repeater

Attempt = Callable[[Scope, Receive, Send], Awaitable[None]]


async def read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    return body


def serve(*attempts: Attempt) -> tuple[ASGIApp, list[Scope]]:
    """An app that does something else with each attempt at a request, and the attempts that it saw."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await attempts[len(seen) - 1](scope, receive, send)

    return Repeater(app), seen


async def lost(scope: Scope, receive: Receive, send: Send) -> None:
    """The replica dies when it has read the request; Serve's proxy then returns without a word."""
    scope["headers"].append((b"x-seen", b"1"))
    await read(receive)


async def lost_on_the_way(scope: Scope, receive: Receive, send: Send) -> None:
    """The replica dies between the head of its answer and the body."""
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"read": len(await read(receive)), "headers": len(scope["headers"])})(scope, receive, send)


def answered(response: Response) -> Attempt:
    return response.__call__


def ask(app: ASGIApp, path: str = "/v1/rank", body: Any = b"{}") -> httpx.Response:
    async def told() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://vlrank") as client:
            return await client.post(path, content=body, headers={"Host": "vlrank"})

    return asyncio.run(told())


async def pieces() -> AsyncIterator[bytes]:
    for _ in range(5):
        yield b" " * 1000


@pytest.mark.parametrize("attempt", [lost, lost_on_the_way])
def test_a_lost_request_is_sent_again_as_it_was(attempt: Attempt) -> None:
    app, seen = serve(attempt, echo)
    undisturbed, _ = serve(echo)
    answer = ask(app, body=pieces())
    assert answer.status_code == 200
    assert answer.json()["read"] == 5000
    assert answer.json() == ask(undisturbed, body=pieces()).json()
    assert len(seen) == 2


def test_a_request_that_is_lost_twice_may_be_sent_again_by_the_client() -> None:
    app, seen = serve(lost, lost, echo)
    answer = ask(app)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert "gave no answer; try again" in answer.json()["message"]
    assert len(seen) == 2, "a request that kills its replica must not go round all of them"


def test_a_body_too_large_to_keep_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_KEPT_BYTES", 4000)
    app, seen = serve(lost, echo)
    answer = ask(app, body=pieces())
    assert (answer.status_code, len(seen)) == (503, 1)
    app, _ = serve(echo)
    assert ask(app, body=pieces()).json()["read"] == 5000


def test_a_request_whose_client_has_left_is_not_sent_again() -> None:
    sent: list[Any] = []
    messages = iter([{"type": "http.request", "body": b"", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    async def leaves(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    app, seen = serve(leaves, echo)
    asyncio.run(app({"type": "http", "path": "/v1/rank", "headers": []}, receive, send))
    assert (len(seen), sent) == (1, [])


@pytest.mark.parametrize(
    ("status", "text", "headers", "waits"),
    [
        (408, "Request 1 timed out after 60.0s.", {}, None),
        (429, "Request dropped due to backpressure", {"retry-after": "1"}, "1"),
        (503, "Deployment reranker is unavailable", {}, "5"),
        (404, "Path '/v1/rank' not found", {}, None),
    ],
)
def test_serves_own_errors_have_the_form_of_ours(
    status: int, text: str, headers: dict[str, str], waits: str | None
) -> None:
    app, seen = serve(answered(PlainTextResponse(text, status, headers)))
    answer = ask(app)
    assert (answer.status_code, answer.json(), answer.headers.get("Retry-After")) == (status, {"message": text}, waits)
    assert answer.headers["Content-Type"] == "application/json"
    assert len(seen) == 1


def test_what_replicas_answer_passes_as_it_is() -> None:
    refusal = JSONResponse({"message": "no such item"}, 422, {"X-Own": "yes"})
    metrics = PlainTextResponse("vlrank_requests 1", 200)
    for response in (refusal, metrics):
        app, _ = serve(answered(response))
        answer = ask(app)
        assert (answer.status_code, answer.content) == (response.status_code, response.body)
        assert answer.headers.get("X-Own") == response.headers.get("X-Own")


def test_other_applications_of_the_cluster_keep_their_answers() -> None:
    app, seen = serve(answered(PlainTextResponse("theirs", 500)))
    answer = ask(app, "/other/v1/rank")
    assert (answer.text, len(seen)) == ("theirs", 1)

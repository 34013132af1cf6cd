"""The routes: FastAPI in front of a `Service`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vlrank.serving.limits import Gate
from vlrank.serving.messages import Health, Problem, RankAnswer, RankRequest, Refused, RerankAnswer, RerankRequest
from vlrank.serving.metrics import CONTENT_TYPE, Measured
from vlrank.serving.service import Service
from vlrank.version import __version__

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The token is missing or wrong."},
    413: {"model": Problem, "description": "The body is too large."},
    422: {"model": Problem, "description": "An unknown item or user, a wrong mode, a broken picture, too many tokens."},
    429: {"model": Problem, "description": "Too many requests are waiting; Retry-After says when to try again."},
    503: {"model": Problem, "description": "The server ends, or its engine is being replaced."},
}


def build_app(service: Service, token: str | None, metrics: Callable[[], Awaitable[bytes]]) -> FastAPI:
    """The application of one replica.

    Args:
        service: Answers.
        token: Bearer token that requests need; None asks for none.
        metrics: What /metrics answers, of all replicas.
    """
    app = FastAPI(
        title="vlrank", version=__version__, description="Multimodal listwise reranking: candidates in, a ranking out."
    )
    app.add_middleware(Gate, token=token, max_body=int(service.config.max_body_mb * 1e6))
    app.add_middleware(Measured, metrics=service.metrics)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse({"message": str(error)}, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"message": "; ".join(dict.fromkeys(map(_explain, error.errors()[:20])))}, 422)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"message": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return JSONResponse({"message": f"the request failed: {type(error).__name__}: {error}"}, 500)

    def accept() -> None:
        if service.draining:
            raise Refused(503, "the server ends", {"Retry-After": "5", "Connection": "close"})

    @app.post("/v1/rank", responses=_PROBLEMS, response_model_exclude_none=True)
    async def rank(request: RankRequest) -> RankAnswer:
        """Rank a user's candidates."""
        accept()
        return await service.rank(request)

    @app.post("/v1/rerank", responses=_PROBLEMS, response_model_exclude_none=True)
    @app.post("/v2/rerank", responses=_PROBLEMS, response_model_exclude_none=True)
    async def rerank(request: RerankRequest) -> RerankAnswer:
        """Rank documents, in the form of Cohere's and Jina's clients."""
        accept()
        return await service.rerank(request)

    @app.get("/health", responses={503: {"model": Health, "description": "The server ends."}})
    async def health(response: Response) -> Health:
        """Whether requests are answered."""
        response.status_code = 503 if service.draining else 200
        status = "draining" if service.draining else "ok"
        return Health(status=status, model=service.name, mode=service.mode, version=__version__)

    @app.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        """Prometheus' text format."""
        return Response(await metrics(), media_type=CONTENT_TYPE)

    return app


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("body", "int", "str", "Item", "Document"))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error.get('ctx', {}).get('error', message)}"
    if error["type"] == "model_attributes_type" and not where:
        return "the body is not a JSON object, or its Content-Type is not application/json"
    return f"{where}: {message[:1].lower()}{message[1:]}" if where else message

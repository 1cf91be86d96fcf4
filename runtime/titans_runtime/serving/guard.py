"""Who may come in, how large a request may be, and how an error looks from outside."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route

from titans_runtime.errors import (
    ConflictError,
    NumericsError,
    OverloadError,
    StateError,
    TitansError,
    TokenError,
    UsageError,
)
from titans_runtime.serving.memories import NoSuchMemory, TooMany
from titans_runtime.serving.metrics import Metrics
from titans_runtime.serving.service import Service
from titans_runtime.serving.settings import ANYONE, digest_of

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_STATUS: Final[tuple[tuple[type[TitansError], int], ...]] = (
    (NoSuchMemory, 404),
    (TooMany, 403),
    (ConflictError, 409),
    (StateError, 409),
    (OverloadError, 429),
    (UsageError, 400),
    (TokenError, 400),
    (NumericsError, 422),
)
_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
_SHOWN: Final = 100
"""Characters of a field's name that an error repeats."""
_bearer = HTTPBearer(auto_error=False, description="A token of the server's file, where it has one.")


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    service: Service = request.app.state.service
    return service


def owner_of(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> str:
    """Whose token a request carries."""
    owners = service_of(request).owners
    if owners is None:
        return ANYONE
    owner = owners.get(digest_of(given.credentials)) if given else None
    if owner is None:
        raise HTTPException(
            401,
            "give a token that the server knows, as Authorization: Bearer TOKEN",
            {"WWW-Authenticate": "Bearer"},
        )
    return owner


Owner = Annotated[str, Depends(owner_of)]
Of = Annotated[Service, Depends(service_of)]


def problem(
    status: int, message: str, headers: dict[str, str] | None = None, param: str | None = None
) -> JSONResponse:
    """An error as OpenAI's clients expect one."""
    return JSONResponse({"error": body_of(status, message, param)}, status, headers)


def body_of(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """What stands under ``error``."""
    return {
        "message": message,
        "type": _KINDS.get(status, "server_error"),
        "code": str(status),
        "param": param,
    }


def status_of(error: TitansError) -> int:
    """The HTTP status of an error of ours."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 503)


def install_errors(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer every error in one form; ``routes``: all there are."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, TitansError)
        status = status_of(error)
        closing = status == 429 and service_of(request).is_closing
        headers = {"Retry-After": "1"} if status == 429 else None
        return problem(503 if closing else status, str(error), headers)

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        # Of a union every branch complains: the one that came farthest is the one that was meant.
        shown = max(error.errors(), key=lambda one: len(one["loc"]))
        where = ".".join(str(part)[:_SHOWN] for part in shown["loc"])
        return problem(422, f"{where}: {shown['msg']}", param=where)

    async def plain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(request, routes))
        return problem(error.status_code, str(error.detail), headers)

    app.add_exception_handler(TitansError, ours)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, plain)


def _methods(request: Request, routes: Sequence[BaseRoute]) -> list[str]:
    """All methods of a path: each has a route of its own, which knows no other."""
    found: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted(found)


class Limits:
    """Refuses bodies that are too large, however they are sent, and counts answers."""

    def __init__(self, app: App, most: int, metrics: Callable[[], Metrics | None]) -> None:
        """``most``: bytes of a body."""
        self._app, self._most, self._metrics = app, most, metrics
        self._message = f"the body is too large; the limit is {most} bytes"

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            await refuse(send, 413, self._message)
            return
        seen = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, self._message)  # which a route lets pass, unlike others
            return message

        async def noted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._count(scope, message["status"])
            await send(message)

        await self._app(scope, counted, noted)

    def _count(self, scope: MutableMapping[str, Any], status: int) -> None:
        metrics = self._metrics()
        if metrics is not None:
            path = getattr(scope.get("route"), "path", "other")
            metrics.requests.labels(path, str(status)).inc()


async def refuse(send: Send, status: int, message: str) -> None:
    """Answer with an error before a request's body has been read, and let the connection end with it."""
    content = json.dumps({"error": body_of(status, message)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})

"""The HTTP application: OpenAI-style completions, memories, health, figures, and the page."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive, Scope, Send

import titans_runtime
from titans_runtime.errors import TitansError
from titans_runtime.serving import schema
from titans_runtime.serving.completion import new_session
from titans_runtime.serving.completions import Running, gone, streamed, whole
from titans_runtime.serving.guard import Limits, Of, Owner, body_of, install_errors, owner_of, status_of
from titans_runtime.serving.names import OwnNames
from titans_runtime.serving.service import Service
from titans_runtime.serving.settings import Settings

_STATIC: Final = Path(__file__).parent / "static"
_FILES: Final = {"": "index.html", "page.js": "page.js", "page.css": "page.css"}
_POLICY: Final = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"

_GONE: Final = object()
_PATIENCE: Final = 5.0
"""Seconds for callers that do not read: beyond the time of their request, or the end of the server."""

Id = Annotated[str, InPath(pattern=schema.ID)]


def _answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors that a route may answer with, for the OpenAPI document."""
    texts = {
        400: "The request cannot be meant, or its time was up before its prompt was read.",
        401: "No token, or none that the server knows.",
        403: "More than the caller may have; or, without tokens, a foreign Host or Origin.",
        404: "There is no such memory or model.",
        409: "The memory is in use, exists, was changed elsewhere, or belongs to another bundle.",
        413: "The body is too large.",
        422: "The body does not have the form, or the model left what float32 holds.",
        429: "Too many requests wait; ask again later.",
        503: "The store cannot be reached, or the server is closing.",
    }
    return {status: {"model": schema.Problem, "description": texts[status]} for status in statuses}


def create_app(settings: Settings, service: Service | None = None) -> FastAPI:
    """The application. It opens its service when it starts, unless it has one, and closes it at the end."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service or await run_in_threadpool(Service, settings)
        yield
        await _close(app.state.service)

    app = FastAPI(
        title="titans",
        version=titans_runtime.__version__,
        description="Models that learn while they run: completions over memories that are kept.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    if service is not None:
        app.state.service = service
    install_errors(app, [*_open.routes, *_v1.routes])
    app.include_router(_open)
    app.include_router(_v1)
    if not settings.tokens:
        _describe_as_open(app)
        app.add_middleware(OwnNames, hosts=settings.hosts)
    found: Callable[[], Any] = lambda: getattr(getattr(app.state, "service", None), "metrics", None)  # noqa: E731
    app.add_middleware(Limits, most=settings.max_body, metrics=found)
    return app


async def _close(service: Service) -> None:
    """Let requests keep what they have done before every memory is saved."""
    await run_in_threadpool(service.drain)
    if service.under_way:
        await asyncio.wait(service.under_way, timeout=_PATIENCE)
    await run_in_threadpool(service.close)


def _describe_as_open(app: FastAPI) -> None:
    """Let the OpenAPI document ask for no token where the server does not."""
    document = app.openapi()
    del document["components"]["securitySchemes"]
    for path in document["paths"].values():
        for operation in path.values():
            operation.pop("security", None)


# --- for anyone

_open = APIRouter()


@_open.get("/healthz", responses={503: {"model": schema.Health, "description": "The server is closing."}})
def healthz(service: Of, response: Response) -> schema.Health:
    """Whether requests are taken."""
    if service.is_closing:
        response.status_code = 503
    scheduler = service.scheduler
    return schema.Health(
        status="closing" if service.is_closing else "ok",
        running=scheduler.running,
        waiting=scheduler.waiting,
        process=os.getpid(),
    )


@_open.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(service: Of) -> Response:
    """Figures for Prometheus."""
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


@_open.get("/", include_in_schema=False)
@_open.get("/page.js", include_in_schema=False)
@_open.get("/page.css", include_in_schema=False)
def page(request: Request) -> FileResponse:
    """The page, of three files."""
    name = _FILES[request.url.path.rpartition("/")[2]]
    return FileResponse(
        _STATIC / name, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    )


# --- for who has a token

_v1 = APIRouter(prefix="/v1", responses=_answers(401, 403, 422))


@_v1.get("/models", dependencies=[Depends(owner_of)])
def models(service: Of) -> schema.ModelList:
    """The one model that is served."""
    return schema.ModelList(data=[_described(service)])


def _described(service: Service) -> schema.ServedModel:
    manifest = service.model.manifest
    return schema.ServedModel(
        id=service.name,
        created=service.started,
        owned_by="titans",
        identity=manifest.identity,
        state_bytes=manifest.state_bytes,
    )


@_v1.post(
    "/completions",
    response_model=schema.Completion,
    response_model_exclude_none=False,
    responses=_answers(400, 404, 409, 413, 429, 503)
    | {200: {"content": {"text/event-stream": {}}, "description": "The answer, or a stream of its parts."}},
)
async def completions(asked: schema.CompletionRequest, request: Request, service: Of, owner: Owner) -> Any:  # noqa: ANN401 - a completion, or a stream of parts of one
    """Continue a prompt, or score it with `echo` and `logprobs`. With a `memory`, it learns from the prompt.

    The memory changes when the answer is complete, and not at all when the caller hangs up before.
    """
    running = Running(service, asked, owner)
    try:
        answer = await _unless_gone(running.begin(), request)
        if answer is not _GONE:
            if asked.stream:
                options = asked.stream_options
                return EventStream(running, bool(options and options.include_usage))
            answer = await _unless_gone(whole(running), request)
    except BaseException:
        await running.end()
        raise
    await running.end()
    return Response(status_code=499) if answer is _GONE else answer  # 499: nobody reads it


async def _unless_gone(work: Coroutine[Any, Any, Any], request: Request) -> Any:  # noqa: ANN401
    """What some work gives; if the caller hangs up before, it is cancelled: ``_GONE``."""
    task = asyncio.ensure_future(work)
    hangup = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({task, hangup}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else _GONE
    finally:
        task.cancel()
        hangup.cancel()
        await asyncio.wait({task})


class _NotRead(Exception):
    """The caller has stopped reading."""


class EventStream(StreamingResponse):
    """Parts of a completion as server-sent events."""

    def __init__(self, running: Running, with_usage: bool) -> None:
        """Nothing is sent yet."""
        self._running, self._with_usage = running, with_usage
        super().__init__(self._lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it; the memory is let go of, even where the caller has gone before the first part.

        A caller that stops reading is waited for until its time is up, and a few seconds more, or until the
        server has closed. The rest is then for nobody, and the memory is kept as with any other timeout.
        """

        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(self._running.time_left() + _PATIENCE):
                    await send(message)
            except TimeoutError:
                raise _NotRead from None

        try:
            await super().__call__(scope, receive, bounded)
        except _NotRead:
            await self._conclude()
        except asyncio.CancelledError:
            if not self._running.is_closing:
                raise
            await self._conclude()
        finally:
            await self._running.end()

    async def _conclude(self) -> None:
        async for _ in self.body_iterator:
            pass

    async def _lines(self) -> AsyncIterator[str]:
        try:
            async for part in streamed(self._running, self._with_usage):
                yield f"data: {part.model_dump_json()}\n\n"
        except TitansError as error:
            status = status_of(error)
            status = 503 if status == 429 and self._running.is_closing else status
            yield f"data: {json.dumps({'error': body_of(status, str(error))})}\n\n"
            return
        yield "data: [DONE]\n\n"


@_v1.post("/memories", status_code=201, responses=_answers(400, 403, 409, 413, 503))
def create_memory(service: Of, owner: Owner, new: schema.NewEditedMemory | None = None) -> schema.Memory:
    """A new memory, which has seen nothing."""
    service.check_open()
    new = new or schema.NewEditedMemory(id=None, editing=None)
    session = new_session(service.model, new.editing)
    return _memory(service.memories.create(owner, new.id, session))


@_v1.get("/memories", responses=_answers(503))
def list_memories(service: Of, owner: Owner) -> schema.MemoryList:
    """All memories of the caller."""
    return schema.MemoryList(data=[_memory(one) for one in service.memories.list(owner)])


@_v1.get("/memories/{id}", responses=_answers(400, 404, 409, 503))
def describe_memory(service: Of, owner: Owner, id: Id) -> schema.Memory:  # noqa: A002 - as the path has it
    """One memory, but for its state."""
    return _memory(service.memories.describe(owner, id))


@_v1.post("/memories/{id}/fork", status_code=201, responses=_answers(400, 403, 404, 409, 413, 503))
def fork_memory(
    service: Of,
    owner: Owner,
    id: Id,  # noqa: A002
    new: schema.NewMemory | None = None,
) -> schema.Memory:
    """A second memory that goes on from where this one stands."""
    service.check_open()
    return _memory(service.memories.fork(owner, id, new.id if new else None))


@_v1.post("/memories/{id}/save", responses=_answers(400, 404, 409, 503))
def save_memory(service: Of, owner: Owner, id: Id) -> schema.Memory:  # noqa: A002
    """Save what completions with `save: false` have left in RAM."""
    return _memory(service.memories.save(owner, id))


@_v1.post("/memories/{id}/reset", responses=_answers(400, 404, 409, 503))
def reset_memory(service: Of, owner: Owner, id: Id) -> schema.Memory:  # noqa: A002
    """Let it be as it was when it was new."""
    service.check_open()
    return _memory(service.memories.reset(owner, id))


@_v1.get("/memories/{id}/compare/{other}", responses=_answers(400, 404, 409, 503))
def compare_memories(service: Of, owner: Owner, id: Id, other: Id) -> schema.Comparison:  # noqa: A002
    """How far two memories lie apart, tensor by tensor."""
    found = service.memories.compare(owner, id, other)
    return schema.Comparison(data=[schema.TensorDifference(**one) for one in found])


@_v1.get(
    "/memories/{id}/export",
    response_class=Response,
    responses=_answers(400, 404, 409, 503)
    | {200: {"content": {"application/octet-stream": {}}, "description": "A memory file."}},
)
def export_memory(service: Of, owner: Owner, id: Id) -> Response:  # noqa: A002
    """The memory file, as `titans run --state-in` and `Model.load_session` take it."""
    content = service.memories.export(owner, id)
    headers = {"Content-Disposition": f'attachment; filename="{id}.memory"'}
    return Response(content, media_type="application/octet-stream", headers=headers)


@_v1.delete("/memories/{id}", responses=_answers(400, 404, 409, 503))
def delete_memory(service: Of, owner: Owner, id: Id) -> schema.Deleted:  # noqa: A002
    """Remove it for good."""
    service.memories.delete(owner, id)
    return schema.Deleted(id=id)


def _memory(described: Any) -> schema.Memory:  # noqa: ANN401 - a Description
    return schema.Memory(**asdict(described))

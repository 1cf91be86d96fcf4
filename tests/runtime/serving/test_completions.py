"""What a completion holds on its way, and lets go of."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.types import Message, Send

import titans_runtime as tr
from titans_runtime.serving.app import EventStream, completions
from titans_runtime.serving.completions import Running
from titans_runtime.serving.schema import CompletionRequest
from titans_runtime.serving.service import Service


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def sessions() -> int:
    return sum(type(one) is tr.Session for one in gc.get_objects())


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": ["abc", "de"], "max_tokens": 3},
        {"prompt": "abc", "memory": "m", "max_tokens": 3},
        {"prompt": "abc", "memory": "m", "max_tokens": 3, "stream": True, "logprobs": 1},
    ],
)
@pytest.mark.usefixtures("without_collector")
def test_a_request_that_has_ended_holds_no_session(
    client: TestClient, service: Service, asked: dict[str, Any]
) -> None:
    """A session is megabytes: it is not to wait for the garbage collector."""
    client.post("/v1/memories", json={"id": "m"})
    before = sessions()
    for _ in range(3):
        assert client.post("/v1/completions", json=asked).status_code == 200
    client.get("/v1/memories")  # in the thread that has saved last, which then holds other arguments
    service.drain()  # the scheduler's thread has ended: its last step holds nothing, either
    assert sessions() == before


@pytest.mark.usefixtures("without_collector")
def test_nor_does_one_that_has_failed(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise tr.NumericsError("a value is not finite")

    monkeypatch.setattr(tr.Session, "_conclude", fail)
    before = sessions()
    for stream in (False, True):
        client.post("/v1/completions", json={"prompt": "abc", "stream": stream})
    service.drain()
    assert service.scheduler.counters.finished == {"failed": 2}
    assert sessions() == before


def test_what_is_refused_is_not_even_read(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place in the queue comes first, the memory when there is a slot."""
    client.post("/v1/memories", json={"id": "m"})
    read: list[str] = []
    session = service.memories.session
    monkeypatch.setattr(service.memories, "session", lambda key: read.append(key) or session(key))
    asked = {"prompt": "a", "memory": "m", "max_tokens": 0}
    with monkeypatch.context() as full:
        full.setattr(service.scheduler._waiting, "_most", 0)
        answer = client.post("/v1/completions", json=asked)
    assert (answer.status_code, read) == (429, [])
    assert answer.headers["retry-after"] == "1"
    assert client.post("/v1/completions", json=asked).status_code == 200
    assert read == ["local/m"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_begin_has_a_status_of_its_own(client: TestClient, stream: bool) -> None:
    client.post("/v1/memories", json={"id": "m"})
    for asked, status in (
        ({"prompt": "a", "memory": "nowhere"}, 404),
        ({"prompt": "", "memory": "m"}, 400),
        ({"prompt": ["a", ""]}, 400),
        ({"prompt": ["a", "b"], "editing": {"edit": 2}}, 400),
    ):
        assert client.post("/v1/completions", json=asked | {"stream": stream}).status_code == status


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_may_hang_up_while_it_waits(service: Service, stream: bool) -> None:
    service.memories.create("local", "m", service.model.session())
    asked = CompletionRequest(prompt="a", memory="m", max_tokens=4000, stream=stream)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def ask() -> int:
        answer = await completions(asked, Request({"type": "http"}, receive), service, "local")
        return int(answer.status_code)

    assert asyncio.run(ask()) == 499
    assert service.memories.describe("local", "m").position == 0
    assert service.scheduler.counters.finished == {"cancelled": 1}


async def stalled(service: Service, send: Send) -> asyncio.Task[None]:
    """A stream whose caller reads as ``send`` does, and neither says more nor hangs up."""

    async def receive() -> Message:
        return await asyncio.get_running_loop().create_future()

    running = Running(service, CompletionRequest(prompt="abc", memory="m", max_tokens=4000), "local")
    await running.begin()
    return asyncio.ensure_future(EventStream(running, False)({"type": "http"}, receive, send))


def test_who_stops_reading_holds_a_memory_no_longer_than_its_time(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(service.scheduler, "clock", lambda: now[0])
    monkeypatch.setattr("titans_runtime.serving.app._PATIENCE", 0.0)
    service.memories.create("local", "m", service.model.session())

    async def send(_: Message) -> None:
        if now[0]:
            await asyncio.get_running_loop().create_future()

    async def ask() -> None:
        async def first(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                now[0] = 1e6

        await (await stalled(service, first))

    asyncio.run(ask())
    found = service.memories.describe("local", "m")
    assert found.position >= 3
    assert found.saved
    assert service.scheduler.counters.finished == {"deadline": 1}
    assert not service.under_way


def test_who_does_not_read_while_the_server_closes_loses_no_work(service: Service) -> None:
    object.__setattr__(service.settings, "drain", 0.0)
    service.memories.create("local", "m", service.model.session())

    async def ask() -> None:
        blocked = asyncio.Event()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                blocked.set()
                await asyncio.get_running_loop().create_future()

        task = await stalled(service, send)
        await blocked.wait()
        await asyncio.to_thread(service.drain)
        task.cancel()  # as uvicorn does in the end
        await task

    asyncio.run(ask())
    found = service.memories.describe("local", "m")
    assert found.position >= 3
    assert found.saved

"""What a completion holds on its way, and lets go of."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.types import Message

import titans_runtime as tr
from titans_runtime.serving.app import completions
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
        full.setattr(service.scheduler, "_most_waiting", 0)
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

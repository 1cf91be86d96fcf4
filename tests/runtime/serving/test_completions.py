"""What a completion holds on its way, and lets go of."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

import titans_runtime as tr
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

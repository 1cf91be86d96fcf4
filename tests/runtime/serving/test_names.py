"""A server without tokens answers to this machine's own names, and to its own page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.runtime.serving.conftest import ANNA
from titans_runtime.serving.app import create_app
from titans_runtime.serving.service import Service
from titans_runtime.serving.settings import Settings

OWN = "127.0.0.1:8000"
"""As which a test's client asks."""


@pytest.fixture
def proxied(service: Service, settings: Settings) -> Iterator[TestClient]:
    """The same server, which may be known as titans.example."""
    settings = dataclasses.replace(settings, allow_host="Titans.example")
    with TestClient(create_app(settings, service), base_url=f"http://{OWN}") as client:
        yield client


@pytest.mark.parametrize(
    "host",
    [OWN, "127.0.0.1", "127.8.8.8:1", "localhost:8000", "LOCALHOST", "localhost.", "[::1]:8000", "[::1]"],
)
def test_its_own_names(client: TestClient, host: str) -> None:
    for path in ("/", "/healthz", "/v1/memories"):
        assert client.get(path, headers={"Host": host}).status_code == 200
    assert client.post("/v1/memories", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 201


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "",
        "[::1",
        "[::2]",
        "a@b",
    ],
)
def test_a_name_that_was_made_to_point_here(client: TestClient, host: str) -> None:
    for method, path in (("GET", "/v1/memories"), ("GET", "/"), ("POST", "/v1/memories")):
        answer = client.request(method, path, headers={"Host": host})
        assert answer.status_code == 403
        message = answer.json()["error"]["message"]
        assert message.startswith(f"Host '{host}': a server without --tokens answers only to")
        assert "--allow-host" in message
    assert client.get("/v1/memories").json()["data"] == []


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://127.0.0.1:3000",
        "http://localhost:8000",
        "https://127.0.0.1",
        "http://",
    ],
)
def test_another_page_changes_nothing(client: TestClient, origin: str) -> None:
    client.post("/v1/memories", json={"id": "m"})
    for method, path in (
        ("POST", "/v1/memories"),
        ("POST", "/v1/memories/m/reset"),
        ("DELETE", "/v1/memories/m"),
        ("POST", "/v1/completions"),
    ):
        answer = client.request(method, path, headers={"Origin": origin})
        assert answer.status_code == 403
        assert answer.json()["error"]["message"].startswith(f"Origin '{origin}': a server without --tokens")
        assert answer.json()["error"]["type"] == "permission_error"
    assert [one["id"] for one in client.get("/v1/memories").json()["data"]] == ["m"]
    assert (
        client.get("/v1/memories", headers={"Origin": origin}).status_code == 200
    )  # not for that page to read


def test_a_long_name_is_not_sent_back_whole(client: TestClient) -> None:
    answer = client.get("/", headers={"Host": "x" * 10_000})
    assert answer.status_code == 403
    assert len(answer.text) < 1000


def test_names_that_are_allowed(proxied: TestClient) -> None:
    """Where the proxy passes the name on, and where it asks by the address."""
    for host in ("titans.example", OWN):
        headers = {"Host": host, "Origin": "https://titans.example"}
        assert proxied.post("/v1/memories", headers=headers).status_code == 201
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        assert proxied.post("/v1/memories", headers=headers).status_code == 403


def test_refusals_are_counted(client: TestClient) -> None:
    client.get("/v1/memories", headers={"Host": "evil.example"})
    assert 'titans_http_requests_total{path="other",status="403"} 1.0' in client.get("/metrics").text


def test_with_tokens_every_name_will_do(settings: Settings, tokens: Path, service: Service) -> None:
    settings = dataclasses.replace(settings, tokens=str(tokens))
    with TestClient(create_app(settings, service)) as client:
        headers = {"Origin": "http://evil.example", "Authorization": f"Bearer {ANNA}"}
        assert client.post("/v1/memories", headers=headers).status_code == 201

"""A server in this process, and one that a real client reaches over loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import titans_runtime as tr
from titans_runtime.serving.app import create_app
from titans_runtime.serving.service import Service
from titans_runtime.serving.settings import Settings

ANNA, BOB = "a-token-of-anna-1", "a-token-of-bob-22"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may come in\nanna {ANNA}\nbob {BOB}\n")
    return path


@pytest.fixture
def settings(tiny_bundle: Path, tmp_path: Path) -> Settings:
    return Settings(str(tiny_bundle), str(tmp_path / "memories"), threads=1, max_body=100_000, drain=30)


@pytest.fixture
def service(settings: Settings, model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """Of the folder's one loaded model."""
    monkeypatch.setattr("titans_runtime.serving.service.load", lambda *_, **__: model)
    service = Service(settings)
    yield service
    service.close()


@pytest.fixture
def client(service: Service, settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings, service), base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.fixture
def url(service: Service, settings: Settings) -> Iterator[str]:
    """Where the same application listens on loopback."""
    import uvicorn

    from titans_runtime.serving.command import _listening

    listener = _listening("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(settings, service), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    service.drain()
    server.should_exit = True
    thread.join()
    listener.close()

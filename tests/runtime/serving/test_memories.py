"""The memories of a server beside a store that fails, or in which one of them is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import titans_runtime as tr
from titans_runtime.serving.memories import Memories, TooMany
from titans_runtime.store.file import FileStore


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "memories")


@pytest.fixture
def damaged(client: TestClient, store: FileStore) -> Iterator[TestClient]:
    """A server with a good memory and a bad one."""
    for name in ("good", "bad"):
        client.post("/v1/memories", json={"id": name})
    path = store._path("local/bad")
    path.write_bytes(path.read_bytes()[:10])
    return client


def test_one_damaged_memory_does_not_lock_its_owner_out(damaged: TestClient) -> None:
    listed = {one["id"]: one for one in damaged.get("/v1/memories").json()["data"]}
    assert {name: (one["damaged"], one["saved"]) for name, one in listed.items()} == {
        "good": (False, True),
        "bad": (True, False),
    }
    assert damaged.post("/v1/memories", json={"id": "another"}).status_code == 201
    assert damaged.post("/v1/memories/good/fork", json={"id": "forked"}).status_code == 201
    assert damaged.delete("/v1/memories/bad").status_code == 200
    assert damaged.post("/v1/memories", json={"id": "bad"}).status_code == 201


def test_where_the_server_keeps_memories_is_told_to_its_log_alone(
    damaged: TestClient, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for method, path, body in (
        ("GET", "/v1/memories/bad", None),
        ("POST", "/v1/memories/bad/reset", None),
        ("POST", "/v1/memories", {"id": "bad"}),
        ("POST", "/v1/completions", {"prompt": "a", "memory": "bad"}),
    ):
        answer = damaged.request(method, path, json=body)
        assert answer.status_code == 409
        said = answer.json()["error"]["message"]
        assert said == "memory bad: is damaged in the store; delete it, or have it restored from a copy"
    assert capfd.readouterr().err.count(f"titans: store: {tmp_path}/memories/local/bad.memory: ") == 4


def test_a_store_that_fails_is_not_described(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise tr.EnvironmentProblem(f"{tmp_path}: cannot be read")

    monkeypatch.setattr(FileStore, "_paths", fail)
    answer = client.get("/v1/memories")
    assert answer.status_code == 503
    assert "the server's log says why" in answer.text
    assert str(tmp_path) not in answer.text
    assert f"titans: store: {tmp_path}: cannot be read" in capfd.readouterr().err


def test_a_delete_that_fails_keeps_what_is_not_saved(
    model: tr.Model, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = Memories(model, store, 10, 4)
    memories.create("o", "m", model.session())
    with memories.in_hand("o", "m") as key:
        session = memories.session(key)
        session.append(b"hello")
        memories.commit(key, session, save=False)

    def fail(*_: object) -> None:
        raise tr.EnvironmentProblem("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", fail)
        with pytest.raises(tr.EnvironmentProblem):
            memories.delete("o", "m")
    assert memories.describe("o", "m").position == 5
    memories.delete("o", "m")
    assert memories.list("o") == []


def test_what_has_expired_takes_no_room_before_it_is_swept(model: tr.Model, store: FileStore) -> None:
    now = [100.0]
    store._clock = lambda: now[0]
    memories = Memories(model, store, 2, 4, expire=10.0, clock=lambda: now[0])
    for name in ("a", "b"):
        memories.create("o", name, model.session())
    with pytest.raises(TooMany, match="2 memories"):
        memories.create("o", "c", model.session())
    now[0] += 10
    memories.create("o", "c", model.session())
    assert len(list(store.names("o/"))) == 3


def test_a_new_memory_reads_no_other(
    model: tr.Model, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = Memories(model, store, 10, 4)
    memories.create("o", "a", model.session())
    monkeypatch.setattr(FileStore, "list", None)
    memories.create("o", "b", model.session())

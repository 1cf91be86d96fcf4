"""The store on fsspec: in memory, in a folder, and in a real S3 server's protocol where there is one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.runtime.store.contract import StoreContract
from titans_runtime.errors import ConflictError, EnvironmentProblem
from titans_runtime.store import open_store
from titans_runtime.store.objects import ObjectStore, _object


class TestInMemory(StoreContract):
    @pytest.fixture
    def url(self) -> str:
        return f"memory://{uuid.uuid4()}"

    @pytest.fixture
    def store(self, url: str) -> ObjectStore:
        return ObjectStore(url)

    @pytest.fixture
    def again(self, url: str) -> ObjectStore:
        return ObjectStore(url)

    def damage(self, store: ObjectStore, name: str) -> None:
        (number,) = store._numbers(store._folder(name))
        path = _object(store._folder(name), number)
        content = store._fs.cat_file(path)
        store._fs.rm_file(path)
        store._fs.pipe_file(path, b"x" + content[1:])


class TestInAFolder(TestInMemory):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/memories"


def test_a_folder_is_read_until_nothing_has_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reading may show neither the object that another writer removed nor the one it made."""
    store = ObjectStore(f"file://{tmp_path}/memories")
    version = store.put("a", b"1", expected=None)
    whole, seen = store._listed, iter([(), None])
    monkeypatch.setattr(
        store, "_listed", lambda folder: whole(folder) if (one := next(seen, None)) is None else one
    )
    found = store.get("a")
    assert found is not None
    assert (found.entry, found.content) == (version, b"1")


def test_tombstones_stay_for_a_day() -> None:
    now = [1000.0]
    url = f"memory://{uuid.uuid4()}"
    store = ObjectStore(url, clock=lambda: now[0])
    store.put("a", b"1", expected=None)
    store.delete("a")
    store.sweep()
    assert len(MemoryFileSystem().find(url)) == 1
    now[0] += 100_000
    store.sweep()
    assert MemoryFileSystem().find(url) == []


def test_a_put_that_follows_a_tombstone_which_a_sweep_has_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one begins anew meanwhile: what that put is not removed by the one that slept."""
    now = [1000.0]
    url = f"memory://{uuid.uuid4()}"
    slow, quick = (ObjectStore(url, clock=lambda: now[0]) for _ in range(2))
    slow.put("a", b"1", expected=None)
    slow.delete("a")
    now[0] += 100_000
    create = slow._create

    def late(path: str, content: bytes) -> None:
        quick.sweep()
        quick.put("a", b"2", expected=None)
        create(path, content)

    monkeypatch.setattr(slow, "_create", late)
    with pytest.raises(ConflictError):
        slow.put("a", b"mine", expected=None)
    found = quick.get("a")
    assert found is not None
    assert found.content == b"2"


def test_one_owners_listing_asks_for_that_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(f"memory://{uuid.uuid4()}")
    for name in ("anna/one", "bob/one"):
        store.put(name, b"x", expected=None)
    seen: list[str] = []
    find = store._fs.find

    def noted(path: str, **options: Any) -> Any:  # noqa: ANN401 - fsspec's
        seen.append(path)
        return find(path, **options)

    monkeypatch.setattr(store._fs, "find", noted)
    assert [entry.name for entry in store.list("anna/")] == ["anna/one"]
    assert seen == [f"{store._root}/anna"]


def test_old_versions_are_removed() -> None:
    url = f"memory://{uuid.uuid4()}"
    store = ObjectStore(url)
    version = None
    for number in range(5):
        version = store.put("a", b"%d" % number, expected=version).version
    assert len(MemoryFileSystem().find(url)) == 1


def test_a_writer_that_slept_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is free again, since others went on and tidied up: that is no success."""
    url = f"memory://{uuid.uuid4()}"
    slow, quick = ObjectStore(url), ObjectStore(url)
    first = slow.put("a", b"1", expected=None)
    create = slow._create

    def late(path: str, content: bytes) -> None:
        second = quick.put("a", b"2", expected=first.version)
        quick.put("a", b"3", expected=second.version)
        create(path, content)

    monkeypatch.setattr(slow, "_create", late)
    with pytest.raises(ConflictError):
        slow.put("a", b"mine", expected=first.version)
    found = slow.get("a")
    assert found is not None
    assert found.content == b"3"


def test_a_file_system_that_overwrites_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(self: MemoryFileSystem, path: str, value: bytes, mode: str = "", **_: Any) -> None:  # noqa: ANN401
        self.store.pop(path, None)
        self.open(path, "wb", data=value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", overwrite)
    with pytest.raises(EnvironmentProblem, match="two writers would lose a memory"):
        ObjectStore(f"memory://{uuid.uuid4()}")


def test_an_unknown_protocol() -> None:
    with pytest.raises(EnvironmentProblem, match="nonsense"):
        open_store("nonsense://bucket")


@pytest.mark.suite("serve")
class TestS3(TestInMemory):
    """Against moto's server on loopback, in a process of its own."""

    @pytest.fixture(scope="class")
    @classmethod
    def endpoint(cls) -> Any:  # noqa: ANN401
        server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
        server.start()
        yield "http://{}:{}".format(*server.get_host_and_port())
        server.stop()

    @pytest.fixture
    def url(self, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setitem(os.environ, name, "test")
        monkeypatch.setitem(os.environ, "AWS_ENDPOINT_URL", endpoint)
        s3fs = pytest.importorskip("s3fs")
        bucket = f"b{uuid.uuid4()}"
        s3fs.S3FileSystem(endpoint_url=endpoint).mkdir(bucket)
        return f"s3://{bucket}/memories"

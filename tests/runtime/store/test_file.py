"""The store in files: the contract, damage, and processes that are killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crashes import killed_at_every_step
from tests.runtime.store.contract import StoreContract
from titans_runtime.errors import EnvironmentProblem, StateError, UsageError
from titans_runtime.store import open_store
from titans_runtime.store.file import FileStore


class TestFileStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> FileStore:
        return FileStore(tmp_path / "memories")

    @pytest.fixture
    def again(self, tmp_path: Path) -> FileStore:
        return FileStore(tmp_path / "memories")

    def damage(self, store: FileStore, name: str) -> None:
        path = store._path(name)
        path.write_bytes(b"x" + path.read_bytes()[1:])


def test_one_owners_listing_walks_that_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    for name in ("anna/one", "bob/one", "bob/two"):
        store.put(name, b"x", expected=None)
    seen: list[str] = []
    walk = os.walk

    def noted(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for found in walk(folder):
            seen.append(found[0])
            yield found

    monkeypatch.setattr("titans_runtime.store.file.os.walk", noted)
    assert [entry.name for entry in store.list("anna/")] == ["anna/one"]
    assert seen == [str(tmp_path / "anna")]


def test_a_listing_stays_in_the_store(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "memories")
    FileStore(tmp_path / "others").put("a", b"x", expected=None)
    with pytest.raises(UsageError, match="memory name"):
        list(store.names("../others/"))


def test_what_lies_beside_memories_is_none(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    (tmp_path / "a copy of it.memory").write_bytes(b"")
    assert list(store.list()) == list(store.names()) == []
    assert store.sweep() == 0


def test_time_passes(tmp_path: Path) -> None:
    now = [100.0]
    store = FileStore(tmp_path, clock=lambda: now[0])
    store.put("a", b"1", expected=None, expires=101.0)
    assert store.get("a") is not None
    now[0] = 101.0
    assert store.get("a") is None
    assert store.sweep() == 1
    assert not list(tmp_path.glob("*.memory"))


@pytest.mark.parametrize("harm", [lambda b: b[:-1], lambda b: b[:30], lambda b: b"", lambda b: b"x" + b[1:]])
def test_damage_is_found(tmp_path: Path, harm: object) -> None:
    store = FileStore(tmp_path)
    store.put("a", b"content", expected=None)
    path = tmp_path / "a.memory"
    path.write_bytes(harm(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(StateError, match="restore it from a copy"):
        store.get("a")


def test_a_file_goes_by_its_place(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a", b"content", expected=None)
    shutil.copy(tmp_path / "a.memory", tmp_path / "b.memory")
    assert sorted(entry.name for entry in store.list()) == ["a", "b"]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentProblem, match="cannot be made"):
        open_store(str(tmp_path / "file" / "memories"))


@pytest.mark.suite("crash")
def test_killed_at_every_step(tmp_path: Path) -> None:
    """A memory is the old one or the new one, whole; and the next process can write it."""
    folder = tmp_path / "memories"
    old = b"old" * 2000

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        FileStore(folder).put("user/a", old, expected=None)

    def work() -> None:
        store = FileStore(folder)
        entry = store.entry("user/a")
        assert entry is not None
        store.put("user/a", b"new" * 3000, expected=entry.version)

    for _ in killed_at_every_step(work, folder, prepare):
        store = FileStore(folder)
        found = store.get("user/a")
        assert found is not None
        assert found.content in (old, b"new" * 3000)
        store.put("user/a", b"next", expected=found.entry.version)
        assert [entry.name for entry in store.list()] == ["user/a"]

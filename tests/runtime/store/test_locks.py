"""A writer's lock: held against all others of the memory, and let go of whatever happens."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from titans_runtime.errors import EnvironmentProblem
from titans_runtime.store.file import FileStore
from titans_runtime.store.locks import LOCKS, locked
from titans_runtime.store.objects import ObjectStore

pytest.importorskip("fsspec")


def _held(folder: Path) -> list[Path]:
    """Lock files that nobody else gets now."""
    held = []
    for path in (folder / LOCKS).iterdir():
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path)
    return held


def test_a_lock_is_held_and_let_go_of(tmp_path: Path) -> None:
    (tmp_path / LOCKS).mkdir()
    with locked(tmp_path, "a"):
        assert len(_held(tmp_path)) == 1
    assert not _held(tmp_path)
    with pytest.raises(ZeroDivisionError), locked(tmp_path, "a"):
        raise ZeroDivisionError
    assert not _held(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be written"), locked(tmp_path / "gone", "a"):
        pass


@pytest.mark.parametrize("kind", ["file", "objects"])
def test_a_store_in_a_folder_writes_under_the_lock(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path) if kind == "file" else ObjectStore(f"file://{tmp_path}")
    seen = []
    check = f"titans_runtime.store.{kind}.check_expected"

    def looked(*arguments: Any) -> None:  # noqa: ANN401 - of `check_expected`
        seen.append(len(_held(tmp_path)))

    monkeypatch.setattr(check, looked)
    store.put("a", b"1", expected=None)
    assert seen == [1]

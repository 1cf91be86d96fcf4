"""Files and folders are the old ones or the new ones, at whatever step a process is killed."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.crashes import killed_at_every_step
from titans_runtime import files
from titans_runtime.errors import EnvironmentProblem, UsageError
from titans_runtime.files import folder_beside, replace_folder, why_unwritable, write_atomically, write_output

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
OLD, NEW = b"old" * 1000, b"new" * 2000
OLD_FOLDER, NEW_FOLDER = {"one": b"1", "in/two": b"2"}, {"one": b"1, new", "three": b"3"}


def _write(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def _read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    found = [
        path.read_bytes()
        for _ in killed_at_every_step(
            lambda: write_atomically(path, NEW), tmp_path, prepare=lambda: path.write_bytes(OLD)
        )
    ]
    assert set(found) == {OLD, NEW}
    assert len(found) > 20
    assert found == sorted(found, key=[OLD, NEW].index), "from one step on it is the new one"


def test_a_killed_first_write_leaves_the_new_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / "file"
    found = [
        path.read_bytes() if path.exists() else None
        for _ in killed_at_every_step(
            lambda: write_atomically(path, NEW), tmp_path, prepare=lambda: path.unlink(missing_ok=True)
        )
    ]
    assert set(found) == {None, NEW}


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_goes_where_its_link_points(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    target.parent.mkdir()
    if exists:
        target.write_bytes(OLD)
    link.symlink_to(target)
    assert why_unwritable(link) is None
    write_output(link, NEW)
    assert link.is_symlink()
    assert target.read_bytes() == NEW
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("linked", [True, False])
def test_an_output_replaces_no_pipe(tmp_path: Path, linked: bool) -> None:
    pipe = path = tmp_path / "pipe"
    os.mkfifo(pipe)
    if linked:
        path = tmp_path / "link"
        path.symlink_to(pipe)
    assert why_unwritable(path) == "is a pipe, a device or the like; name a file"
    with pytest.raises(UsageError, match="is a pipe, a device or the like; "):
        write_output(path, NEW)
    assert pipe.is_fifo()


def test_an_output_replaces_no_link_to_itself(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(link)
    with pytest.raises(UsageError, match="is a pipe, a device or the like; "):
        write_output(link, NEW)
    assert link.is_symlink()


def test_a_folder_that_cannot_be_written_is_told_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    assert why_unwritable(tmp_path / "file") == (
        f"cannot be written, for its folder {tmp_path} cannot; name another"
    )


def _fresh(tmp_path: Path) -> None:
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    _write(tmp_path / "folder", OLD_FOLDER)


def _replace(tmp_path: Path) -> None:
    with folder_beside(tmp_path / "folder") as work:
        replace_folder(tmp_path / "folder", _write(work, NEW_FOLDER))


def test_a_killed_replacement_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    if not _exchanges(tmp_path):
        pytest.skip("this system cannot exchange two names")
    found = [
        _read(tmp_path / "folder")
        for _ in killed_at_every_step(
            partial(_replace, tmp_path), tmp_path, prepare=partial(_fresh, tmp_path)
        )
    ]
    assert [old for old in found if old not in (OLD_FOLDER, NEW_FOLDER)] == []
    assert OLD_FOLDER in found
    assert NEW_FOLDER in found
    assert len(found) > 40


def _exchanges(tmp_path: Path) -> bool:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    return files._exchange(tmp_path / "a", tmp_path / "b")


def test_where_names_cannot_be_exchanged_a_killed_replacement_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    gaps = 0
    for _ in killed_at_every_step(partial(_replace, tmp_path), tmp_path, prepare=partial(_fresh, tmp_path)):
        if (tmp_path / "folder").exists():
            assert _read(tmp_path / "folder") in (OLD_FOLDER, NEW_FOLDER)
        else:
            gaps += 1
            (aside,) = tmp_path.glob(".folder.old.*")
            assert _read(aside / "folder") == OLD_FOLDER
    assert gaps > 0


@pytest.mark.parametrize("exchange", [True, False])
def test_a_replacement_leaves_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    _fresh(tmp_path)
    _replace(tmp_path)
    assert _read(tmp_path / "folder") == NEW_FOLDER
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_link_to_a_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    _write(tmp_path / "target", OLD_FOLDER)
    (tmp_path / "folder").symlink_to(tmp_path / "target")
    _replace(tmp_path)
    assert not (tmp_path / "folder").is_symlink()
    assert _read(tmp_path / "folder") == NEW_FOLDER
    assert _read(tmp_path / "target") == OLD_FOLDER
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "target"}


def _fail(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["os.fsync", "titans_runtime.files._exchange", "swap"])
def test_a_replacement_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    _fresh(tmp_path)
    with monkeypatch.context() as patch:
        if broken == "swap":
            patch.setattr(files, "_exchange", lambda one, other: False)
            patch.setattr(Path, "replace", _failing_at(2, Path.replace))
        else:
            patch.setattr(broken, _fail)
        with pytest.raises(
            EnvironmentProblem, match=r"folder: cannot be replaced \(No space left on device\)"
        ):
            _replace(tmp_path)
    assert _read(tmp_path / "folder") == OLD_FOLDER
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def _failing_at(call: int, function: Callable[..., Path]) -> Callable[..., Path]:
    calls = 0

    def failing(*arguments: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == call:
            _fail()
        return function(*arguments)

    return failing


def test_what_is_written_reaches_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename that the disk sees before the content would leave an empty file after a loss of power."""
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")
        fsync(descriptor)

    def note_replace(path: Path, target: Path) -> Path:
        order.append("name")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomically(tmp_path / "file", NEW)
    assert order == ["content", "name", "folder"]


def test_a_folder_beside_is_gone_afterwards_whatever_happens(tmp_path: Path) -> None:
    def interrupted() -> None:
        with folder_beside(tmp_path / "new" / "folder") as work:
            (work / "file").write_bytes(b"")
            assert work.stat().st_mode & 0o777 == 0o755
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(EnvironmentProblem, match=r"file/folder: cannot be written"),
        folder_beside(tmp_path / "file" / "folder"),
    ):
        pass

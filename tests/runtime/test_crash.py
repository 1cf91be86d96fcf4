"""A memory file is the old one or the new one, whole, whatever happens to the process and the disk."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import titans_runtime as tr
from tests.crashes import forked, killed_at_every_step
from tests.runtime.streams import assert_same_snapshot
from titans_runtime.state import load_snapshot, save_snapshot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, limits and capabilities of Linux")
_CAP_DAC_OVERRIDE, _PR_CAPBSET_DROP = 1, 24


@pytest.fixture(scope="module")
def snapshots(model: tr.Model) -> tuple[tr.Snapshot, tr.Snapshot]:
    """An old one and a new one of the same stream, with all that editors keep beside the state."""
    layers = tr.Editor("prediction", step=0.01, chunk=8, optimizer="adam", rollback=True)
    session = model.session(0.5, tr.Editor(step=0.5, chunk=4, optimizer="adagrad", also=layers))
    session.append(b"what was known")
    old = session.snapshot()
    session.append(b", and what came after")
    return old, session.snapshot()


def _which(model: tr.Model, path: Path, snapshots: tuple[tr.Snapshot, tr.Snapshot]) -> int:
    """0 for the old memory, 1 for the new one; anything else fails."""
    found = load_snapshot(path, model.manifest)  # its digest fits
    which = [snapshot.position for snapshot in snapshots].index(found.position)
    assert_same_snapshot(found, snapshots[which])
    return which


def _kill_saves(
    model: tr.Model, snapshots: tuple[tr.Snapshot, tr.Snapshot], folder: Path, every: int
) -> list[int]:
    old, new = snapshots
    path = folder / "memory"
    save_snapshot(old, folder.parent / "old")
    return [
        _which(model, path, snapshots)
        for _ in killed_at_every_step(
            lambda: save_snapshot(new, path),
            folder,
            prepare=lambda: shutil.copy(folder.parent / "old", path),
            every=every,
        )
    ]


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def test_a_save_killed_at_some_of_its_steps(
    model: tr.Model, snapshots: tuple[tr.Snapshot, tr.Snapshot], tmp_path: Path
) -> None:
    assert set(_kill_saves(model, snapshots, _folder(tmp_path), every=3)) == {0, 1}


@pytest.mark.suite("crash")
def test_a_save_killed_at_every_step(
    model: tr.Model, snapshots: tuple[tr.Snapshot, tr.Snapshot], tmp_path: Path
) -> None:
    found = _kill_saves(model, snapshots, _folder(tmp_path), every=1)
    assert len(found) > 20
    assert found == sorted(found), "once it is the new one it stays so"
    assert set(found) == {0, 1}


@pytest.mark.suite("crash")
def test_a_save_killed_at_any_moment(
    model: tr.Model, snapshots: tuple[tr.Snapshot, tr.Snapshot], tmp_path: Path
) -> None:
    """Within system calls, too: 300 processes that save without end, each killed from outside."""
    path, choice, found = _folder(tmp_path) / "memory", random.Random(0), []
    save_snapshot(snapshots[0], path)

    def save_on_and_on() -> None:
        while True:
            for snapshot in (snapshots[1], snapshots[0]):
                save_snapshot(snapshot, path)

    for _ in range(300):
        child = forked(save_on_and_on)
        select.select([], [], [], choice.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.append(_which(model, path, snapshots))
    assert set(found) == {0, 1}


# --- a disk that is full, a folder that cannot be written


def _full_after(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_a_disk_that_fills_up_leaves_the_old_memory(
    model: tr.Model, snapshots: tuple[tr.Snapshot, tr.Snapshot], tmp_path: Path, size: int
) -> None:
    """Wherever within the file it happens: the system itself refuses to write on."""
    path = _folder(tmp_path) / "memory"
    save_snapshot(snapshots[0], path)

    def save() -> None:
        _full_after(size)()
        with pytest.raises(tr.EnvironmentProblem, match=r"memory: cannot be written \(File too large\)"):
            save_snapshot(snapshots[1], path)

    assert os.waitpid(forked(save), 0)[1] == 0
    assert _which(model, path, snapshots) == 0
    assert [found.name for found in path.parent.iterdir()] == ["memory"]


def _without_privilege() -> None:
    """Root, too, must heed permissions: the program that is started now may not override them."""
    ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0)


def _read_only(folder: Path) -> Callable[[], None]:
    folder.chmod(0o555)
    return _without_privilege


@pytest.mark.parametrize(
    ("hinder", "code", "message"),
    [
        (lambda folder: _full_after(100_000), 4, "cannot be written (File too large)"),
        (_read_only, 2, "--state-out"),  # told before anything is read
    ],
    ids=["full", "read-only"],
)
def test_the_command_line_leaves_the_old_memory(
    model: tr.Model,
    snapshots: tuple[tr.Snapshot, tr.Snapshot],
    tiny_bundle: Path,
    tmp_path: Path,
    hinder: Callable[[Path], Callable[[], None]],
    code: int,
    message: str,
) -> None:
    path = _folder(tmp_path) / "memory"
    save_snapshot(snapshots[0], path)
    (tmp_path / "text").write_bytes(b"some more text")
    command = [sys.executable, "-m", "titans_runtime", "run", str(tiny_bundle), str(tmp_path / "text")]
    state = ["--state-in", str(path), "--state-out", str(path)]
    prepare = hinder(path.parent)
    done = subprocess.run(
        [*command, *state],
        preexec_fn=prepare,
        capture_output=True,
        text=True,
        check=False,
    )
    path.parent.chmod(0o755)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert str(path.parent) in done.stderr
    assert done.stderr.count("\n") == 1
    assert _which(model, path, snapshots) == 0
    assert [found.name for found in path.parent.iterdir()] == ["memory"]


@pytest.mark.suite("crash")
def test_a_file_system_that_is_full_leaves_the_old_memory(
    model: tr.Model, snapshots: tuple[tr.Snapshot, tr.Snapshot], tmp_path: Path
) -> None:
    folder = _folder(tmp_path)
    size = sum(array.nbytes for array in snapshots[0].arrays.values()) * 3 // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        save_snapshot(snapshots[0], folder / "memory")
        with pytest.raises(tr.EnvironmentProblem, match="No space left on device"):
            save_snapshot(snapshots[1], folder / "memory")
        assert _which(model, folder / "memory", snapshots) == 0
        assert [found.name for found in folder.iterdir()] == ["memory"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)

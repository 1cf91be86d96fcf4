"""Files and folders that are either the old one or the new one, whole, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from titans_runtime.errors import EnvironmentProblem, UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_IRREGULAR = "is a pipe, a device or the like; name a file"
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # of the kernel, or of the file system


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary file beside ``path``, flush it to disk, and rename it into place.

    A file that is replaced keeps its permissions; a new one gets what the process's umask allows.

    Raises:
        EnvironmentProblem: the folder cannot be written, or the disk is full; ``path`` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_output(path: Path, content: bytes) -> None:
    """:func:`write_atomically` for a name that a person gives: a link stays, its target is replaced.

    Raises:
        UsageError: it names a pipe, a device or the like, which a rename would replace.
        EnvironmentProblem: the folder cannot be written, or the disk is full; ``path`` is untouched.
    """
    target = Path(os.path.realpath(path))
    if _is_irregular(target):
        raise UsageError(f"{path}: {_IRREGULAR}")
    write_atomically(target, content)


def why_unwritable(path: Path) -> str | None:
    """Before any work: what would keep :func:`write_output` from writing a file, with the fix; or nothing."""
    if not path.parent.is_dir():
        return f"no such folder {path.parent}"
    target = Path(os.path.realpath(path))
    if target.is_dir():
        return "is a folder; name a file"
    if _is_irregular(target):
        return _IRREGULAR
    if not target.parent.is_dir():
        return f"no such folder {target.parent}"
    if not os.access(target.parent, os.W_OK | os.X_OK):
        return f"cannot be written, for its folder {target.parent} cannot; name another"
    return None


def _is_irregular(target: Path) -> bool:
    """Whether a path, its links followed, is a pipe, a device or the like, or a link to itself."""
    return target.is_symlink() or (target.exists() and not target.is_file() and not target.is_dir())


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, to stay after a loss of power.

    Raises:
        EnvironmentProblem: it cannot be made.
    """
    try:
        missing = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for one in missing:
            sync(one.parent)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be made ({error.strerror})") from None


def open_without_waiting(path: Path, follow: bool = True) -> io.BufferedReader:
    """Open a file to read. A named pipe is opened at once, for the caller to refuse, not waited for.

    Args:
        path: of the file.
        follow: whether it may be a symbolic link.

    Raises:
        OSError: there is no such file, it is a folder, or cannot be read.
    """

    def opener(name: str, flags: int) -> int:
        stay = 0 if follow else getattr(os, "O_NOFOLLOW", 0)
        return os.open(name, flags | stay | getattr(os, "O_NONBLOCK", 0))

    return open(path, "rb", opener=opener)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to build it in. What it holds in the end is removed.

    Raises:
        EnvironmentProblem: the folder above ``path`` cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror})") from None
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        if folder.is_symlink():  # a link stood at `path`, and was exchanged for the folder
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(path: Path, new: Path) -> None:
    """Let the folder ``new`` stand at ``path``; what stood there before then stands at ``new``.

    Both lie in one file system. Linux exchanges the two names in one step: whoever opens ``path``, at any
    moment, finds the old folder or the new one. Where the system cannot, two renames do it, and a process
    that is killed between them leaves the old folder under a name that begins with ``.<name>.``.

    Raises:
        EnvironmentProblem: the folders cannot be renamed; ``path`` is as it was.
    """
    try:
        _sync_tree(new)
        if path.is_dir() and any(path.iterdir()):
            if not _exchange(new, path):
                _swap_by_renames(new, path)
        else:
            new.replace(path)
        sync(path.parent)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be replaced ({error.strerror})") from None


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where this system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or a C library without it
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _swap_by_renames(new: Path, path: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    try:
        old = path.replace(aside / path.name)
        try:
            new.replace(path)
        except BaseException:
            old.replace(path)
            raise
        old.replace(new)
    finally:
        with contextlib.suppress(OSError):  # not empty: it holds the old folder, which nobody may lose
            aside.rmdir()


def _sync_tree(folder: Path) -> None:
    """Flush a folder with all that it holds to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, where the platform lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Memories in what fsspec reaches and what can create an object only if there is none: S3, GCS, folders.

Such stores do not compare before they set, in general; but they can refuse to create what exists. So a
memory is a folder of numbered objects, the highest of which is the memory, and a put creates the next
number. Of two puts on one version one creates it, and the other is refused. Numbers never return: a deleted
memory ends in an empty object, its tombstone, which a sweep removes a day later. A put that follows an
object finds it still there once its own has been created; otherwise it was too late, and takes it back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from titans_runtime.errors import ConflictError, EnvironmentProblem, StateError, TitansError
from titans_runtime.files import make_folder
from titans_runtime.optional import optional_import
from titans_runtime.store.locks import LOCKS, locked
from titans_runtime.store.protocol import (
    Clock,
    Entry,
    Stopped,
    Stored,
    check_expected,
    checked_name,
    damaged_entry,
    is_live,
    is_name,
    never,
    new_version,
)
from titans_runtime.store.put import Puts
from titans_runtime.store.record import HEAD, pack, unpack, unpack_head

_SUFFIX: Final = ".memory"
_TOMBSTONE: Final = "deleted"
_GRACE: Final = 86_400.0
_TRIES: Final = 20


@dataclass(frozen=True)
class _Current:
    """The highest object of a memory.

    Attributes:
        number: of the object.
        entry: in it; a marked one where it is damaged.
        problem: what is wrong with it then.
    """

    number: int
    entry: Entry
    problem: StateError | None = None

    @property
    def is_tombstone(self) -> bool:
        return self.entry.version.startswith(_TOMBSTONE)


class ObjectStore(Puts):
    """Memories below one URL of fsspec."""

    def __init__(self, url: str, clock: Clock = time.time, options: Mapping[str, Any] | None = None) -> None:
        """Open a URL, and try whether it refuses to create what exists.

        Args:
            url: as fsspec takes it, ``s3://bucket/folder``.
            clock: for what expires.
            options: of the file system, by name.

        Raises:
            EnvironmentProblem: fsspec or the protocol's package is missing, the URL cannot be reached or
                written, or it overwrites what exists.
        """
        fsspec = optional_import("fsspec", "store")
        optional_import("fsspec.asyn", "store")
        self._url, self._clock = url, clock
        try:
            chosen = {"use_listings_cache": False, **(options or {})}
            self._fs, root = fsspec.core.url_to_fs(url, **chosen)
        except (ImportError, ValueError) as error:
            raise EnvironmentProblem(f"{url}: {error}; pip install the package that fsspec names") from None
        self._root = root.rstrip("/")
        self._is_local = "file" in _protocols(self._fs)
        if self._is_local:
            make_folder(Path(self._root, LOCKS))
        self._check_exclusive(fsspec)

    def get(self, name: str) -> Stored | None:
        """See :class:`MemoryStore`."""
        folder = self._folder(name)
        for _ in range(_TRIES):
            number = max(self._numbers(folder), default=0)
            if not number:
                return None
            with self._reached(), contextlib.suppress(FileNotFoundError):  # replaced meanwhile: look again
                path = _object(folder, number)
                entry, content = unpack(self._fs.cat_file(path), path)
                return Stored(entry, content) if self._entry(_Current(number, entry)) else None
        raise ConflictError(f"memory {name}: changes faster than it can be read; try again")

    def entry(self, name: str) -> Entry | None:
        """See :class:`MemoryStore`."""
        return self._entry(_whole(self._current(name)))

    def delete(self, name: str, expected: str | None = None) -> bool:
        """See :class:`MemoryStore`."""
        for _ in range(_TRIES):
            with self._alone(name):
                current = self._current(name)
                if expected is not None:
                    entry = self._entry(_whole(current))
                    check_expected(name, entry.version if entry else None, expected)
                if current is None or self._entry(current) is None:
                    return False
                with contextlib.suppress(ConflictError):  # a put came first: it is what is to be deleted
                    self._bury(name, current)
                    return True
        raise ConflictError(f"memory {name}: changes faster than it can be deleted; try again")

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :class:`MemoryStore`."""
        for name in self.names(prefix):
            entry = self._entry(self._current(name))
            if entry is not None:
                yield entry

    def names(self, prefix: str = "") -> Iterator[str]:
        """See :class:`MemoryStore`. Only what lies below the folder that the prefix names is asked for."""
        parent = prefix.rpartition("/")[0]
        with self._reached():
            try:
                below = f"{self._root}/{checked_name(parent)}" if parent else self._root
                found = self._fs.find(below, detail=False)
            except FileNotFoundError:
                found = []
        folders = {path.rsplit("/", 1)[0] for path in found}
        for folder in sorted(one for one in folders if one.endswith(_SUFFIX)):
            name = folder[len(self._root) + 1 :].removesuffix(_SUFFIX)
            if name.startswith(prefix) and is_name(name):
                yield name

    def sweep(self, stopped: Stopped = never) -> int:
        """See :class:`MemoryStore`."""
        removed = 0
        for name in self.names():
            if stopped():
                break
            with contextlib.suppress(ConflictError), self._alone(name):  # a put came first: it lives
                removed += self._sweep_one(name)
        return removed

    def _sweep_one(self, name: str) -> bool:
        """Bury a memory that has expired, or remove an old tombstone; whether it was a memory."""
        current = self._current(name)
        if current is None or self._entry(current) is not None:
            return False
        if not current.is_tombstone:
            self._bury(name, current)
            return True
        if self._clock() - float(current.entry.about.get("at", 0)) > _GRACE:
            self._remove(self._folder(name), [current.number])
        return False

    def close(self) -> None:
        """See :class:`MemoryStore`."""

    def _replace(self, entry: Entry, content: bytes, expected: str | None) -> None:
        with self._alone(entry.name):
            current = _whole(self._current(entry.name))
            found = self._entry(current)
            check_expected(entry.name, found.version if found else None, expected)
            self._create_next(current.number if current else 0, entry, content)

    def _bury(self, name: str, current: _Current) -> None:
        """Let a memory end in a tombstone, if nothing has come after what it is now."""
        tombstone = Entry(name, f"{_TOMBSTONE}-{new_version()}", 0, None, {"at": self._clock()})
        self._create_next(current.number, tombstone, b"")

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """In a folder of this machine, be the only writer of a memory.

        An object store lists its objects as they are at one time. A folder that is read while others change
        it may show neither the object that went nor the one that came, so that two puts could both be last.
        """
        if not self._is_local:
            yield
            return
        with locked(Path(self._root), name):
            yield

    def _create_next(self, number: int, entry: Entry, content: bytes) -> None:
        """Be the one that creates the object after ``number``, then remove those before it."""
        late = f"memory {entry.name}: was changed by someone else since it was read; read it again"
        folder = self._folder(entry.name)
        path = _object(folder, number + 1)
        with self._reached():
            try:
                self._create(path, pack(entry, content))
            except FileExistsError:
                raise ConflictError(late) from None
        numbers = self._numbers(folder)
        if max(numbers, default=0) > number + 1 or (number and number not in numbers):
            # Others have gone on, and have removed the object of this number before this one came. Or a sweep
            # has removed the tombstone that this one follows, and another put may have begun again with 1.
            self._remove(folder, [number + 1])
            raise ConflictError(late)
        self._remove(folder, [old for old in numbers if old <= number])

    def _current(self, name: str) -> _Current | None:
        folder = self._folder(name)
        for _ in range(_TRIES):
            number = max(self._numbers(folder), default=0)
            if not number:
                return None
            path = _object(folder, number)
            with self._reached(), contextlib.suppress(FileNotFoundError):
                head = self._fs.cat_file(path, start=0, end=HEAD)
                try:
                    return _Current(number, unpack_head(head, path)[0])
                except StateError as problem:
                    return _Current(number, damaged_entry(name), problem)
        raise ConflictError(f"{folder}: changes faster than it can be read; try again")

    def _entry(self, current: _Current | None) -> Entry | None:
        """The entry, unless it has expired or is a tombstone's."""
        if current is None or current.is_tombstone or not is_live(current.entry, self._clock):
            return None
        return current.entry

    def _numbers(self, folder: str) -> Sequence[int]:
        found = self._listed(folder)
        if self._is_local:  # read until nothing has changed meanwhile, see `_alone`
            for _ in range(_TRIES):
                again = self._listed(folder)
                if again == found:
                    break
                found = again
        return found

    def _listed(self, folder: str) -> Sequence[int]:
        with self._reached():
            try:
                names = [path.rsplit("/", 1)[1] for path in self._fs.ls(folder, detail=False)]
            except FileNotFoundError:
                return ()
        return tuple(sorted(int(name) for name in names if name.isdecimal()))

    def _folder(self, name: str) -> str:
        return f"{self._root}/{checked_name(name)}{_SUFFIX}"

    def _create(self, path: str, content: bytes) -> None:
        """Let a whole object appear at ``path``.

        Raises:
            FileExistsError: there is one.
        """
        if not self._is_local:
            self._fs.pipe_file(path, content, mode="create")
            return
        folder, name = path.rsplit("/", 1)
        self._fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{name}.{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as file:  # noqa: PTH123 - the path is fsspec's
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike a rename, it refuses to replace
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)  # noqa: PTH108

    def _remove(self, folder: str, numbers: Sequence[int]) -> None:
        for number in numbers:
            with self._reached(), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(_object(folder, number))

    def _check_exclusive(self, fsspec: Any) -> None:  # noqa: ANN401 - a module
        # The generic form looks first and then writes: of two writers both may find nothing.
        generic = (fsspec.spec.AbstractFileSystem.pipe_file, fsspec.asyn.AsyncFileSystem._pipe_file)  # noqa: SLF001
        own = getattr(type(self._fs), "_pipe_file", type(self._fs).pipe_file)
        refuses = self._is_local or own not in generic
        path = f"{self._root}/.probe-{secrets.token_hex(8)}"
        with self._reached():
            self._create(path, b"one")
            try:
                self._create(path, b"two")
                refuses = False
            except FileExistsError:
                pass
            self._fs.rm_file(path)
        if not refuses:
            raise EnvironmentProblem(
                f"{self._url}: this file system overwrites what exists, so two writers would lose a memory; "
                "use s3://, gs://, a folder, or redis://"
            )

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn what a file system raises into one line; what the caller handles passes."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, TitansError):
            raise
        except Exception as error:  # noqa: BLE001 - every file system raises its own
            raise EnvironmentProblem(f"{self._url}: {type(error).__name__}: {error}") from None


def _whole(current: _Current | None) -> _Current | None:
    """The same.

    Raises:
        StateError: it is damaged.
    """
    if current is not None and current.problem is not None:
        raise current.problem
    return current


def _object(folder: str, number: int) -> str:
    return f"{folder}/{number:016d}"


def _protocols(fs: Any) -> tuple[str, ...]:  # noqa: ANN401 - a file system
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)

"""Memories as files of one folder. Processes on one machine may share it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from titans_runtime.errors import EnvironmentProblem, StateError
from titans_runtime.files import make_folder, sync, write_atomically
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
)
from titans_runtime.store.put import Puts
from titans_runtime.store.record import HEAD, pack, unpack, unpack_head

_SUFFIX: Final = ".memory"


class FileStore(Puts):
    """One file a memory, written beside its place, flushed to the disk, and renamed.

    Readers take no lock: they find the old file or the new one. Writers of one memory wait for each other
    on a lock file, which the kernel releases when a process dies.
    """

    def __init__(self, folder: Path, clock: Clock = time.time) -> None:
        """Open a folder, or make it.

        Raises:
            EnvironmentProblem: it cannot be made.
        """
        self._folder, self._clock = folder, clock
        make_folder(folder / LOCKS)

    def get(self, name: str) -> Stored | None:
        """See :class:`MemoryStore`."""
        path = self._path(name)
        try:
            record = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EnvironmentProblem(f"{path}: cannot be read ({error.strerror})") from None
        entry, content = unpack(record, str(path))
        return Stored(entry, content) if is_live(entry, self._clock) else None

    def entry(self, name: str) -> Entry | None:
        """See :class:`MemoryStore`."""
        entry = self._read_entry(self._path(name))
        return entry if is_live(entry, self._clock) else None

    def delete(self, name: str, expected: str | None = None) -> bool:
        """See :class:`MemoryStore`."""
        with locked(self._folder, checked_name(name)):
            if expected is None:
                was_there = is_live(self._marked_entry(self._path(name)), self._clock)
            else:
                found = self.entry(name)
                check_expected(name, found.version if found else None, expected)
                was_there = True
            self._remove(self._path(name))
        return was_there

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :class:`MemoryStore`."""
        for path in self._paths(prefix):
            entry = self._marked_entry(path)
            if entry is not None and is_live(entry, self._clock):
                yield entry

    def names(self, prefix: str = "") -> Iterator[str]:
        """See :class:`MemoryStore`."""
        return (self._name(path) for path in self._paths(prefix))

    def sweep(self, stopped: Stopped = never) -> int:
        """See :class:`MemoryStore`."""
        removed = 0
        for path in self._paths(""):
            if stopped():
                break
            entry = self._marked_entry(path)
            if entry is None or is_live(entry, self._clock):
                continue
            with locked(self._folder, entry.name):
                again = self._marked_entry(path)  # another put may have come before the lock
                if again is not None and not is_live(again, self._clock):
                    self._remove(path)
                    removed += 1
        return removed

    def close(self) -> None:
        """See :class:`MemoryStore`."""

    def _replace(self, entry: Entry, content: bytes, expected: str | None) -> None:
        path, record = self._path(entry.name), pack(entry, content)
        make_folder(path.parent)
        with locked(self._folder, entry.name):
            found = self.entry(entry.name)
            check_expected(entry.name, found.version if found else None, expected)
            write_atomically(path, record)

    def _path(self, name: str) -> Path:
        return self._folder / f"{checked_name(name)}{_SUFFIX}"

    def _paths(self, prefix: str) -> Iterator[Path]:
        """Files of memories, by name; temporary files begin with a point.

        Only the folder that the prefix names is walked: one owner's listing costs what that owner has.
        """
        parent = prefix.rpartition("/")[0]
        for folder, inner, names in os.walk(self._folder / (checked_name(parent) if parent else "")):
            inner[:] = [one for one in inner if not one.startswith(".")]
            for file in names:
                path = Path(folder, file)
                if file.startswith(".") or path.suffix != _SUFFIX:
                    continue
                name = self._name(path)
                if name.startswith(prefix) and is_name(name):
                    yield path

    def _name(self, path: Path) -> str:
        """A file that was copied or renamed goes by its place."""
        return path.relative_to(self._folder).as_posix().removesuffix(_SUFFIX)

    def _marked_entry(self, path: Path) -> Entry | None:
        try:
            return self._read_entry(path)
        except StateError:
            return damaged_entry(self._name(path))

    def _read_entry(self, path: Path) -> Entry | None:
        try:
            with path.open("rb") as file:
                head = file.read(HEAD)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EnvironmentProblem(f"{path}: cannot be read ({error.strerror})") from None
        return replace(unpack_head(head, str(path))[0], name=self._name(path))

    @staticmethod
    def _remove(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                sync(path.parent)
        except OSError as error:
            raise EnvironmentProblem(f"{path}: cannot be removed ({error.strerror})") from None

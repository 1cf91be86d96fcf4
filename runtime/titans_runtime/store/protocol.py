"""What a store of memories offers, and what all of them check alike."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from titans_runtime.errors import ConflictError, UsageError

Clock = Callable[[], float]
"""Seconds since 1970, as :func:`time.time` counts them."""

Stopped = Callable[[], bool]
"""Whether a long work is to end early."""

MAX_ABOUT: Final = 4096
"""Bytes of JSON that an entry may say of itself: listings read that of every memory."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,3}")


def never() -> bool:
    """Let a long work come to its end."""
    return False


@dataclass(frozen=True)
class Entry:
    """One memory in a store, but for its content.

    Attributes:
        name: of the memory; parts joined by ``/``.
        version: changes with every put, and never returns. Opaque.
        size: of the content, in bytes.
        expires: seconds since 1970 at which the memory is gone, or None.
        about: whatever was said of it when it was put: plain JSON.
        damaged: whether it cannot be read; only its name is known then. Listings have such entries.
    """

    name: str
    version: str
    size: int
    expires: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    damaged: bool = False


@dataclass(frozen=True)
class Stored:
    """A memory in a store, with its content."""

    entry: Entry
    content: bytes = field(repr=False)


class MemoryStore(Protocol):
    """Memories by name. Threads and processes may share what lies behind it.

    A memory whose time has come is absent, whether or not it was removed. Every method raises
    :class:`~titans_runtime.errors.EnvironmentProblem` where the store cannot be reached or written,
    ``StateError`` where an entry is damaged, and ``UsageError`` for a name that is none.
    """

    def get(self, name: str) -> Stored | None:
        """A memory as it was last put, or None."""

    def entry(self, name: str) -> Entry | None:
        """The same without its content."""

    def put(
        self,
        name: str,
        content: bytes,
        *,
        expected: str | None,
        about: Mapping[str, Any] | None = None,
        expires: float | None = None,
    ) -> Entry:
        """Compare and set: keep ``content`` if the memory's version is still ``expected``.

        When this returns the content is as safe as the store makes anything.

        Args:
            name: of the memory.
            content: its bytes.
            expected: version that it replaces; None for a memory that must not exist.
            about: plain JSON of at most 4 KiB, for listings.
            expires: seconds since 1970 at which it is gone, or None.

        Raises:
            ConflictError: the memory has another version, or exists, or does not; it is untouched.
        """

    def delete(self, name: str, expected: str | None = None) -> bool:
        """Remove a memory; whether there was one. Without ``expected`` a damaged one, too.

        Args:
            name: of the memory.
            expected: version that it must have; None for any.

        Raises:
            ConflictError: the memory has another version; it is untouched.
        """

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every memory whose name begins with ``prefix``, in no particular order; damaged ones are marked."""

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names alone, for less: no entry is read. What has expired or was deleted may be among them."""

    def sweep(self, stopped: Stopped = never) -> int:
        """Remove what has expired; how many memories that were. What is damaged stays.

        Args:
            stopped: asked before each memory; the sweep ends where it is true.
        """

    def close(self) -> None:
        """Let go of connections."""


def checked_name(name: str) -> str:
    """A memory's name, or parts of one joined by ``/``.

    Raises:
        UsageError: it holds anything but letters, digits, ``_`` and ``-``, or is too long.
    """
    if not is_name(name):
        raise UsageError(
            f"memory name {name!r}: give letters, digits, - or _, 64 at most; up to 4 such parts joined by /"
        )
    return name


def is_name(name: str) -> bool:
    """Whether this can be a memory's name: what lies in a store beside memories is none."""
    return _NAME.fullmatch(name) is not None


def new_version() -> str:
    """A version that no put has had before."""
    return secrets.token_hex(16)


def damaged_entry(name: str) -> Entry:
    """What a listing says of a memory that cannot be read."""
    return Entry(name, "", 0, damaged=True)


def is_live(entry: Entry | None, clock: Clock = time.time) -> bool:
    """Whether there is an entry, and its time has not come."""
    return entry is not None and (entry.expires is None or entry.expires > clock())


def check_expected(name: str, found: str | None, expected: str | None) -> None:
    """Compare a memory's version with the one that a caller knows.

    Raises:
        ConflictError: they differ.
    """
    if found == expected:
        return
    if expected is None:
        raise ConflictError(f"memory {name}: exists already; read it first, or choose another name")
    state = "is gone" if found is None else "was changed by someone else"
    raise ConflictError(f"memory {name}: {state} since it was read; read it again")

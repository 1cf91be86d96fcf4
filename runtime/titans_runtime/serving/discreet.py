"""A store whose errors say nothing of the server's own places: those go to the server's log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

from titans_runtime.errors import EnvironmentProblem, StateError
from titans_runtime.store import Entry, MemoryStore, Stored
from titans_runtime.store.protocol import Stopped, never

_DAMAGED: Final = "is damaged in the store; delete it, or have it restored from a copy"
_AWAY: Final = "the store cannot be read or written now; ask again later, the server's log says why"


class DiscreetStore:
    """Another store, whose paths and addresses callers from outside do not learn of."""

    def __init__(self, store: MemoryStore) -> None:
        """``store``: the one that keeps the memories."""
        self._store = store

    def get(self, name: str) -> Stored | None:
        """See :class:`MemoryStore`."""
        with _told(name):
            return self._store.get(name)

    def entry(self, name: str) -> Entry | None:
        """See :class:`MemoryStore`."""
        with _told(name):
            return self._store.entry(name)

    def put(
        self,
        name: str,
        content: bytes,
        *,
        expected: str | None,
        about: Mapping[str, Any] | None = None,
        expires: float | None = None,
    ) -> Entry:
        """See :class:`MemoryStore`."""
        with _told(name):
            return self._store.put(name, content, expected=expected, about=about, expires=expires)

    def delete(self, name: str, expected: str | None = None) -> bool:
        """See :class:`MemoryStore`."""
        with _told(name):
            return self._store.delete(name, expected)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :class:`MemoryStore`."""
        with _told(prefix):
            yield from self._store.list(prefix)

    def names(self, prefix: str = "") -> Iterator[str]:
        """See :class:`MemoryStore`."""
        with _told(prefix):
            yield from self._store.names(prefix)

    def sweep(self, stopped: Stopped = never) -> int:
        """See :class:`MemoryStore`."""
        with _told(""):
            return self._store.sweep(stopped)

    def close(self) -> None:
        """See :class:`MemoryStore`."""
        self._store.close()


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Log what is wrong with a store, and say of it what its callers may know.

    Raises:
        StateError: a memory is damaged.
        EnvironmentProblem: the store cannot be reached or written.
    """
    try:
        yield
    except StateError as error:
        _log(error)
        raise StateError(f"memory {name.rpartition('/')[2]}: {_DAMAGED}") from None
    except EnvironmentProblem as error:
        _log(error)
        raise EnvironmentProblem(_AWAY) from None


def _log(error: Exception) -> None:
    print(f"titans: store: {error}", file=sys.stderr)  # noqa: T201 - the server's log

"""A put as the stores of this package share it: an entry is made, and replaces what is there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from titans_runtime.store.protocol import Entry, checked_name, new_version


class Puts(ABC):
    """Stores that can replace a memory of an expected version."""

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
        entry = Entry(checked_name(name), new_version(), len(content), expires, dict(about or {}))
        self._replace(entry, content, expected)
        return entry

    @abstractmethod
    def _replace(self, entry: Entry, content: bytes, expected: str | None) -> None:
        """Compare and set; see :meth:`titans_runtime.store.protocol.MemoryStore.put`."""

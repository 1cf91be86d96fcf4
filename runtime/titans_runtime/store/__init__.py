"""Where memories are kept between requests: one protocol, and stores in files, object storage and Redis."""

from __future__ import annotations

from titans_runtime.store.protocol import Entry, MemoryStore, Stored
from titans_runtime.store.url import open_store

__all__ = ["Entry", "MemoryStore", "Stored", "open_store"]

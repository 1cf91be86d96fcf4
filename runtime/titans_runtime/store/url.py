"""Which store a URL names."""

from __future__ import annotations

import time
from pathlib import Path

from titans_runtime.store.file import FileStore
from titans_runtime.store.objects import ObjectStore
from titans_runtime.store.protocol import Clock, MemoryStore
from titans_runtime.store.redis import RedisStore


def open_store(url: str, clock: Clock = time.time) -> MemoryStore:
    """Open a store of memories.

    Args:
        url: a folder; ``redis://host:port/0`` (extra ``redis``); or whatever fsspec knows, as
            ``s3://bucket/folder`` (extra ``store``).
        clock: for what expires; Redis has its own.

    Raises:
        EnvironmentProblem: a package is missing, or the store cannot be reached or written.
    """
    scheme = url.partition("://")[0] if "://" in url else ""
    if not scheme:
        return FileStore(Path(url), clock)
    if scheme in ("redis", "rediss", "unix"):
        return RedisStore(url)
    return ObjectStore(url, clock)

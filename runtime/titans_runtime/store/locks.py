"""One writer of a memory at a time, among the threads and processes of one machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from titans_runtime.errors import EnvironmentProblem

LOCKS: Final = ".locks"
"""Folder of the lock files, in that of the store."""
_SHARDS: Final = 256


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Be the only writer of a memory; the kernel lets go of the lock when a process dies.

    Args:
        folder: of the store; :data:`LOCKS` is in it.
        name: of the memory. Some share a lock.

    Raises:
        EnvironmentProblem: the lock file cannot be written.
    """
    shard = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=2).digest()) % _SHARDS
    path = folder / LOCKS / f"{shard:02x}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

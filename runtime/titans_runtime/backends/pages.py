"""Large pages for weights: decoding reads all of them for every token.

Where the system gives large pages only to those who ask (Linux: ``transparent_hugepage`` at ``madvise``),
ONNX Runtime's allocations get small ones, and a product with one row loses time to looking up addresses. Its
memory is therefore advised after a graph was loaded. The kernel moves it in the background, some megabytes a
second: to move it at once would cost a start more than the first hundreds of tokens gain.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_LARGE = 2**21  # bytes of a large page
_HUGEPAGE = 14  # madvise(2)
_MAPS = Path("/proc/self/maps")


@contextlib.contextmanager
def large_pages() -> Iterator[None]:
    """Ask for large pages for what is allocated within; content stays."""
    before = set(_allocations())
    yield
    for start, end in set(_allocations()) - before:
        _advise(-(-start // _LARGE) * _LARGE, end // _LARGE * _LARGE)


def _allocations() -> Iterator[tuple[int, int]]:
    """Private memory of this process that belongs to no file: ``(start, end)``."""
    if sys.platform != "linux":
        return
    try:
        lines = _MAPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # no such view of memory here
        return
    for line in lines:
        span, access, _, _, inode, *name = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and not name:
            start, _, end = span.partition("-")
            yield int(start, 16), int(end, 16)


def _advise(start: int, end: int) -> None:
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _HUGEPAGE)

"""Large pages for weights: decoding reads all of them for every token.

Where the system gives large pages only to those who ask (Linux: ``transparent_hugepage`` at ``madvise``),
ONNX Runtime's allocations get small ones, and a product with one row loses a tenth to a third of its time to
looking up addresses. Its memory is therefore moved. That costs a model of 110 MB a quarter of a second, so it
is not done at the start, but in the background once a model has run often enough to be worth it.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_LARGE = 2**21  # bytes of a large page
_HUGEPAGE, _COLLAPSE = 14, 25  # madvise(2); the second since Linux 6.1, elsewhere refused, to no harm
_MAPS = Path("/proc/self/maps")
_RUNS = 128  # that a model has run before its memory is moved


class Memory:
    """What a graph has allocated: whole large pages, to be moved when they are used much."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._spans: list[tuple[int, int]] = []
        self._runs = 0

    def allocated(self, start: int, end: int) -> None:
        """Note memory from ``start`` to ``end``, as far as it makes whole large pages."""
        first, last = -(-start // _LARGE) * _LARGE, end // _LARGE * _LARGE
        if first < last:
            self._spans.append((first, last))

    def used(self) -> threading.Thread | None:
        """Count a run; the one that makes the move worth it begins it, in the thread that is returned."""
        self._runs += 1
        if self._runs < _RUNS or not self._spans:
            return None
        spans, self._spans = self._spans, []
        mover = threading.Thread(target=_move, args=(spans,), name="titans large pages", daemon=True)
        mover.start()
        return mover


@contextlib.contextmanager
def noted(memory: Memory) -> Iterator[None]:
    """Note in ``memory`` what is allocated within, by whomever; content stays when it is moved."""
    before = set(_allocations())
    yield
    for start, end in set(_allocations()) - before:
        memory.allocated(start, end)


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


def _move(spans: list[tuple[int, int]]) -> None:
    for start, end in spans:
        for advice in (_HUGEPAGE, _COLLAPSE):
            _advise(start, end, advice)


def _advise(start: int, end: int, advice: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)

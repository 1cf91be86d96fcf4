"""Large pages: asked for what was allocated within, and nothing that lies there changes."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from titans_runtime.backends import pages
from titans_runtime.backends.pages import large_pages

MEGABYTES = 8
SIZE = MEGABYTES * 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is asked for")


def _allocate() -> mmap.mmap:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes(range(256)) * (SIZE // 256)
    return memory


def test_content_stays() -> None:
    before = _allocate()
    with large_pages():
        within = _allocate()
    assert before[:] == within[:] == bytes(range(256)) * (SIZE // 256)


def test_whole_large_pages_are_asked_for_within_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_advise", lambda start, end: asked.append((start, end)))
    old = _allocate()
    before = set(pages._allocations())
    with large_pages():
        new = _allocate()
    assert sum(max(0, end - start) for start, end in asked) >= SIZE - 2 * 2**21
    for start, end in asked:
        assert start % 2**21 == end % 2**21 == 0
        assert not any(left <= start and end <= right for left, right in before if start < end)
    assert len(old) == len(new)


def test_a_system_that_does_not_show_its_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MAPS", Path("/nowhere/maps"))
    monkeypatch.setattr(pages, "_advise", lambda *_: pytest.fail("asked for nothing known"))
    with large_pages():
        _allocate()

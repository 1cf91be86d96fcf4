"""Large pages: for what a graph has allocated and runs on often; nothing that lies there changes."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from titans_runtime.backends import pages
from titans_runtime.backends.pages import Memory, noted

MEGABYTES = 8
SIZE = MEGABYTES * 2**20
LARGE = 2**21

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is asked for")


def _allocate() -> mmap.mmap:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes(range(256)) * (SIZE // 256)
    return memory


def _wear(memory: Memory) -> None:
    """Run until the memory is moved, and wait for that."""
    movers = [memory.used() for _ in range(pages._RUNS)]
    assert not any(movers[:-1])
    if movers[-1] is not None:
        movers[-1].join()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_advise", lambda start, end, _: asked.append((start, end)))
    return asked


def test_content_stays() -> None:
    before, memory = _allocate(), Memory()
    with noted(memory):
        within = _allocate()
    _wear(memory)
    assert before[:] == within[:] == bytes(range(256)) * (SIZE // 256)


def test_whole_large_pages_are_asked_for_within_what_is_new(asked: list[tuple[int, int]]) -> None:
    old, memory = _allocate(), Memory()
    before = set(pages._allocations())
    with noted(memory):
        new = _allocate()
    assert not asked, "a start costs nothing"
    _wear(memory)
    assert sum(end - start for start, end in set(asked)) >= SIZE - 2 * LARGE
    for start, end in asked:
        assert start % LARGE == end % LARGE == 0
        assert not any(left <= start and end <= right for left, right in before)
    assert len(old) == len(new)


def test_memory_is_moved_once(asked: list[tuple[int, int]]) -> None:
    memory = Memory()
    memory.allocated(1, 4 * LARGE)
    _wear(memory)
    count = len(asked)
    assert set(asked) == {(LARGE, 4 * LARGE)}
    assert not any(memory.used() for _ in range(3 * pages._RUNS))
    assert len(asked) == count


def test_less_than_a_large_page_is_left_alone(asked: list[tuple[int, int]]) -> None:
    memory = Memory()
    memory.allocated(LARGE + 1, 3 * LARGE - 1)
    _wear(memory)
    assert not asked


def test_a_system_that_does_not_show_its_memory_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(pages, "_MAPS", Path("/nowhere/maps"))
    memory = Memory()
    with noted(memory):
        _allocate()
    _wear(memory)
    assert not asked

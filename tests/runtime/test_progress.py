"""Bars: told every count on a terminal, and silent elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from titans_runtime.progress import progress_bar, progress_counter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_things_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_counter(40, "preparing", "B") as watch:
        for _ in range(4):
            watch(10)
    assert "preparing" in sys.stderr.getvalue()
    assert "/40" in sys.stderr.getvalue()
    assert list(progress_bar(range(3), "scoring", scale=5)) == [0, 1, 2]
    assert "/15" in sys.stderr.getvalue()


def test_a_file_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_counter(40, "preparing") as watch:
        watch(10)
    assert list(progress_bar([1, 2], "scoring")) == [1, 2]
    assert sys.stderr.getvalue() == ""

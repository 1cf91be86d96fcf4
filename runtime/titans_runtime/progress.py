"""Progress bars: on a terminal only, on stderr, and only where tqdm is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from titans_runtime.errors import EnvironmentProblem
from titans_runtime.optional import optional_import

Item = TypeVar("Item")


def progress_bar(
    items: Iterable[Item], description: str, unit: str = "it", scale: int | None = None
) -> Iterator[Item]:
    """Yield ``items`` behind a bar.

    Args:
        items: what to yield.
        description: label.
        unit: of one count.
        scale: counts for each item, where an item stands for many (a segment of tokens).
    """
    total = len(items) * (scale or 1) if isinstance(items, Sized) else None
    with progress_counter(total, description, unit, scaled=bool(scale)) as advance:
        for item in items:
            yield item
            advance(scale or 1)


@contextlib.contextmanager
def progress_counter(
    total: int | None, description: str, unit: str = "it", scaled: bool = False
) -> Iterator[Callable[[int], object]]:
    """A bar for what is no loop of the caller's: yields a function that moves it on by a count.

    Args:
        total: counts until the end, if that is known.
        description: label.
        unit: of one count.
        scaled: whether large counts are shown in thousands and millions.
    """
    try:
        tqdm = optional_import("tqdm", "progress") if sys.stderr.isatty() else None
    except EnvironmentProblem:  # a bar is a comfort, not a need
        tqdm = None
    if tqdm is None:
        yield _nothing
        return
    with tqdm.tqdm(total=total, desc=description, unit=unit, unit_scale=scaled, leave=False) as bar:
        yield bar.update


def _nothing(count: int) -> None:
    """What moves no bar."""

"""Progress bars: on a terminal only, on stderr, and only where tqdm is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
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
    if not sys.stderr.isatty():
        yield from items
        return
    try:
        tqdm = optional_import("tqdm", "progress")
    except EnvironmentProblem:  # a bar is a comfort, not a need
        yield from items
        return
    total = len(items) * (scale or 1) if isinstance(items, Sized) else None
    with tqdm.tqdm(total=total, desc=description, unit=unit, unit_scale=bool(scale), leave=False) as bar:
        for item in items:
            yield item
            bar.update(scale or 1)

"""Removes what has expired from a store, again and again, in a thread of its own."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from titans_runtime.errors import TitansError
from titans_runtime.store import MemoryStore

LEAST: Final = 1.0
MOST: Final = 3600.0
"""Bounds of the time between two sweeps, in seconds."""
PATIENCE: Final = 10.0
"""Seconds that a sweep under way has to end: a store that lists a million names hears nothing meanwhile."""
_REST: Final = 9.0
"""Times a sweep's own duration that the store rests after it: reading a million entries is no small thing."""


def interval_of(expire: float) -> float:
    """Seconds between two sweeps, where memories live for ``expire`` seconds; 0 for those that live for good.

    Those may lie beside others from when the server had been told otherwise, and beside tombstones.
    """
    return min(max(expire / 10, LEAST), MOST) if expire else MOST


class Sweeper:
    """Sweeps at once, then after every interval, until it is closed. A store that fails is asked again."""

    def __init__(
        self,
        store: MemoryStore,
        interval: float,
        wait: Callable[[float], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Then :meth:`start`.

        Args:
            store: whose expired memories go.
            interval: seconds between two sweeps, at least.
            wait: passes these seconds, or fewer; whether to stop. By default until :meth:`close`.
            clock: in seconds, for how long a sweep takes.
        """
        self._store, self._interval, self._clock = store, interval, clock
        self._stop = threading.Event()
        self._wait = wait or self._stop.wait
        self._thread = threading.Thread(target=self.run, name="titans-sweep", daemon=True)

    def start(self) -> Sweeper:
        """Begin; returns itself."""
        self._thread.start()
        return self

    def run(self) -> None:
        """Sweep until told to stop."""
        while not self._stop.is_set():
            began = self._clock()
            self._sweep()
            if self._wait(max(self._interval, _REST * (self._clock() - began))):
                return

    def close(self) -> None:
        """Stop after the memory that is being looked at; leave a sweep alone that does not come that far."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)

    def _sweep(self) -> None:
        try:
            self._store.sweep(self._stop.is_set)
        except TitansError:
            pass  # the store has logged it
        except Exception as error:  # noqa: BLE001 - whatever a store raises, the next sweep is to come
            print(f"titans: sweep: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201

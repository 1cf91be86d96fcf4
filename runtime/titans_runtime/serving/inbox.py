"""Where the events of several streams come together, in the event loop of who reads them."""

from __future__ import annotations

import asyncio
import contextlib

from titans_runtime.serving.request import Deliver, Event


class Inbox:
    """Events with the row of their stream, in order. Made and read in one event loop, filled from any thread.

    It stands by itself: a stream holds what it delivers to, and whoever reads holds the streams. Were the two
    one object, every request would be a cycle, and its sessions would stay until the collector comes by.
    """

    def __init__(self) -> None:
        """In the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def of(self, row: int) -> Deliver:
        """What the stream of a row delivers to."""

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens
                self._loop.call_soon_threadsafe(self._events.put_nowait, (row, event))

        return deliver

    async def get(self) -> tuple[int, Event]:
        """The next event, once there is one."""
        return await self._events.get()

    @property
    def is_empty(self) -> bool:
        """Whether :meth:`get` would wait."""
        return self._events.empty()

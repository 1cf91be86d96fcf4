"""What one server process holds: the model, the scheduler, the memories, and the figures about them."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path

from titans_runtime.errors import OverloadError, UsageError
from titans_runtime.model import load
from titans_runtime.serving.discreet import DiscreetStore
from titans_runtime.serving.memories import Memories
from titans_runtime.serving.metrics import Metrics
from titans_runtime.serving.scheduler import Scheduler
from titans_runtime.serving.settings import Settings, read_tokens
from titans_runtime.serving.sweeper import Sweeper, interval_of
from titans_runtime.store import open_store


class Service:
    """Opened once a process, closed once."""

    def __init__(self, settings: Settings) -> None:
        """Load the bundle, open the store, start the scheduler.

        Raises:
            TitansError: whatever is wrong with the bundle, the store or the tokens.
        """
        self.settings = settings
        self.owners = read_tokens(Path(settings.tokens)) if settings.tokens else None
        self.model = load(settings.bundle, threads=settings.threads, backend=settings.backend)
        if not self.model.vocab_size:
            raise UsageError(
                f"{settings.bundle}: takes vectors, and a server completes tokens; run it from Python, as in "
                "session.append(vectors)"
            )
        self.name = Path(settings.bundle).resolve().name
        self.started = int(time.time())
        self._store = DiscreetStore(open_store(settings.store))
        self.memories = Memories(
            self.model, self._store, settings.max_memories, settings.hot, settings.expire
        )
        self.scheduler = Scheduler(self.model, settings.slots, settings.waiting).start()
        self.metrics = Metrics(self.scheduler)
        self.under_way: set[asyncio.Future[None]] = (
            set()
        )  # one a request, done when it holds nothing any more
        self.is_closing = False
        self._closed = False
        self._lock = threading.Lock()
        self._sweeper = Sweeper(self._store, interval_of(settings.expire)).start()
        self._all_saved: bool | None = None
        self._saving = threading.Lock()

    def check_open(self) -> None:
        """Refuse what would change something while the server closes.

        Raises:
            OverloadError: it closes.
        """
        if self.is_closing:
            raise OverloadError("the server is closing; ask again in a moment, or another one")

    def drain(self) -> None:
        """Take no more requests; end those under way, at the latest when their time is up."""
        self.is_closing = True
        with self._lock:
            if not self._closed:
                self._closed = True
                self.scheduler.close(self.settings.drain)

    def hurry(self) -> None:
        """Let a drain, under way or to come, end at once."""
        self.is_closing = True
        self.scheduler.hurry()

    def close(self) -> bool:
        """Drain, then save every memory; whether all are saved. A second call does nothing more."""
        self.drain()
        with self._saving:
            if self._all_saved is None:
                self._all_saved = self._save_all()
                self._sweeper.close()  # after what must not wait for it
                self._store.close()
            return self._all_saved

    def _save_all(self) -> bool:
        saved, problems = self.memories.save_all()
        if saved:
            print(f"titans: saved {saved} memories", file=sys.stderr)  # noqa: T201 - the server's log
        for problem in problems:
            print(f"titans: not saved: {problem}", file=sys.stderr)  # noqa: T201
        return not problems

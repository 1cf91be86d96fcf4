"""Sessions of requests, opened in threads of their own: a store may take its time, and the others go on."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from titans_runtime.errors import TitansError, UsageError
from titans_runtime.serving.run import Run, known
from titans_runtime.session import Session

if TYPE_CHECKING:
    from titans_runtime.model import Model


class Openers:
    """Opens what is given to it, and keeps it until it is taken."""

    def __init__(self, model: Model, threads: int, lock: threading.Condition) -> None:
        """``model``: of all sessions; ``lock``: is notified when one is open."""
        self._model, self._lock = model, lock
        self._under_way: dict[int, Run] = {}  # by their own id, until they are taken
        self._opened: deque[tuple[Run, TitansError | None]] = deque()
        self._pool = ThreadPoolExecutor(threads, "titans-opener")

    def __len__(self) -> int:
        """Requests that are being opened, or are open and not taken."""
        return len(self._under_way)

    @property
    def have_opened(self) -> bool:
        """Whether something is to be taken."""
        return bool(self._opened)

    def begin(self, run: Run, apart: bool) -> None:
        """Open the session of a request; ``apart``: in a thread of its own."""
        self._under_way[id(run)] = run
        if apart:
            self._pool.submit(self._open, run)
        else:
            self._open(run)

    def take(self) -> tuple[Run, TitansError | None] | None:
        """A request that is open, or was cancelled before, or what was wrong with it; None where none is."""
        if not self._opened:
            return None
        run, problem = self._opened.popleft()
        del self._under_way[id(run)]
        return run, problem

    def close(self) -> list[Run]:
        """Open nothing more; what was not taken, once no thread works on it."""
        self._pool.shutdown(cancel_futures=True)
        left = list(self._under_way.values())
        self._under_way.clear()
        self._opened.clear()
        return left

    def check(self, session: Session) -> None:
        """Whether a session is of this model.

        Raises:
            UsageError: it is of another.
        """
        if session.model is not self._model:
            raise UsageError("scheduler: the session belongs to another model")

    def _open(self, run: Run) -> None:
        """Make a session. Its request is not ended meanwhile: others would get its memory."""
        problem = None
        try:
            if not run.stream.is_cancelled:
                run.opened = self._made(run)
        except Exception as error:  # noqa: BLE001 - whatever befalls one request, the others go on
            problem = known(error)
        with self._lock:
            self._opened.append((run, problem))
            self._lock.notify()

    def _made(self, run: Run) -> Session:
        assert not isinstance(run.request.session, Session)
        session = run.request.session()
        self.check(session)
        run.request.check(session)
        return session

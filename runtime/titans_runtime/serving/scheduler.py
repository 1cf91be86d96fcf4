"""Continuous batching: sessions join and leave the running batch between tokens.

A step does two things. One session that still reads its prompt reads a segment more, by itself: a segment
fills the processor without company. And all sessions that write draw a token each and see it in one call
of the model. So a long prompt delays the others by a segment a token and no more; readers take turns, and
so do owners at the door. What opens a session, which may take a store's time, does so in a thread of its own,
in the request's slot.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from titans_runtime.backends import Array
from titans_runtime.errors import OverloadError, TitansError, UsageError
from titans_runtime.forward import SEGMENT
from titans_runtime.serving.openers import Openers
from titans_runtime.serving.request import Deliver, Finished, Opened, Piece, Request, Stream
from titans_runtime.serving.run import Run, known
from titans_runtime.serving.waiting import Waiting
from titans_runtime.session import Session
from titans_runtime.tokens import checked_input

if TYPE_CHECKING:
    from titans_runtime.model import Model

SLOTS: Final = 16
WAITING: Final = 256
READ: Final = 128
"""Tokens that one reader reads in a step: half the time of a decoding step of 16 sessions, or less."""
_NAP: Final = 0.05
"""Seconds between two looks at deadlines while sessions are opened and none runs."""


@dataclass
class Counters:
    """What a scheduler has done so far."""

    steps: int = 0
    read: int = 0
    drawn: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """Runs requests on one model; submit from any thread.

    Either call :meth:`step` yourself, or :meth:`start` a thread that does. A session whose request is
    cancelled, late or fails stands where it stood between two steps; fork it before, to return to it.
    """

    def __init__(
        self,
        model: Model,
        slots: int = SLOTS,
        waiting: int = WAITING,
        waiting_of_one: int | None = None,
        segment: int = READ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take no request yet.

        Args:
            model: of all sessions.
            slots: requests that run at once.
            waiting: requests that wait for a slot at most.
            waiting_of_one: those of one owner among them; default is a quarter.
            segment: tokens of a prompt that are read in a step.
            clock: of the deadlines.

        Raises:
            UsageError: a number is no integer, 1 or more.
        """
        few = max(waiting // 4, 1) if waiting_of_one is None else waiting_of_one
        for name, value in (
            ("slots", slots),
            ("waiting", waiting),
            ("waiting_of_one", few),
            ("segment", segment),
        ):
            if type(value) is not int or value < 1:
                raise UsageError(f"scheduler {name} is {value!r}; it must be an integer, 1 or more")
        self.model, self.clock = model, clock
        self._slots, self._segment = slots, segment
        self._resources = contextlib.ExitStack()
        self._batch = self._resources.enter_context(model.batch([], room=slots))
        self._lock = threading.Condition()
        self._waiting = Waiting(waiting, few)
        self._openers = Openers(model, slots, self._lock)
        self._reading: deque[Run] = deque()
        self._writing: dict[int, Run] = {}  # by the id of the session, which the batch holds
        self._thread: threading.Thread | None = None
        self._closing = self._abandons = False
        self.counters = Counters()

    # --- from any thread

    def submit(self, request: Request, deliver: Deliver | None = None) -> Stream:
        """Queue a request.

        Args:
            request: its session must be used by nobody else until the end.
            deliver: called with every event, in the scheduler's thread, in place of iterating the stream.
                It must not block.

        Raises:
            OverloadError: the queue is full, of all or of this owner, or the scheduler is closed.
            UsageError: the session belongs to another model.
            TokenError: the prompt is of a wrong type or out of range.
        """
        session = request.session if isinstance(request.session, Session) else None
        if session is not None:
            self._openers.check(session)
        prompt = checked_input(request.prompt, self.model.manifest) if len(request.prompt) else _NOTHING
        run = Run(Stream(request, deliver), prompt, np.random.default_rng(request.seed), session)
        with self._lock:
            if self._closing:
                raise OverloadError("scheduler: is closed; ask another one")
            self._waiting.add(run)
            self._lock.notify()
        return run.stream

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._openers) + len(self._reading) + len(self._writing)

    def start(self) -> Self:
        """Let a thread of its own take the steps."""
        self._thread = threading.Thread(target=self._work, name="titans-scheduler", daemon=True)
        self._thread.start()
        return self

    def close(self, patience: float = 0.0) -> None:
        """Take no more requests, give those under way some time, and end what is left as ``closed``.

        Args:
            patience: seconds.
        """
        with self._lock:
            self._closing = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join(patience)
        else:
            until = self.clock() + patience
            while self.clock() < until and self.step():
                pass
        self.hurry()
        if self._thread is not None:
            self._thread.join()
        self._end_all(self._openers.close())  # nothing uses a memory after its stream has ended
        self._resources.close()

    def hurry(self) -> None:
        """Have no patience: a :meth:`close` that waits, or comes, ends what is under way at once."""
        with self._lock:
            self._closing = self._abandons = True
            self._lock.notify()

    # --- in one thread

    def step(self) -> bool:
        """Advance every session that runs; whether any did."""
        self._take_over()
        self._dismiss()
        self._admit()
        if not (self._reading or self._writing):
            return False
        self.counters.steps += 1
        self._write()
        self._read()
        return True

    def _work(self) -> None:
        while True:
            with self._lock:
                while not (self.waiting or self.running or self._closing):
                    self._lock.wait()
            if self._abandons:
                return
            if not self.step() and not self._nap() and not self.waiting and self._closing:
                return

    def _nap(self) -> bool:
        """Wait a little where sessions are being opened and none runs; whether there are such."""
        with self._lock:
            if self._openers and not self._openers.have_opened:
                self._lock.wait(_NAP)
            return bool(self._openers)

    def _dismiss(self) -> None:
        """End what is cancelled or late, wherever it is."""
        now = self.clock()
        with self._lock:
            ended = self._waiting.pop_where(lambda run: run.dismissal(now))
        ended += [run for run in self._reading if run.dismissal(now)]
        self._reading = deque(run for run in self._reading if run not in ended)
        for run in [run for run in self._writing.values() if run.dismissal(now)]:
            self._leave(run)
            ended.append(run)
        for run in ended:
            self._finish(run, run.dismissal(now) or "")

    def _admit(self) -> None:
        """Fill the slots; owners take turns."""
        while self.running < self._slots:
            with self._lock:
                run = self._waiting.pop()
            if run is None:
                return
            if run.opened is not None:
                self._begin(run)
                continue
            self._openers.begin(run, apart=self._thread is not None)
            if self._thread is None:
                self._take_over()

    def _take_over(self) -> None:
        """Let those begin whose sessions have been opened."""
        while (taken := self._openers.take()) is not None:
            run, problem = taken
            if problem is not None:
                self._finish(run, "failed", problem)
            elif run.opened is None:
                self._finish(run, "cancelled")
            else:
                run.stream.deliver(Opened(run.opened, run.opened.position))
                self._begin(run)

    def _begin(self, run: Run) -> None:
        if run.has_read:
            self._begin_to_write(run)
        else:
            self._reading.append(run)

    def _read(self) -> None:
        """Let the next reader read a segment, or more of it where nobody waits for that."""
        if not self._reading:
            return
        run = self._reading.popleft()
        alone = not self._reading and not self._writing
        part = run.prompt[run.read : run.read + (SEGMENT if alone else self._segment)]
        session = run.session
        before = session.last_logits
        try:
            logits = session.append(part)
        except Exception as error:  # noqa: BLE001 - whatever befalls one request, the others go on
            self._fail(run, error)
            return
        run.read += len(part)
        self.counters.read += len(part)
        run.stream.deliver(Piece(part, drawn=False, scores=run.scores(before, logits)))
        self._begin(run)

    def _begin_to_write(self, run: Run) -> None:
        if run.request.max_new_tokens == 0:
            self._finish(run, "length")
            return
        try:
            self._batch.join(run.session)
        except TitansError as error:
            self._fail(run, error)
        else:
            self._writing[id(run.session)] = run

    def _write(self) -> None:
        """Let every writer draw a token and see it."""
        runs = [self._writing[id(session)] for session in self._batch.sessions]
        if not runs:
            return
        before = [run.session.last_logits for run in runs]
        tokens = [
            run.request.sampling.draw(logits, run.generator)
            for run, logits in zip(runs, before, strict=True)
            if logits is not None
        ]
        try:
            self._batch.append([[token] for token in tokens], [run.request.learn for run in runs])
        except Exception:  # noqa: BLE001 - of one of them, which is found by itself
            went_well = [self._write_alone(run, token) for run, token in zip(runs, tokens, strict=True)]
        else:
            went_well = [True] * len(runs)
        for run, token, logits, well in zip(runs, tokens, before, went_well, strict=True):
            if well:
                self._note(run, token, logits)

    def _write_alone(self, run: Run, token: int) -> bool:
        """See a token outside the batch; whether it went well."""
        session = run.session
        self._leave(run)
        try:
            with self.model.batch([session]) as alone:
                alone.append([[token]], [run.request.learn])
            self._batch.join(session)
        except Exception as error:  # noqa: BLE001 - likewise
            self._fail(run, error)
            return False
        self._writing[id(session)] = run
        return True

    def _note(self, run: Run, token: int, before: Array | None) -> None:
        run.drawn.append(token)
        self.counters.drawn += 1
        scores = before[None] if run.request.scores and before is not None else None
        run.stream.deliver(Piece(np.array([token], np.int64), drawn=True, scores=scores))
        ending = run.ending()
        if ending:
            self._leave(run)
            self._finish(run, ending)

    def _leave(self, run: Run) -> None:
        session = run.session
        del self._writing[id(session)]
        self._batch.leave(session)

    def _fail(self, run: Run, error: Exception) -> None:
        self._finish(run, "failed", known(error))

    def _finish(self, run: Run, reason: str, error: TitansError | None = None) -> None:
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        run.stream.deliver(Finished(reason, error, run.read, len(run.drawn)))

    def _end_all(self, left: list[Run]) -> None:
        """End ``left`` and everything else."""
        with self._lock:
            left += self._waiting.pop_where(lambda _: True)
        left += self._reading
        self._reading.clear()
        for run in list(self._writing.values()):
            self._leave(run)
            left.append(run)
        for run in left:
            self._finish(run, "closed")


_NOTHING: Final = np.empty(0, np.int64)

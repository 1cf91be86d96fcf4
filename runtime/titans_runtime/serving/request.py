"""What one caller asks of the scheduler, and what comes back."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from titans_runtime.backends import Array
from titans_runtime.errors import TitansError, UsageError
from titans_runtime.sampling import Sampling
from titans_runtime.session import Session
from titans_runtime.tokens import Tokens


@dataclass(frozen=True)
class Request:
    """A prompt to read and tokens to write, on a session that belongs to the scheduler meanwhile.

    Attributes:
        session: of the scheduler's model; its memory, edit strength and editor are its own. Or
            what gives one, called in a thread of its own once there is a slot: what waits holds no memory.
        prompt: tokens to append first; may be empty for a session that has seen some.
        max_new_tokens: tokens to draw at most.
        sampling: how.
        seed: of the draws; None draws afresh.
        learn: whether the drawn tokens teach the memory.
        stop: sequences of token ids; drawing one of them is the end.
        deadline: on the scheduler's clock; None for none.
        owner: of the request; owners take turns.
        scores: whether pieces carry the logits under which their tokens stood.
    """

    session: Session | Callable[[], Session]
    prompt: Tokens = b""
    max_new_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    learn: bool = False
    stop: Sequence[tuple[int, ...]] = ()
    deadline: float | None = None
    owner: str = ""
    scores: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a number is out of range, a stop sequence is empty, or there is nothing to begin with;
                what a session to be opened lacks is found once it is there.
        """
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 0:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens!r}; it must be an integer, 0 or more")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed is {self.seed}; it must be 0 or more")
        if not all(self.stop):
            raise UsageError("stop: a sequence is empty; give one token or more")
        if isinstance(self.session, Session):
            self.check(self.session)

    def check(self, session: Session) -> None:
        """Whether the request can begin on a session.

        Raises:
            UsageError: there is nothing to begin with, or nothing to draw.
        """
        if len(self.prompt) == 0 and session.last_logits is None:
            raise UsageError("the session has seen no token yet; give a prompt")
        if self.max_new_tokens and not session.model.vocab_size:
            raise UsageError("the model takes vectors; it has no tokens to draw")


@dataclass(frozen=True)
class Piece:
    """Tokens that a session has seen.

    Attributes:
        tokens: ids, or vectors.
        drawn: whether they were drawn; otherwise they are of the prompt.
        scores: logits ``(T, V)`` under which each of them stood, before the memory saw it; of the first
            token that a session sees, zeros. None where they were not asked for.
    """

    tokens: Array
    drawn: bool
    scores: Array | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Opened:
    """The session of a request that gave none, but what opens one: the first event of its stream.

    Attributes:
        session: the scheduler's until the end.
        position: tokens that it has seen before.
    """

    session: Session = field(repr=False)
    position: int


@dataclass(frozen=True)
class Finished:
    """The end of a stream.

    Attributes:
        reason: ``length``, ``stop``, ``deadline``, ``cancelled``, ``closed`` or ``failed``.
        error: of ``failed``.
        read: tokens of the prompt that the session has seen.
        drawn: tokens drawn, each of which it has seen.
    """

    reason: str
    error: TitansError | None = None
    read: int = 0
    drawn: int = 0


Event = Opened | Piece | Finished
Deliver = Callable[[Event], None]


class Stream:
    """What a request has brought so far, in order; ends with :class:`Finished`. Belongs to one reader."""

    def __init__(self, request: Request, deliver: Deliver | None = None) -> None:
        """Use :meth:`titans_runtime.serving.Scheduler.submit`."""
        self.request = request
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.deliver: Deliver = self._events.put if deliver is None else deliver
        self.is_cancelled = False

    def cancel(self) -> None:
        """Ask for the end: it comes before the next token. From any thread."""
        self.is_cancelled = True

    def __iter__(self) -> Iterator[Event]:
        """Wait for events until the end."""
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished):
                return

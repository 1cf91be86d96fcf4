"""A request under way in the scheduler: how far it has come, and what its end is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from titans_runtime.backends import Array
from titans_runtime.errors import EnvironmentProblem, TitansError
from titans_runtime.serving.request import Request, Stream
from titans_runtime.session import Session


@dataclass(eq=False)
class Run:
    """One request under way.

    Attributes:
        stream: where its events go.
        prompt: its tokens.
        generator: of the tokens that are drawn.
        opened: its session, once there is one.
        read: tokens of the prompt that the session has seen.
        drawn: tokens.
    """

    stream: Stream
    prompt: Array
    generator: np.random.Generator
    opened: Session | None = None
    read: int = 0
    drawn: list[int] = field(default_factory=list)

    @property
    def request(self) -> Request:
        """What was asked for."""
        return self.stream.request

    @property
    def session(self) -> Session:
        """The session of a run that has a slot, and is not being opened."""
        assert self.opened is not None
        return self.opened

    @property
    def has_read(self) -> bool:
        """Whether the prompt is read."""
        return self.read == len(self.prompt)

    def ending(self) -> str | None:
        """Why nothing more is to be drawn, or None."""
        if any(tuple(self.drawn[-len(stop) :]) == tuple(stop) for stop in self.request.stop):
            return "stop"
        return "length" if len(self.drawn) == self.request.max_new_tokens else None

    def dismissal(self, now: float) -> str | None:
        """Why it is to end at this time of the deadlines' clock, whatever it has done; None if it is not."""
        if self.stream.is_cancelled:
            return "cancelled"
        late = self.request.deadline is not None and self.request.deadline <= now
        return "deadline" if late else None

    def scores(self, before: Array | None, logits: Array) -> Array | None:
        """Logits under which the tokens stood that have brought ``logits (T, V)``, if they are asked for."""
        if not self.request.scores:
            return None
        first = np.zeros_like(logits[0]) if before is None else before
        return np.concatenate([first[None], logits[:-1]])


def known(error: Exception) -> TitansError:
    """An error as one of ours, without frames: they would hold the session for as long as it is kept."""
    if not isinstance(error, TitansError):
        return EnvironmentProblem(f"{type(error).__name__}: {error}")
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)

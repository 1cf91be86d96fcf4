"""What editing did: a report for each call, and a running log of a stream."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from titans_runtime.errors import DataError, UsageError
from titans_runtime.files import write_output
from titans_runtime.json_reader import parse_object


@dataclass
class Lesson:
    """One period: what was offered to a memory, and what became of it.

    Attributes:
        objective: ``readout``, ``prediction``, …
        position: of the period's first token in the stream.
        tokens: of the period.
        learnt: those that were learnt from.
        loss: mean loss in nats over these, before the step; for an associative loss, a token's mean error.
        loss_after: the same after the last step that was kept and measured. With ``rollback`` every step is
            measured; without it all but the last of ``Editor.steps``, which nothing needs: then this is the
            loss before that step. NaN where none was measured.
        norms: norm of the gradient by memory, before clipping, at the last step that was taken.
        parts: each layer's part of the loss, where it has parts.
        steps: steps that were kept.
        refused: why nothing more was learnt, or an empty text.
        seconds: time that the period took.
    """

    objective: str
    position: int
    tokens: int
    learnt: int = 0
    loss: float = math.nan
    loss_after: float = math.nan
    norms: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    refused: str = ""
    seconds: float = 0.0


@dataclass
class EditReport:
    """What one call learnt.

    Attributes:
        tokens: tokens that the call was given.
        surprise: loss in nats of each token that the readout memory was taught, before it saw it, in
            stream order.
        lessons: every period that ended within the call; :meth:`add` adds one.
        objective: of the call's editor, the first of two; :attr:`loss` is of it. Empty where there is none.
    """

    tokens: int = 0
    surprise: list[float] = field(default_factory=list)
    lessons: list[Lesson] = field(default_factory=list)
    objective: str = ""

    def __post_init__(self) -> None:
        """Begin the running total: a budget asks for it at every lesson."""
        self._seconds = sum(lesson.seconds for lesson in self.lessons)

    def add(self, lesson: Lesson) -> None:
        """Add a period that has ended."""
        self.lessons.append(lesson)
        self._seconds += lesson.seconds

    @property
    def losses(self) -> dict[str, float]:
        """Mean loss of the tokens that were learnt from, before the steps, by objective.

        Losses of two objectives are different things, nats or squared errors: there is no mean of both.
        """
        tokens: dict[str, int] = {}
        totals: dict[str, float] = {}
        for lesson in self.lessons:
            if lesson.learnt:
                tokens[lesson.objective] = tokens.get(lesson.objective, 0) + lesson.learnt
                totals[lesson.objective] = totals.get(lesson.objective, 0.0) + lesson.loss * lesson.learnt
        return {objective: total / tokens[objective] for objective, total in totals.items()}

    @property
    def loss(self) -> float:
        """Of :attr:`losses` that of the call's editor, the first where two work side by side.

        NaN where it has learnt nothing.
        """
        return self.losses.get(self.objective, math.nan)

    @property
    def gradient_norm(self) -> list[float]:
        """Norm of the whole gradient of each update."""
        return [math.hypot(*lesson.norms.values()) for lesson in self.lessons if lesson.steps]

    @property
    def updates(self) -> int:
        """Steps applied."""
        return sum(lesson.steps for lesson in self.lessons)

    @property
    def skipped(self) -> int:
        """Periods that taught nothing."""
        return sum(not lesson.steps for lesson in self.lessons)

    @property
    def seconds(self) -> float:
        """Time spent on editing."""
        return self._seconds

    @property
    def refusals(self) -> dict[str, int]:
        """How many periods were refused, by reason."""
        reasons = [lesson.refused for lesson in self.lessons if lesson.refused]
        return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}


class EditLog:
    """Every lesson of a stream, call after call.

    Give it to a session, ``session.log = EditLog()``, or to several; it grows with every call that succeeds.
    """

    def __init__(self) -> None:
        """Empty."""
        self.lessons: list[Lesson] = []

    def add(self, report: EditReport) -> None:
        """Add what a call learnt."""
        self.lessons.extend(report.lessons)

    def take_back(self, lessons: list[Lesson]) -> None:
        """Forget these very lessons: the call that added them was undone. Others may log here, too."""
        undone = {id(lesson) for lesson in lessons}
        self.lessons[:] = [lesson for lesson in self.lessons if id(lesson) not in undone]

    def __len__(self) -> int:
        """Number of lessons."""
        return len(self.lessons)

    def __iter__(self) -> Iterator[Lesson]:
        """The lessons, in order."""
        return iter(self.lessons)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a line, atomically.

        Raises:
            EnvironmentProblem: the file cannot be written; an older one is untouched.
        """
        lines = [json.dumps(_finite(asdict(lesson)), allow_nan=False) + "\n" for lesson in self.lessons]
        write_output(Path(path), "".join(lines).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EditLog:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file cannot be read, or a line is no lesson; the message names it.
        """
        log = cls()
        try:
            lines = Path(path).read_bytes().splitlines()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        for number, line in enumerate(lines, 1):
            try:
                log.lessons.append(_lesson(parse_object(line, str(path))))
            except (ValueError, TypeError):
                raise DataError(f"{path}: line {number} is no lesson of an edit log") from None
        return log

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw loss, gradient norms, refusals and time along the stream, as PNG, SVG or PDF, atomically.

        Raises:
            UsageError: the log is empty, or the name does not end in a kind of picture.
            EnvironmentProblem: matplotlib is missing, or the file cannot be written; an older one is
                untouched.
        """
        from titans_runtime.log_plot import plot_log

        if not self.lessons:
            raise UsageError("edit log: is empty; give it to a session with an editor before the stream")
        write_output(Path(path), plot_log(self.lessons, Path(path)))


def _finite(content: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as null, also within: JSON knows neither."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in content.items()
    }
    return {name: _finite(value) if isinstance(value, dict) else value for name, value in finite.items()}


def _lesson(content: dict[str, Any]) -> Lesson:
    """A lesson from its line, each field of its type, with null as NaN.

    Raises:
        ValueError: a field has another type.
        TypeError: one is missing or unknown.
    """
    read = asdict(Lesson(**content))
    for item in fields(Lesson):
        value = read[item.name]
        if item.type == "dict[str, float]":
            if not isinstance(value, dict):
                raise ValueError(f"{item.name} is no object")
            read[item.name] = {name: _number(number) for name, number in value.items()}
        elif item.type == "float":
            read[item.name] = _number(value)
        elif type(value).__name__ != item.type:
            raise ValueError(f"{item.name} is no {item.type}")
    return Lesson(**read)


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is no number")
    return float(value)  # type: ignore[arg-type]

"""Backends run alternately, after their outputs were compared. Only the ratios mean anything."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Literal, TypeVar

import numpy as np

from titans_runtime.backends import Array
from titans_runtime.bench.options import LEAST_ROUNDS
from titans_runtime.bench.peers import Job, Loader, Runner
from titans_runtime.errors import TitansError, UsageError

Result = TypeVar("Result")
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Case:
    """What is timed: ``tokens`` of each of ``batch`` streams, at once (prefill) or one by one (decode)."""

    kind: Literal["prefill", "decode"]
    tokens: int
    batch: int = 1
    edit: float = 1.0

    def __str__(self) -> str:
        """As in ``prefill 512``."""
        return f"{self.kind} {self.tokens}"


@dataclass(frozen=True)
class Contestant:
    """A backend on a bundle, under the name that it has in the report.

    Attributes:
        name: in the report.
        load: the backend.
        job: what it is to run.
        tolerance: of the largest logit, that its own may differ by; None for that of all.
    """

    name: str
    load: Loader
    job: Job
    tolerance: float | None = None


@dataclass(frozen=True)
class Row:
    """One backend in one case.

    Attributes:
        case: what was timed.
        backend: the contestant's name.
        threads: it had.
        seconds: of a run, round by round.
        ratios: its time over the reference's in the same round.
        error: largest difference of its logits from the reference's, over the largest logit; None where
            it computes none.
    """

    case: Case
    backend: str
    threads: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    error: float | None

    @property
    def seconds_per_token(self) -> float:
        """Median over the rounds; tokens of all streams count."""
        return statistics.median(self.seconds) / (self.case.tokens * self.case.batch)

    @property
    def ratio(self) -> float:
        """Median of ``ratios``."""
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Absent:
    """A backend that was not timed. ``refused``: it ran, and computed something else."""

    backend: str
    threads: int
    reason: str
    refused: bool = False


@dataclass
class Measurement:
    """What came out."""

    rows: list[Row] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def row(self, backend: str, case: Case) -> Row:
        """The one of a backend in a case."""
        return next(row for row in self.rows if (row.backend, row.case) == (backend, case))


def cases(
    prefill: Sequence[int], decode: Sequence[int], batch: Sequence[int], edit: Sequence[float]
) -> list[Case]:
    """Every combination; a length of 0 is none."""
    lengths = [("prefill", n) for n in prefill if n] + [("decode", n) for n in decode if n]
    return [Case(kind, n, b, e) for (kind, n), b, e in product(lengths, batch, edit)]  # type: ignore[arg-type]


def measure(
    contestants: Sequence[Contestant],
    wanted: Sequence[Case],
    vocab_size: int,
    rounds: int = LEAST_ROUNDS,
    tolerance: float = 1e-4,
    progress: Progress = lambda rounds: rounds,
) -> Measurement:
    """Load, compare, alternate.

    Args:
        contestants: the first is the reference.
        wanted: cases; every contestant runs each of them in every round, one after the other.
        vocab_size: token ids are drawn below it.
        rounds: timed ones, after one that warms up and whose outputs are compared, and for decode runs
            as many more as give 160 tokens.
        tolerance: of the largest logit, that outputs of contestants without one of their own may differ by.
        progress: wraps the rounds.

    Raises:
        UsageError: fewer than five rounds, or no case.
        TitansError: the reference cannot run.
    """
    if rounds < LEAST_ROUNDS:
        raise UsageError(f"{rounds} rounds; the spread of fewer than {LEAST_ROUNDS} says nothing")
    if not wanted:
        raise UsageError("nothing to time; give a length of a prefill or of a decode run")
    result = Measurement()
    ids = {case: _tokens(case, vocab_size) for case in wanted}
    with _loaded(contestants, result) as runners:
        errors = _compare(runners, contestants, ids, tolerance, result)
        with _without_collector():
            _settle(runners, ids)
            times = _alternate(runners, ids, rounds, progress)
    reference = contestants[0].name
    for case in wanted:
        for name in runners:
            seconds = times[name, case]
            ratios = tuple(a / b for a, b in zip(seconds, times[reference, case], strict=True))
            threads = contestants[0].job.threads
            result.rows.append(Row(case, name, threads, seconds, ratios, errors.get((name, case))))
    return result


def _tokens(case: Case, vocab_size: int) -> Array:
    """``(B, T)``, and one more for a decode run, which begins with a token that is not timed."""
    count = case.tokens + (case.kind == "decode")
    return np.random.default_rng(0).integers(0, vocab_size, (case.batch, count))


@contextlib.contextmanager
def _loaded(contestants: Sequence[Contestant], result: Measurement) -> Iterator[dict[str, Runner]]:
    with contextlib.ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for one in contestants:
            runner = _attempt(partial(one.load, one.job), one, contestants[0], result)
            if runner is not None:
                stack.callback(runner.close)
                runners[one.name] = runner
                result.versions |= runner.versions
        yield runners


def _attempt(
    action: Callable[[], Result], one: Contestant, reference: Contestant, result: Measurement
) -> Result | None:
    """Do it, or note why the contestant cannot. Without the reference there is nothing to compare with."""
    try:
        return action()
    except Exception as error:
        if one is reference:
            raise
        words = " ".join(str(error).split())
        reason = words if isinstance(error, TitansError) else f"{type(error).__name__}: {words}"
        result.absent.append(Absent(one.name, one.job.threads, reason[:_REASON]))
        return None


_REASON = 300  # characters of a compiler's complaint
_SETTLED = 160  # tokens; ours moves its weights to large pages after 128, in the background


def _compare(
    runners: dict[str, Runner],
    contestants: Sequence[Contestant],
    ids: dict[Case, Array],
    tolerance: float,
    result: Measurement,
) -> dict[tuple[str, Case], float]:
    """Run every case once; contestants that fail or compute something else leave ``runners``."""
    errors: dict[tuple[str, Case], float] = {}
    for case, tokens in ids.items():
        expected: Array | None = None
        for one in contestants:
            runner = runners.get(one.name)
            if runner is None:
                continue
            done = _attempt(partial(_run, runner, case, tokens), one, contestants[0], result)
            if done is None:
                del runners[one.name]
                continue
            _, actual = done
            expected = actual if expected is None else expected
            if runner.is_model:
                error = _difference(actual, expected)
                errors[one.name, case] = error
                limit = tolerance if one.tolerance is None else one.tolerance
                if not error <= limit:
                    reason = (
                        f"{case}: logits differ by {error:.1e} of the largest, and may by {limit:g}; "
                        "are these the same weights?"
                    )
                    result.absent.append(Absent(one.name, one.job.threads, reason, refused=True))
                    del runners[one.name]
    return errors


def _difference(actual: Array, expected: Array) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _settle(runners: dict[str, Runner], ids: dict[Case, Array]) -> None:
    """Decode, untimed, until whatever a runner does once it is used much is done."""
    for case, tokens in ids.items():
        if case.kind == "decode":
            for runner in runners.values():
                for _ in range(math.ceil(_SETTLED / case.tokens)):
                    _run(runner, case, tokens)


def _alternate(
    runners: dict[str, Runner], ids: dict[Case, Array], rounds: int, progress: Progress
) -> dict[tuple[str, Case], tuple[float, ...]]:
    times: dict[tuple[str, Case], list[float]] = {(name, case): [] for case in ids for name in runners}
    for _ in progress(range(rounds)):
        for case, tokens in ids.items():
            for name, runner in runners.items():
                times[name, case].append(_run(runner, case, tokens)[0])
    return {key: tuple(seconds) for key, seconds in times.items()}


def _run(runner: Runner, case: Case, tokens: Array) -> tuple[float, Array]:
    """Seconds and logits."""
    runner.start(case.batch, case.edit)
    if case.kind == "prefill":
        began = time.perf_counter()
        logits = runner.append(tokens)
        return time.perf_counter() - began, logits
    steps = [np.ascontiguousarray(tokens[:, t : t + 1]) for t in range(tokens.shape[1])]
    runner.append(steps[0])  # wakes threads and brings weights near
    began = time.perf_counter()
    rows = [runner.append(step) for step in steps[1:]]
    seconds = time.perf_counter() - began
    return seconds, np.concatenate(rows, axis=1)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """A collection in the middle of a run would be charged to whoever runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

"""Alternation, comparison and absence, with backends that note what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from titans_runtime.backends import Array
from titans_runtime.bench import measure as measuring
from titans_runtime.bench.measure import Case, Contestant, cases, measure
from titans_runtime.bench.peers import Job
from titans_runtime.errors import EnvironmentProblem, UsageError

VOCAB = 7


class Clock:
    """Stands still but where a backend works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    is_model = True
    versions: Mapping[str, str] = {"fake": "1"}

    def __init__(self, name: str, seconds: float, clock: Clock, log: list[str], offset: float = 0.0) -> None:
        self.name, self.seconds, self.clock, self.log, self.offset = name, seconds, clock, log, offset
        self.closed = False

    def start(self, batch: int, edit: float) -> None:
        self.batch, self.seen = batch, np.zeros((batch, 1), np.int64)
        self.log.append(self.name)

    def append(self, ids: Array) -> Array:
        self.clock.now += self.seconds * ids.shape[1]
        sums = self.seen + ids.cumsum(axis=1)
        self.seen = sums[:, -1:]
        return np.cos(sums[..., None] * np.arange(1, VOCAB + 1)) + self.offset

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measuring.time, "perf_counter", clock)
    return clock


JOB = Job(Path("bundle"), None, 3, Path("work"))
CASES = cases([8], [4], [1, 2], [1.0])


def contestant(runner: FakeRunner) -> Contestant:
    return Contestant(runner.name, lambda job: runner, JOB)


def test_every_length_batch_and_strength_is_a_case() -> None:
    wanted = cases([16, 0], [0], [1, 2], [0.0, 1.0])
    assert wanted == [Case("prefill", 16, b, e) for b in (1, 2) for e in (0.0, 1.0)]


def test_contestants_alternate_and_ratios_are_taken_round_by_round(clock: Clock) -> None:
    log: list[str] = []
    ours, other = FakeRunner("ours", 1.0, clock, log), FakeRunner("other", 3.0, clock, log)
    result = measure([contestant(ours), contestant(other)], CASES, VOCAB, rounds=5)
    warm = [name for _ in (1, 2) for name in ["ours"] * 40 + ["other"] * 40]  # 160 tokens of each decode case
    assert log == ["ours", "other"] * len(CASES) + warm + ["ours", "other"] * len(CASES) * 5
    row = result.row("other", Case("decode", 4, 2))
    assert row.ratios == (3.0,) * 5
    assert row.seconds_per_token == 3.0 / 2  # tokens of both streams count
    assert row.threads == 3
    assert result.versions == {"fake": "1"}
    assert ours.closed
    assert other.closed


def test_what_computes_something_else_is_refused_and_never_timed(clock: Clock) -> None:
    log: list[str] = []
    wrong = FakeRunner("wrong", 0.1, clock, log, offset=0.01)
    result = measure([contestant(FakeRunner("ours", 1.0, clock, [])), contestant(wrong)], CASES, VOCAB)
    assert log == ["wrong"]
    assert [row.backend for row in result.rows] == ["ours"] * len(CASES)
    (absent,) = result.absent
    assert absent.refused
    assert "differ by 1.0e-02" in absent.reason
    assert wrong.closed


def test_nothing_is_compared_with_what_is_no_model(clock: Clock) -> None:
    machine = FakeRunner("machine", 0.5, clock, [], offset=9.0)
    machine.is_model = False
    result = measure([contestant(FakeRunner("ours", 1.0, clock, [])), contestant(machine)], CASES, VOCAB)
    assert result.row("machine", CASES[0]).error is None
    assert result.row("machine", CASES[0]).ratio == 0.5


def test_what_cannot_load_or_run_is_missing_with_its_reason(clock: Clock) -> None:
    class Breaks(FakeRunner):
        def append(self, ids: Array) -> Array:
            raise RuntimeError("no kernel\n  for this")

    def absent(job: Job) -> FakeRunner:
        raise EnvironmentProblem("openvino is not installed")

    ours = contestant(FakeRunner("ours", 1.0, clock, []))
    others = [Contestant("gone", absent, JOB), contestant(Breaks("breaks", 1.0, clock, []))]
    result = measure([ours, *others], CASES, VOCAB)
    reasons = {one.backend: (one.reason, one.refused) for one in result.absent}
    assert reasons == {
        "gone": ("openvino is not installed", False),
        "breaks": ("RuntimeError: no kernel for this", False),
    }


def test_without_the_reference_there_is_no_measurement(clock: Clock) -> None:
    def absent(job: Job) -> FakeRunner:
        raise EnvironmentProblem("onnxruntime is not installed")

    with pytest.raises(EnvironmentProblem):
        measure([Contestant("ours", absent, JOB), contestant(FakeRunner("o", 1.0, clock, []))], CASES, VOCAB)


def test_few_rounds_and_no_case_are_refused(clock: Clock) -> None:
    ours = contestant(FakeRunner("ours", 1.0, clock, []))
    with pytest.raises(UsageError, match="fewer than 5"):
        measure([ours], CASES, VOCAB, rounds=4)
    with pytest.raises(UsageError, match="nothing to time"):
        measure([ours], [], VOCAB)

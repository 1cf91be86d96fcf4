"""What has expired goes by itself: when sweeps come, what they survive, and that they end."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import titans_runtime as tr
from titans_runtime.serving.service import Service
from titans_runtime.serving.settings import Settings
from titans_runtime.serving.sweeper import MOST, Sweeper, interval_of
from titans_runtime.store.file import FileStore
from titans_runtime.store.protocol import Stopped

LONG = 60.0
"""Seconds after which a thread that does not answer never will."""


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self, waits: int) -> None:
        self.now, self.waited, self._left = 1000.0, list[float](), waits

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        """Let the time pass; whether this was the last one."""
        self.waited.append(seconds)
        self.now += seconds
        self._left -= 1
        return self._left == 0


class Sweeps(FileStore):
    """A store in files whose sweeps do something first."""

    before: Callable[[], object] = staticmethod(lambda: None)

    def sweep(self, stopped: Stopped = lambda: False) -> int:
        self.before()
        return super().sweep(stopped)


def test_what_has_expired_goes_with_the_next_sweep(tmp_path: Path) -> None:
    clock = Clock(waits=4)
    store = Sweeps(tmp_path, clock)
    seen: list[list[str]] = []
    store.before = lambda: seen.append(sorted(path.stem for path in tmp_path.glob("*.memory")))
    for name, life in (("a", 15.0), ("b", 25.0), ("c", None)):
        store.put(name, b"x", expected=None, expires=clock() + life if life else None)
    Sweeper(store, 10.0, clock.wait, clock).run()
    assert seen == [["a", "b", "c"]] * 3 + [["b", "c"]]
    assert [path.stem for path in tmp_path.glob("*.memory")] == ["c"]


def test_a_store_rests_longer_than_a_sweep_took(tmp_path: Path) -> None:
    clock = Clock(waits=2)
    store = Sweeps(tmp_path, clock)
    took = iter((0.5, 100.0))

    def pass_time() -> None:
        clock.now += next(took)

    store.before = pass_time
    Sweeper(store, 10.0, clock.wait, clock).run()
    assert clock.waited == [10.0, 900.0]


@pytest.mark.parametrize("error", [tr.EnvironmentProblem("away"), RuntimeError("a fault")])
def test_a_store_that_fails_is_swept_again(
    tmp_path: Path, error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(waits=2)
    store = Sweeps(tmp_path, clock)
    store.put("a", b"x", expected=None, expires=clock() - 1)
    raised = [error]

    def fail_once() -> None:
        if raised:
            raise raised.pop()

    store.before = fail_once
    Sweeper(store, 10.0, clock.wait, clock).run()
    assert not list(tmp_path.glob("*.memory"))
    assert ("a fault" in capfd.readouterr().err) is isinstance(error, RuntimeError)


def test_closing_ends_a_sweep_under_way(tmp_path: Path) -> None:
    store = Sweeps(tmp_path)
    under_way, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        under_way.set()
        go_on.wait(LONG)

    store.before = hold
    store.put("a", b"x", expected=None, expires=1.0)
    sweeper = Sweeper(store, 10.0).start()
    assert under_way.wait(LONG)
    closing = threading.Thread(target=sweeper.close)
    closing.start()
    assert sweeper._stop.wait(LONG)
    go_on.set()
    closing.join()
    assert not sweeper._thread.is_alive()
    assert list(tmp_path.glob("*.memory"))


@pytest.mark.parametrize(
    ("expire", "interval"), [(0.0, MOST), (0.5, 1.0), (60.0, 6.0), (86_400.0, 3600.0), (1e9, 3600.0)]
)
def test_an_interval_fits_the_expiry(expire: float, interval: float) -> None:
    assert interval_of(expire) == interval


def test_a_server_sweeps_its_store(
    settings: Settings, model: tr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titans_runtime.serving.service.load", lambda *_, **__: model)
    FileStore(Path(settings.store)).put("old/one", b"x", expected=None, expires=1.0)
    swept = threading.Event()
    sweep = FileStore.sweep

    def noted(self: FileStore, *given: Any) -> int:  # noqa: ANN401 - of `sweep`
        found = sweep(self, *given)
        swept.set()
        return found

    monkeypatch.setattr(FileStore, "sweep", noted)
    service = Service(dataclasses.replace(settings, expire=5.0))
    assert swept.wait(LONG)
    service.close()
    assert not list(Path(settings.store).rglob("*.memory"))
    assert not service._sweeper._thread.is_alive()

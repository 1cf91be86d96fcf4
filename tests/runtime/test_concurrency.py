"""Sessions beside each other, in threads and in turns, do what they would do alone, bit for bit."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.streams import Array, assert_same_snapshot

EDITORS = [
    None,
    tr.Editor(step=0.5, chunk=1),
    tr.Editor(step=0.5, chunk=4),
    tr.Editor(step=1.5, chunk=8, optimizer="adagrad"),
    tr.Editor("prediction", step=0.01, chunk=8, optimizer="adam", rollback=True),
    tr.Editor(step=0.5, chunk=4, also=tr.Editor("association", step=0.1, chunk=8, rollback=True)),
]
LESSON = tr.Editor(step=1.0, chunk=3)


class Tenant:
    """One user's session, and all that it does, drawn from a seed. What it sees is summed up in a hash."""

    def __init__(self, model: tr.Model, seed: int, folder: Path) -> None:
        self.choice = random.Random(seed)
        self.path = folder / f"{seed}-{id(self)}.memory"
        self.session = model.session(self.choice.choice([0.0, 0.5, 1.0]), self.choice.choice(EDITORS))
        self.session.append(b"tenant %d" % seed)
        self.seen = hashlib.sha256()

    def act(self) -> None:
        """One request."""
        text, draw = self.choice.randbytes(self.choice.randint(1, 40)), self.choice.random()
        if draw < 0.5:
            self._note(self.session.append(text))
        elif draw < 0.65:
            self._note(self.session.append(text[:1]))
        elif draw < 0.75:
            self.seen.update(bytes(self.session.generate(4, seed=self.choice.randrange(100), learn=True)))
        elif draw < 0.85:
            self.seen.update(np.float64(self.session.observe(text, LESSON).updates).tobytes())
        elif draw < 0.9:
            mark = self.session.snapshot()
            self.session.append(text)
            self.session.restore(mark)
        elif draw < 0.95:
            self.session = self.session.fork()
        else:
            self.session.save(self.path)
            self.session = self.session.model.load_session(self.path)

    def _note(self, logits: Array) -> None:
        self.seen.update(logits.tobytes())

    def end(self) -> tuple[str, tr.Snapshot]:
        """What it has seen, and where it stands."""
        return self.seen.hexdigest(), self.session.snapshot()


def _alone(model: tr.Model, seed: int, requests: int, folder: Path) -> tuple[str, tr.Snapshot]:
    tenant = Tenant(model, seed, folder)
    for _ in range(requests):
        tenant.act()
    return tenant.end()


def _assert_same(one: tuple[str, tr.Snapshot], other: tuple[str, tr.Snapshot]) -> None:
    assert one[0] == other[0]
    assert_same_snapshot(one[1], other[1])


@pytest.mark.parametrize(
    ("threads", "count", "requests"),
    [(1, 4, 12), (2, 2, 6), pytest.param(2, 16, 200, marks=pytest.mark.suite("soak"))],
)
def test_threads_do_bit_for_bit_what_one_does(
    tiny_bundle: Path, tmp_path: Path, threads: int, count: int, requests: int
) -> None:
    """`threads` within an operator; `count` sessions, each in a thread of its own."""
    model = tr.load(tiny_bundle, threads=threads)
    expected = [_alone(model, seed, requests, tmp_path) for seed in range(count)]
    begin = threading.Barrier(count)

    def tenant(seed: int) -> tuple[str, tr.Snapshot]:
        begin.wait()
        return _alone(model, seed, requests, tmp_path)

    with ThreadPoolExecutor(count) as pool:
        for one, other in zip(pool.map(tenant, range(count)), expected, strict=True):
            _assert_same(one, other)


@pytest.mark.parametrize("calls", [40, pytest.param(2000, marks=pytest.mark.suite("soak"))])
def test_two_threads_on_one_session_are_refused_and_never_mixed(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """What was not refused happened whole, one after the other: the same calls alone give the same state."""
    session, order = model.session(0.5, EDITORS[2]), []
    session.append(b"before")
    twin, run, refused = session.fork(), session._advance, []

    def noted(ids: Array, *arguments: object, **settings: object) -> Array:
        order.append(bytes(ids.astype(np.uint8)))  # within the lock
        return run(ids, *arguments, **settings)

    monkeypatch.setattr(session, "_advance", noted)

    def hammer(name: int) -> None:
        for call in range(calls):
            try:
                session.append(b"%d says %d." % (name, call))
            except tr.UsageError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=hammer, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) + len(refused) == 3 * calls
    assert all("in use by another thread" in message for message in refused)
    for text in order:
        twin.append(text)
    assert_same_snapshot(session.snapshot(), twin.snapshot())


def _interleaved(model: tr.Model, tenants: int, requests: int, folder: Path) -> Iterator[list[Tenant]]:
    """Requests of all tenants in random turns; yields after each round of as many as there are tenants."""
    choice = random.Random(0)
    everyone = [Tenant(model, seed, folder) for seed in range(tenants)]
    turns = [tenant for tenant in everyone for _ in range(requests)]
    choice.shuffle(turns)
    for number, tenant in enumerate(turns, 1):
        tenant.act()
        if number % tenants == 0:
            yield everyone


def test_tenants_in_turns_do_not_learn_from_each_other(model: tr.Model, tmp_path: Path) -> None:
    *_, everyone = _interleaved(model, 6, 8, tmp_path)
    for seed, tenant in enumerate(everyone):
        _assert_same(tenant.end(), _alone(model, seed, 8, tmp_path))


@pytest.mark.suite("soak")
def test_many_tenants_for_long(model: tr.Model, tmp_path: Path, record: Callable[[str], None]) -> None:
    """200 tenants, 150 requests each: no memory shows in another, and the process does not grow."""
    tenants, requests, sizes, everyone, before = 200, 150, [], [], _resident()
    for everyone in _interleaved(model, tenants, requests, tmp_path):  # noqa: B007 - used below
        gc.collect()
        sizes.append(_resident())
    settled, last = max(sizes[len(sizes) // 5 : len(sizes) // 3]), max(sizes[-10:])
    record(
        f"{tenants} tenants, {tenants * requests} requests: "
        f"{before} MB before, {settled} MB settled, {last} MB at the end"
    )
    assert last <= settled + 16
    for seed in range(0, tenants, 5):
        _assert_same(everyone[seed].end(), _alone(model, seed, requests, tmp_path))


@pytest.fixture
def record(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}")

    return show


def _resident() -> int:
    """Memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize() // 10**6


def test_no_thread_is_left(model: tr.Model) -> None:
    """A model that is dropped takes its threads with it."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("no list of threads here")
    before = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    other = tr.load(model.bundle.folder, threads=3)
    other.session().append(b"abc")
    del other
    gc.collect()
    assert len(os.listdir("/proc/self/task")) <= before  # noqa: PTH208

"""One thread at a time on a session, and sessions of one model in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.streams import (
    Array,
)
from titans_runtime.readout import ReadoutEditor


def _in_another_thread(call: Callable[[], object]) -> BaseException | None:
    """What ``call`` raised there."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_a_second_thread_is_refused_while_the_first_is_at_work(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session()
    session.append(b"before")
    twin = session.fork()
    refused = []
    learn = ReadoutEditor._learn

    def learn_with_company(self: ReadoutEditor, *args: object, **settings: object) -> None:
        calls = (
            lambda: session.append(b"x"),
            lambda: session.observe(b"x"),
            lambda: next(session.generate(1)),
            session.snapshot,
            lambda: session.restore(before),
            session.fork,
        )
        refused.extend(map(_in_another_thread, calls))
        learn(self, *args, **settings)

    before = session.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(ReadoutEditor, "_learn", learn_with_company)
        logits = session.append(b"abcd")
    assert len(refused) >= 6
    for error in refused:
        assert isinstance(error, tr.UsageError)
        assert "in use by another thread or a batch; give each stream a session of its own" in str(error)
    assert np.array_equal(logits, twin.append(b"abcd"))
    assert _in_another_thread(lambda: session.append(b"x")) is None, "one after the other is fine"


def test_sessions_of_one_model_work_in_threads_of_their_own(model: tr.Model) -> None:
    texts = [bytes([i]) * 40 for i in range(4)]
    sessions = [model.session() for _ in texts]
    results: dict[int, Array] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: sessions[i].append(texts[i])}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, text in enumerate(texts):
        assert np.array_equal(results[i], model.session().append(text))

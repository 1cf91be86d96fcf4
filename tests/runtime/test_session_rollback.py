"""A call that fails leaves the session as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.streams import (
    EDITORS,
    LONG,
    Array,
    assert_same_snapshot,
    continuation,
)
from titans_runtime.editor import Editor
from titans_runtime.forward import SEGMENT
from titans_runtime.readout import ReadoutEditor


def _interrupted(call: int) -> Callable[..., None]:
    """A `ReadoutEditor._learn` that Ctrl-C stops after the update of its ``call``-th call."""
    learn, calls = ReadoutEditor._learn, itertools.count(1)

    def interrupted(self: ReadoutEditor, *args: object, **settings: object) -> None:
        learn(self, *args, **settings)
        if next(calls) == call:
            raise KeyboardInterrupt

    return interrupted


@pytest.mark.parametrize("length", [6, 60, len(LONG)])
@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_within_an_edit_is_undone(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch, length: int, call: int
) -> None:
    session = model.session(0.5, Editor(step=0.5, chunk=2))
    session.append(b"before")
    before, twin = session.snapshot(), session.fork()
    with monkeypatch.context() as patch:
        patch.setattr(ReadoutEditor, "_learn", _interrupted(call))
        with pytest.raises(KeyboardInterrupt):
            session.append(LONG[:length])
    assert_same_snapshot(session.snapshot(), before)
    assert continuation(session) == continuation(twin)


@pytest.mark.parametrize("own", [None, Editor(step=0.5, chunk=16), Editor(step=0.5, chunk=2)])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_ctrl_c_within_another_editors_lesson_is_undone(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch, own: Editor | None, call: int
) -> None:
    session = model.session(0.5, own)
    session.append(b"before")
    before, twin = session.snapshot(), session.fork()
    with monkeypatch.context() as patch:
        patch.setattr(ReadoutEditor, "_learn", _interrupted(call))
        with pytest.raises(KeyboardInterrupt):
            session.observe(b"lesson", Editor(step=1.0, chunk=1))
    assert session.editor == own
    assert_same_snapshot(session.snapshot(), before)
    assert continuation(session) == continuation(twin)


@pytest.mark.parametrize("length", [1, 3, 60, len(LONG)])
def test_a_gradient_that_is_not_finite_is_undone(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    session = model.session(0.5, Editor(step=0.5, chunk=2))
    session.append(b"before")
    before = session.snapshot()
    call = session._editing.readout._call

    class Broken:
        def run(self) -> None:
            call.run()
            session._editing.readout._gradient[0, 3, 5] = np.nan

    with monkeypatch.context() as patch:
        patch.setattr(session._editing.readout, "_call", Broken())
        with pytest.raises(tr.NumericsError, match="gradient is not finite; the session is as it was"):
            session.append(LONG[:length])
    assert_same_snapshot(session.snapshot(), before)
    session.append(LONG[:length])


@pytest.mark.parametrize("length", [1, 2, 60, len(LONG)])
@pytest.mark.parametrize("editor", EDITORS)
def test_logits_that_are_not_finite_are_undone(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch, length: int, editor: Editor | None
) -> None:
    """In the cheapest case, too, where nothing was copied before the call."""
    session = model.session(0.5, editor)
    session.append(b"befor")
    before, twin = session.snapshot(), session.fork()
    run = session._run_segment

    def broken(ids: Array, logits: Array, teach: bool, report: tr.EditReport) -> None:
        run(ids, logits, teach, report)
        logits[-1, 0] = np.inf

    with monkeypatch.context() as patch:
        patch.setattr(session, "_run_segment", broken)
        with pytest.raises(tr.NumericsError, match="not finite; the session is as it was before the call"):
            session.append(LONG[:length])
    assert_same_snapshot(session.snapshot(), before)
    assert continuation(session) == continuation(twin)


def test_a_memory_that_is_not_finite_is_found_and_named_by_token(model: tr.Model) -> None:
    session = model.session(0.5, None)
    session.append(b"abc")
    session._buffers.past["layers.0.memory"][...] = np.nan
    before = session.snapshot()
    named = (
        r"logits after token 3 are not finite, and the state layers\.0\.memory is not finite; "
        "the session is as it was"
    )
    with pytest.raises(tr.NumericsError, match=named):
        session.append(b"defg")
    assert_same_snapshot(session.snapshot(), before)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (np.nan, "not finite"),
        (np.inf, "not finite"),
        (-np.inf, "not finite"),
        (-2e19, "too large for float32"),
    ],
)
@pytest.mark.parametrize("text", [b"d", b"defg", LONG[:SEGMENT]])
def test_a_memory_is_looked_at_where_the_logits_are_still_sound(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch, value: float, fault: str, text: bytes
) -> None:
    """Else the call would succeed, and the session be lost with the next one."""
    session = model.session(0.5, None)
    session.append(b"abc")
    before, twin = session.snapshot(), session.fork()
    run = session._run_segment

    def broken(*arguments: object) -> None:
        run(*arguments)
        session._buffers.past["layers.1.momentum"].reshape(-1)[-1] = value

    last = 2 + len(text)
    with monkeypatch.context() as patch:
        patch.setattr(session, "_run_segment", broken)
        with pytest.raises(tr.NumericsError, match=rf"layers\.1\.momentum is {fault} after token {last};"):
            session.append(text)
    assert_same_snapshot(session.snapshot(), before)
    assert continuation(session) == continuation(twin)


def test_a_large_memory_is_let_pass_as_long_as_float32_holds_its_squares(model: tr.Model) -> None:
    buffers = model.session(0.5, None)._buffers
    memory = buffers.past["layers.0.memory"]
    memory[...] = 1e19 / np.sqrt(memory.size)
    assert buffers.fault() == ""
    memory *= 2
    assert buffers.fault() == "layers.0.memory is too large for float32"


def test_ctrl_c_within_a_restore_is_undone(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.session(0.5, Editor(step=0.5, chunk=4))
    session.append(b"here")
    other = session.fork()
    other.append(b" and there")
    before, twin = session.snapshot(), session.fork()

    def interrupted(self: ReadoutEditor, arrays: dict[str, Array]) -> None:
        restore(self, arrays)
        monkeypatch.undo()
        raise KeyboardInterrupt

    restore = ReadoutEditor.restore
    monkeypatch.setattr(ReadoutEditor, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.restore(other.snapshot())
    assert_same_snapshot(session.snapshot(), before)
    assert continuation(session) == continuation(twin)


def test_a_sample_that_fails_is_undone(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.session(0.5, Editor(step=0.5, chunk=1))
    session.append(b"before")
    tokens = session.generate(5, seed=0, learn=True)
    next(tokens)
    before = session.snapshot()
    monkeypatch.setattr(ReadoutEditor, "_learn", _interrupted(1))
    with pytest.raises(KeyboardInterrupt):
        next(tokens)
    assert_same_snapshot(session.snapshot(), before)


@pytest.mark.parametrize("thing", [None, "a path", b"bytes"])
def test_what_is_no_snapshot_is_refused(model: tr.Model, thing: object) -> None:
    session = model.session()
    with pytest.raises(tr.UsageError, match="is no snapshot; give what"):
        session.restore(thing)  # type: ignore[arg-type]

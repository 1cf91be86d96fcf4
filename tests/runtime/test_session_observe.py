"""Lessons: what `observe` teaches and reports, and how one editor hands over to another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import titans_runtime as tr
from tests.runtime.streams import (
    EDITORS,
    LONG,
    assert_same_snapshot,
    continuation,
    cuts,
    streams,
)
from titans_runtime.editor import Editor


def test_observing_reports_what_was_learnt(model: tr.Model) -> None:
    session = model.session(0.5, Editor(step=0.5, chunk=4))
    report = session.observe(b"a lesson of some length")
    assert report.tokens == 23
    assert report.updates == 5 == len(report.gradient_norm)
    assert len(report.surprise) == 20
    assert math.isfinite(report.loss)
    assert report.loss == pytest.approx(np.mean(report.surprise))
    assert min(report.gradient_norm) > 0
    assert report is session.last_edit


def test_the_reported_surprise_is_the_loss_of_the_returned_logits(model: tr.Model) -> None:
    text = b"a lesson of some length"
    session = model.session(0.5, Editor(step=0.5, chunk=4))
    logits = session.append(text).astype(np.float64)
    losses = np.log(np.exp(logits).sum(1))[:-1] - logits[np.arange(22), list(text[1:])]
    np.testing.assert_allclose(session.last_edit.surprise, losses[:20], rtol=1e-4)


def test_observing_is_appending(model: tr.Model) -> None:
    one, other = model.session(), model.session()
    one.append(b"the same thing")
    other.observe(b"the same thing")
    assert_same_snapshot(one.snapshot(), other.snapshot())


def test_a_repeated_lesson_surprises_less(model: tr.Model) -> None:
    session = model.session(0.5, None)
    losses = [session.observe(b"a lesson of some length", Editor(step=0.5, chunk=4)).loss for _ in range(4)]
    assert losses[-1] < losses[0]


def test_observing_needs_an_editor(model: tr.Model) -> None:
    session = model.session(editor=None)
    with pytest.raises(tr.UsageError, match="no editor; give one"):
        session.observe(b"abc")
    assert session.position == 0


@pytest.mark.parametrize("own", EDITORS)
@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_another_editor_teaches_for_one_call(model: tr.Model, own: Editor | None, length: int) -> None:
    session = model.session(0.5, own)
    session.append(b"abcdef")
    before = session.snapshot().arrays["state.readout"]
    report = session.observe(LONG[:length], Editor(step=1.0, chunk=3))
    assert session.editor == own
    assert report.tokens == length
    learns = length > 1 or own is not None  # the position before the lesson is known to an own editor only
    assert (report.updates > 0) == learns
    assert math.isfinite(report.loss) == learns
    assert np.array_equal(session.snapshot().arrays["state.readout"], before) != learns
    twin = session.fork()
    assert continuation(twin) == continuation(session)


def test_a_lesson_shorter_than_its_period_is_learnt_all_the_same(model: tr.Model) -> None:
    report = model.session(0.5, None).observe(b"abc", Editor(chunk=16))
    assert report.updates == 1
    assert len(report.surprise) == 2


@given(data=st.data(), text=streams)
def test_a_hand_over_loses_and_repeats_nothing(model: tr.Model, data: st.DataObject, text: bytes) -> None:
    """With a period of one token nothing ends early, so a hand-over there and back changes nothing."""
    other = Editor(step=math.nextafter(0.5, 1), chunk=1)  # another editor, with the same float32 step
    places = data.draw(cuts(len(text)))
    expected = model.session(0.5, Editor(step=0.5, chunk=1))
    session = model.session(0.5, Editor(step=0.5, chunk=1))
    for i, (start, end) in enumerate(zip([0, *places], [*places, len(text)], strict=True)):
        expected.append(text[start:end])
        if i % 2:
            session.observe(text[start:end], other)
        else:
            session.append(text[start:end])
    assert_same_snapshot(session.snapshot(), expected.snapshot())


@pytest.fixture(autouse=True)
def _no_session_is_left_locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every session that a test made can be used when it is done."""
    made: list[tr.Session] = []
    create = tr.Session.__init__

    def remember(self: tr.Session, *args: object) -> None:
        create(self, *args)
        made.append(self)

    monkeypatch.setattr(tr.Session, "__init__", remember)
    yield
    assert not any(session._exclusive.is_held for session in made)


def test_lessons_of_one_token_teach_what_one_lesson_does(model: tr.Model) -> None:
    """A session without an editor of its own still knows which token followed which."""
    text, editor = b"hello world, hello", tr.Editor(chunk=1)
    whole, cut = model.session(0.0, None), model.session(0.0, None)
    report = whole.observe(text, editor)
    updates = sum(cut.observe([token], editor).updates for token in text)
    assert updates == report.updates == len(text) - 1
    np.testing.assert_allclose(
        cut.snapshot().arrays["state.readout"], whole.snapshot().arrays["state.readout"], atol=1e-4
    )


def test_what_a_session_follows_cannot_be_set(model: tr.Model) -> None:
    session = model.session()
    with pytest.raises(AttributeError):
        session.edit = (1.0, 1.0)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        session.editor = None  # type: ignore[misc]


@pytest.mark.parametrize("own", [None, Editor("prediction", step=0.05, chunk=3)])
def test_the_position_between_two_lessons_goes_with_the_session(
    model: tr.Model, tmp_path: Path, own: Editor | None
) -> None:
    """The last position of a lesson is learnt with the next one's first token, in every copy as well."""
    session, lesson = model.session(0.5, own), Editor(step=0.5, chunk=4)
    session.observe(b"a lesson", lesson)
    session.save(tmp_path / "memory")
    mark, copies = session.snapshot(), [session.fork(), model.load_session(tmp_path / "memory")]
    copies.append(model.session(0.5, own))
    copies[-1].restore(mark)
    report = session.observe(b", and the next", lesson)
    assert report.surprise[0] > 0
    assert len(report.surprise) == 14, "one position of the lesson before, and all but the last of this one"
    for copy in copies:
        assert copy.observe(b", and the next", lesson).surprise == report.surprise
        assert_same_snapshot(copy.snapshot(), session.snapshot())
    session.append(b"it stands elsewhere now")
    assert not [name for name in session.snapshot().arrays if name.startswith("pending.")]


def test_a_lesson_that_is_undone_leaves_the_position_before_it_to_the_next(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, lesson = model.session(0.5, None), Editor(step=0.5, chunk=4)
    session.observe(b"a lesson", lesson)
    before = session.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(session, "_conclude", _interrupted)  # when all of it was learnt
        with pytest.raises(KeyboardInterrupt):
            session.observe(b", and one more", lesson)
    assert_same_snapshot(session.snapshot(), before)
    assert len(session.observe(b", and the next", lesson).surprise) == 14


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_a_restored_stream_did_not_leave_is_not_learnt(model: tr.Model) -> None:
    """Two streams of one length: one ends with a lesson, the other's last position is nobody's."""
    taught, plain, lesson = model.session(0.5, None), model.session(0.5, None), Editor(step=0.5, chunk=4)
    taught.observe(b"a lesson", lesson)
    plain.append(b"no other")
    taught.restore(plain.snapshot())
    assert len(taught.observe(b", and the next", lesson).surprise) == 13
    plain.observe(b", and the next", lesson)
    assert_same_snapshot(taught.snapshot(), plain.snapshot())


def test_a_watch_that_cannot_be_told_is_refused(model: tr.Model) -> None:
    session = model.session(0.5, Editor(step=0.5))
    for call in (session.observe, session.prepare):
        with pytest.raises(tr.UsageError, match="watch is 5"):
            call(b"abc", watch=5)  # type: ignore[operator]
    assert session.position == 0

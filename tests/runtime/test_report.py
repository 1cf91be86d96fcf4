"""Logs of what editing did: written, read back, drawn, and silent about what was undone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import titans_runtime as tr
from titans_runtime.editor import Editor
from titans_runtime.readout import ReadoutEditor
from titans_runtime.report import Lesson

TEXT = b"What was learnt is told, line by line."
EDITOR = Editor(step=0.5, chunk=4)


def _logged(model: tr.Model) -> tr.Session:
    session = model.session(0.5, EDITOR)
    session.log = tr.EditLog()
    return session


def test_a_log_tells_every_lesson_of_every_call(model: tr.Model) -> None:
    session = _logged(model)
    session.append(TEXT)
    session.append(TEXT)
    assert session.log is not None
    lessons = list(session.log)
    assert [lesson.position for lesson in lessons] == list(range(0, 2 * len(TEXT) - 4, 4))
    assert all(lesson.objective == "readout" and lesson.steps == 1 for lesson in lessons)


def test_a_log_is_read_back_as_it_was_written(model: tr.Model, tmp_path: Path) -> None:
    session = _logged(model)
    session.append(TEXT)
    assert session.log is not None
    session.log.add(tr.EditReport(lessons=[Lesson("readout", 99, 4, norms={"readout": math.nan})]))
    session.log.save(tmp_path / "log.jsonl")
    for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = tr.EditLog.load(tmp_path / "log.jsonl")
    np.testing.assert_equal([vars(one) for one in again], [vars(one) for one in session.log])


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"objective": "readout", "speed": 1}'])
def test_a_line_that_is_no_lesson_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tr.EditLog().save(path)
    assert len(tr.EditLog.load(path)) == 0
    path.write_text('{"objective": "readout", "position": 0, "tokens": 4}\n' + line, encoding="utf-8")
    with pytest.raises(tr.DataError, match=r"log.jsonl: line 2 is no lesson of an edit log"):
        tr.EditLog.load(path)


def test_a_log_is_drawn(model: tr.Model, tmp_path: Path) -> None:
    session = _logged(model)
    session.append(TEXT)
    assert session.log is not None
    session.log.plot(tmp_path / "log.svg")
    drawn = (tmp_path / "log.svg").read_text(encoding="utf-8")
    assert drawn.count("<path") > 20
    with pytest.raises(tr.UsageError, match="edit log: is empty"):
        tr.EditLog().plot(tmp_path / "none.svg")


def test_the_time_spent_is_a_running_total() -> None:
    """It is asked for at every lesson: summing all of them again would take the square of their number."""

    class Watched(list[Lesson]):
        def __iter__(self) -> Iterator[Lesson]:
            raise AssertionError("lessons are gone through again")

    report = tr.EditReport(lessons=[Lesson("readout", 0, 4, seconds=0.25)])
    report.lessons = Watched(report.lessons)
    for number in range(3):
        report.add(Lesson("readout", number, 4, seconds=0.5))
        assert report.seconds == 0.25 + 0.5 * (number + 1)
    assert len(report.lessons) == 4


def _failing_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    learn, calls = ReadoutEditor._learn, iter(range(10_000))

    def failing(self: ReadoutEditor, *arguments: object, **settings: object) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt
        learn(self, *arguments, **settings)

    monkeypatch.setattr(ReadoutEditor, "_learn", failing)


def test_passes_that_were_undone_are_not_told(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = _logged(model)
    session.append(TEXT)
    assert session.log is not None
    told, last = len(session.log), session.last_edit
    _failing_at(len(TEXT) // 4 + 3, monkeypatch)  # in the second pass
    with pytest.raises(KeyboardInterrupt):
        session.prepare(TEXT, passes=3)
    assert (len(session.log), session.last_edit) == (told, last)


def test_a_batch_that_was_undone_is_not_told(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first session has finished, and told, when the second turns out not to be finite."""
    sessions = [_logged(model), _logged(model)]
    conclude = tr.Session._conclude

    def failing(self: tr.Session, *arguments: object) -> None:
        if self is sessions[1]:
            raise tr.NumericsError("not finite")
        conclude(self, *arguments)

    monkeypatch.setattr(tr.Session, "_conclude", failing)
    with model.batch(sessions) as batch, pytest.raises(tr.NumericsError):
        batch.append([TEXT, TEXT])
    assert [(len(one.log or ()), one.last_edit) for one in sessions] == [(0, None), (0, None)]


@pytest.mark.parametrize("own", [None, "readout:chunk=8", "prediction:step=0.01,chunk=8"])
@pytest.mark.parametrize("other", ["readout:chunk=5", "prediction:step=0.01,chunk=5+readout:chunk=8"])
def test_a_log_tells_what_another_editor_has_learnt(model: tr.Model, own: str | None, other: str) -> None:
    """To its last lesson, which ends where the session's own editor takes over."""
    session = model.session(0.5, tr.Editor.parse(own) if own else None)
    session.log = tr.EditLog()
    report = session.observe(TEXT[:20], tr.Editor.parse(other))
    assert list(session.log) == report.lessons
    assert session.last_edit is report


def test_a_call_that_was_undone_leaves_the_lessons_of_others_in_a_shared_log(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, log = [model.session(0.5, EDITOR) for _ in range(3)], tr.EditLog()
    for session in sessions:
        session.log = log
    sessions[0].append(TEXT)
    kept = list(log)
    conclude = tr.Session._conclude

    def failing(self: tr.Session, *arguments: object) -> None:
        if self is sessions[2]:
            raise tr.NumericsError("not finite")
        conclude(self, *arguments)
        log.add(tr.EditReport(lessons=[Lesson("readout", 0, 4)]))  # of somebody else, meanwhile

    monkeypatch.setattr(tr.Session, "_conclude", failing)
    with model.batch(sessions[1:]) as batch, pytest.raises(tr.NumericsError):
        batch.append([TEXT, TEXT])
    assert list(log) == [*kept, Lesson("readout", 0, 4)]


def test_a_session_takes_no_other_log(model: tr.Model) -> None:
    session = _logged(model)
    with pytest.raises(tr.UsageError, match=r"give an EditLog"):
        session.log = []  # type: ignore[assignment]

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


def test_a_picture_is_written_as_a_log_is(
    model: tr.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, where it was asked for, or not at all and in one line."""
    session = _logged(model)
    session.append(TEXT)
    log = session.log
    assert log is not None
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    for name in ("picture.foo", "picture", "folder"):
        with pytest.raises(tr.UsageError, match=f"{name}: is no name of a picture; let it end in .png"):
            log.plot(tmp_path / name)
    for name in ("none/picture.png", "folder.png"):
        with pytest.raises(tr.EnvironmentProblem, match=rf"{name}: cannot be written \(.*\)$"):
            log.plot(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "folder.png"]
    log.plot(tmp_path / "picture.PNG")
    before = (tmp_path / "picture.PNG").read_bytes()
    assert before.startswith(b"\x89PNG")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("titans_runtime.files.os.fsync", full)
    with pytest.raises(tr.EnvironmentProblem, match="No space left"):
        log.plot(tmp_path / "picture.PNG")
    assert (tmp_path / "picture.PNG").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def _taught(objective: str, learnt: int, loss: float) -> Lesson:
    return Lesson(objective, 0, learnt, learnt, loss)


def test_losses_of_two_objectives_are_never_mixed() -> None:
    """Nats of the readout's editor beside squared errors: the mean of each, and that of the call's editor."""
    lessons = [_taught("readout", 4, 5.0), _taught("association", 8, 900.0)]
    report = tr.EditReport(lessons=list(lessons), objective="readout")
    report.add(_taught("readout", 2, 2.0))
    report.add(_taught("readout", 0, math.nan))
    assert report.losses == {"readout": 4.0, "association": 900.0}
    assert report.loss == 4.0
    assert tr.EditReport(lessons=lessons, objective="association").loss == 900.0
    assert tr.EditReport(objective="readout").losses == {}
    assert math.isnan(tr.EditReport(objective="readout").loss)


def test_the_loss_of_a_call_is_that_of_its_editor(model: tr.Model) -> None:
    """However short the call is, and whatever another editor learnt before it handed over."""
    session = model.session(0.0, EDITOR)
    session.append(TEXT[:3])
    report = session.observe(TEXT[3:7], Editor("prediction", chunk=4))
    assert set(report.losses) == {"readout", "prediction"}
    assert report.loss == report.losses["prediction"]


def test_two_editors_report_the_loss_of_each(model: tr.Model) -> None:
    both = "readout:step=0.5,chunk=8+association:chunk=4"
    report = model.session(edit=0.0, editor=None).observe(TEXT, Editor.parse(both))
    alone = model.session(edit=0.0, editor=None).observe(TEXT, Editor("association", chunk=4))
    assert set(report.losses) == {"readout", "association"}
    assert report.loss == report.losses["readout"] == pytest.approx(np.mean(report.surprise))
    assert report.losses["association"] == pytest.approx(alone.loss, rel=1e-3)


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

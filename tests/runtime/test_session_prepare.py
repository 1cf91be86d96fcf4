"""Several passes over a context: what each begins with and learns, and that they are one call."""

from __future__ import annotations

import itertools
import threading

import pytest

import titans_runtime as tr
from tests.runtime.streams import CODE, LONG, assert_same_snapshot
from titans_runtime import memories, readout
from titans_runtime.editor import Editor
from titans_runtime.forward import SEGMENT

EDITORS = [
    "prediction:step=0.02,chunk=16",
    "prediction:optimizer=adam,step=0.01,chunk=16",
    "readout:step=0.5,chunk=4",
    "readout:step=0.5,chunk=4,optimizer=adagrad+prediction:step=0.02,chunk=16",
]


def _session(model: tr.Model, editor: str | None) -> tr.Session:
    session = model.session(0.0, tr.Editor.parse(editor) if editor else None)
    session.log = tr.EditLog()
    return session


@pytest.mark.parametrize("editor", EDITORS)
def test_every_pass_begins_with_what_the_last_one_learnt(model: tr.Model, editor: str) -> None:
    session = _session(model, editor)
    session.append(b"so: ")
    reports = session.prepare(CODE, passes=3)
    losses = [report.loss for report in reports]
    assert losses[0] > losses[1] > losses[2]
    assert session.position == 4 + len(CODE)
    with pytest.raises(tr.UsageError, match="passes is 0"):
        session.prepare(CODE, passes=0)


@pytest.mark.parametrize("editor", ["prediction:step=0.02,chunk=128", "readout:chunk=128", EDITORS[3]])
@pytest.mark.parametrize("is_own", [True, False])
def test_every_pass_learns_the_whole_context(model: tr.Model, editor: str, is_own: bool) -> None:
    """Also one that is shorter than a period."""
    session = _session(model, editor if is_own else None)
    reports = session.prepare(CODE, 3, None if is_own else tr.Editor.parse(editor))
    for report in reports:
        for objective in {lesson.objective for lesson in report.lessons}:
            learnt = [lesson.learnt for lesson in report.lessons if lesson.objective == objective]
            assert sum(learnt) == len(CODE) - 1
    assert session.log is not None
    assert list(session.log) == [lesson for report in reports for lesson in report.lessons]
    assert session.last_edit is reports[-1]


@pytest.mark.parametrize("editor", EDITORS)
def test_an_editor_for_these_passes_learns_what_the_session_s_own_would(model: tr.Model, editor: str) -> None:
    """The optimizer's sums go from pass to pass, too."""
    own, other = _session(model, editor), _session(model, None)
    losses = [report.loss for report in own.prepare(CODE, 3)]
    assert [report.loss for report in other.prepare(CODE, 3, tr.Editor.parse(editor))] == losses
    assert other.editor is None


def test_the_position_after_a_context_is_learnt_with_the_token_that_follows(model: tr.Model) -> None:
    session = _session(model, "readout:step=0.5,chunk=4")
    session.prepare(b"abcdef", passes=2)
    session.append(b"gh?")
    assert session.last_edit is not None
    assert [lesson.position for lesson in session.last_edit.lessons] == [5]
    assert session.last_edit.lessons[0].learnt == 3


def test_a_preparation_that_fails_is_undone(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = _session(model, EDITORS[3])
    session.append(b"so: ")
    mark, calls = session.snapshot(), itertools.count()
    run = tr.Session._run_segments

    def interrupted(self: tr.Session, *given: object) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        run(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(tr.Session, "_run_segments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.prepare(CODE, passes=3)
    assert_same_snapshot(session.snapshot(), mark)
    assert session.log is not None
    assert not len(session.log)


def test_no_other_thread_comes_between_two_passes(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session, refused = _session(model, EDITORS[2]), []
    restore = tr.Session._restore

    def append() -> None:
        with pytest.raises(tr.UsageError, match="in use by another thread"):
            session.append(b"between")
        refused.append(True)

    def meanwhile(self: tr.Session, snapshot: tr.Snapshot) -> None:
        restore(self, snapshot)
        thread = threading.Thread(target=append)
        thread.start()
        thread.join()

    monkeypatch.setattr(tr.Session, "_restore", meanwhile)
    session.prepare(CODE, passes=3)
    assert len(refused) == 2
    assert session.position == len(CODE)


@pytest.mark.parametrize("editor", ["prediction:step=0.01,chunk=8,budget=22", "readout:chunk=8,budget=22"])
def test_a_budget_is_of_all_passes(model: tr.Model, editor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of 5 ms a look: of the first pass alone some periods are learnt from."""
    session, looks = _session(model, editor), itertools.count()
    for module in (memories, readout):
        monkeypatch.setattr(module.time, "perf_counter", lambda: 0.005 * next(looks))
    reports = session.prepare(CODE, passes=3)
    updates = [report.updates for report in reports]
    assert 0 < updates[0] < len(reports[0].lessons)
    assert updates[1:] == [0, 0]


def test_each_of_two_editors_has_a_budget_of_its_own(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count()
    session = _session(model, "readout:chunk=8,budget=1000+prediction:step=0.01,chunk=8,budget=12")
    monkeypatch.setattr(memories.time, "perf_counter", lambda: 0.005 * next(looks))
    report = session.observe(CODE)
    refused = {lesson.objective for lesson in report.lessons if lesson.refused}
    assert refused == {"prediction"}


def test_a_preparation_tells_how_far_it_has_come(model: tr.Model) -> None:
    for editor, largest in ((Editor(step=0.5), SEGMENT), (Editor("prediction", chunk=512), 512)):
        seen: list[int] = []
        model.session(0.0, editor).prepare(LONG, passes=2, watch=seen.append)
        assert sum(seen) == 2 * len(LONG)
        assert len(seen) >= 4
        assert max(seen) == largest

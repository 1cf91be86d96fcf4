"""How far the readout editor goes: steps, clip, threshold, budget and rollback, against the formula."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import titans_runtime as tr
from tests.runtime.streams import Array, assert_same_snapshot, check_rollback, relative_error, streams
from tests.runtime.test_readout import _forward
from titans_runtime.editor import READOUT_OPTIMIZERS, Editor

TEXT = b"the same words, the same words, the same"


@dataclass
class Oracle:
    """The editor in a few lines of float64."""

    editor: Editor
    logits: Array
    keys: Array
    text: bytes

    def run(self) -> tuple[Array, list[float]]:
        """The memory after the text, and each period's loss after its last step."""
        R = np.zeros((self.keys.shape[1], self.logits.shape[1]))
        energy, after = np.zeros(len(R)), []
        for start in range(0, len(self.text) - 1, self.editor.chunk):
            stop = start + self.editor.chunk
            if stop > len(self.text) - 1:  # its last target is not known
                break
            for _ in range(self.editor.steps):
                gradient, _ = self._gradient(R, start, stop)
                norm = np.sqrt((gradient**2).sum())
                if 0 < self.editor.clip < norm:
                    gradient *= self.editor.clip / norm
                if self.editor.optimizer == "adagrad":
                    energy += (gradient**2).sum(axis=1)
                    gradient /= np.sqrt(1 + energy)[:, None]
                R = R - self.editor.step * gradient
            after.append(self._gradient(R, start, stop)[1])
        return R, after

    def _gradient(self, R: Array, start: int, stop: int) -> tuple[Array, float]:
        logits = self.logits[start:stop] + self.keys[start:stop] @ R
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        targets = list(self.text[start + 1 : stop + 1])
        loss = -np.log(p[np.arange(len(targets)), targets]).mean()
        p[np.arange(len(targets)), targets] -= 1
        return self.keys[start:stop].T @ p, float(loss)


def _memory(session: tr.Session) -> Array:
    memory: Array = session.snapshot().arrays["state.readout"][0]
    return memory


@pytest.mark.parametrize("optimizer", READOUT_OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.0, 0.3])
@given(text=streams, steps=st.integers(1, 3), chunk=st.sampled_from([1, 3, 8]))
def test_steps_and_clip_equal_the_formula(
    model: tr.Model, text: bytes, steps: int, chunk: int, clip: float, optimizer: str
) -> None:
    editor = Editor(step=0.4, chunk=chunk, optimizer=optimizer, steps=steps, clip=clip)
    expected, after = Oracle(editor, *_forward(model, text, []), text).run()
    session = model.session(0.0, editor)
    session.append(text)
    np.testing.assert_allclose(_memory(session), expected, atol=1e-4)
    lessons = [] if session.last_edit is None else session.last_edit.lessons
    assert [lesson.steps for lesson in lessons] == [steps] * len(after)


def test_the_loss_after_the_last_step_is_reported_where_it_is_measured(model: tr.Model) -> None:
    """With rollback; otherwise after the last step but one, since one more evaluation is not spent on it."""
    for steps, rollback in ((2, True), (3, False)):
        editor = Editor(step=0.4, chunk=8, steps=steps, rollback=rollback)
        counted = editor if rollback else Editor(step=0.4, chunk=8, steps=steps - 1)
        session = model.session(0.0, editor)
        session.append(TEXT[:9])
        assert session.last_edit is not None
        (_, (first, *_)) = Oracle(counted, *_forward(model, TEXT[:9], []), TEXT[:9]).run()
        assert session.last_edit.lessons[0].loss_after == pytest.approx(first, rel=1e-4)


def test_a_stream_is_scored_before_it_is_learnt_however_many_steps(model: tr.Model) -> None:
    """A second evaluation must not leak into the logits: at once equals token by token."""
    editor = Editor(step=0.4, chunk=4, steps=3, optimizer="adagrad", retention=0.9)
    at_once, single = model.session(0.0, editor), model.session(0.0, editor)
    logits = at_once.append(TEXT)
    assert relative_error(logits, np.concatenate([single.append([token]) for token in TEXT])) <= 1e-4
    np.testing.assert_allclose(_memory(at_once), _memory(single), atol=1e-4)


def test_what_surprises_too_little_is_not_learnt(model: tr.Model) -> None:
    session = model.session(0.0, Editor(chunk=4, threshold=100.0))
    session.append(TEXT)
    assert session.last_edit is not None
    assert {lesson.refused for lesson in session.last_edit.lessons} == {"not surprising enough"}
    assert not _memory(session).any()


def test_a_spent_budget_ends_the_learning_of_a_call(model: tr.Model) -> None:
    """The first chunk is learnt from: before it no time has been spent."""
    session = model.session(0.0, Editor(chunk=4, budget=1e-9))
    session.append(TEXT)
    assert session.last_edit is not None
    first, *others = session.last_edit.lessons
    assert (first.steps, first.refused) == (1, "")
    assert {lesson.refused for lesson in others} == {"time budget spent"}


def test_a_budget_ends_the_steps_of_a_period(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of 5 ms a look: of a thousand steps, those of 18 ms are taken and kept."""
    ticks = itertools.count()
    monkeypatch.setattr("titans_runtime.readout.time.perf_counter", lambda: 0.005 * next(ticks))
    session = model.session(0.0, Editor(chunk=8, step=0.1, steps=1000, budget=18))
    session.append(TEXT[:9])
    assert session.last_edit is not None
    (lesson,) = session.last_edit.lessons
    assert (lesson.steps, lesson.refused) == (4, "time budget spent")
    monkeypatch.undo()
    twin = model.session(0.0, Editor(chunk=8, step=0.1, steps=4))
    twin.append(TEXT[:9])
    assert np.array_equal(_memory(session), _memory(twin))


@given(text=streams, retention=st.sampled_from([None, 0.5]))
def test_with_rollback_no_kept_step_leaves_its_chunk_worse(
    model: tr.Model, text: bytes, retention: float | None
) -> None:
    session = model.session(0.0, Editor(chunk=3, step=30.0, steps=2, rollback=True, retention=retention))
    session.append(text)
    for lesson in [] if session.last_edit is None else session.last_edit.lessons:
        if lesson.steps == 2:
            assert lesson.loss_after <= lesson.loss


@pytest.mark.parametrize("optimizer", READOUT_OPTIMIZERS)
def test_the_step_that_raised_the_loss_is_taken_back_the_others_are_kept(
    model: tr.Model, optimizer: str
) -> None:
    editor = Editor(chunk=16, steps=5, optimizer=optimizer)
    text = b"aaaaaaab" * 2 + b"a"  # after equal contexts comes now and then another byte: large steps swing
    check_rollback(model, editor, text, np.geomspace(0.05, 100.0, 12).tolist())


def test_a_step_taken_back_leaves_no_trace(model: tr.Model) -> None:
    """Neither in the memory nor in the optimizer's sums; and nothing is forgotten."""
    session = model.session(0.0, Editor(chunk=4, step=0.5, optimizer="adagrad"))
    session.append(b"a" * 17)
    twin = session.fork()
    # After equal contexts comes one `a` less than before: no large step can serve all four.
    report = session.observe(b"aaab", _CARELESS)
    twin.observe(b"aaab", dataclasses.replace(_CARELESS, threshold=100.0))
    assert [lesson.refused for lesson in report.lessons] == ["", "loss rose"], "the first hands over"
    assert _memory(session).any()
    assert_same_snapshot(session.snapshot(), twin.snapshot())


_CARELESS = Editor(chunk=4, step=1e6, rollback=True, optimizer="adagrad", retention=0.5)

"""How far the editor of the layers' memories goes: threshold, clip, floor, budget, rollback and steps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.streams import CODE, assert_same_snapshot, check_rollback, edited_session, relative_error
from titans_runtime.backends import Array, Graph
from titans_runtime.memories import MemoriesEditor
from titans_runtime.optimizers import OPTIMIZERS, Step


def test_unsurprising_periods_are_not_learnt_from(model: tr.Model) -> None:
    open_session = edited_session(model, "prediction:chunk=8,step=0.01")
    open_session.append(CODE)
    assert open_session.last_edit is not None
    losses = [lesson.loss for lesson in open_session.last_edit.lessons]
    threshold = float(np.median(losses))
    session = edited_session(model, f"prediction:chunk=8,step=0.01,threshold={threshold}")
    session.append(CODE)
    assert session.last_edit is not None
    lessons = session.last_edit.lessons
    assert {lesson.steps for lesson in lessons} == {0, 1}
    for lesson in lessons:
        assert (lesson.refused == "not surprising enough") == (lesson.loss < threshold)


def _gradients_times(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = MemoriesEditor._evaluate

    def scaled(editor: MemoriesEditor, *given: Array) -> dict[str, Array]:
        found = evaluate(editor, *given)  # type: ignore[arg-type]
        with np.errstate(over="ignore"):
            return {n: a * np.float32(factor) if n.startswith("grad.") else a for n, a in found.items()}

    monkeypatch.setattr(MemoriesEditor, "_evaluate", scaled)


@pytest.mark.parametrize("factor", [1.0, 1e22, 1e36])
def test_a_clipped_step_is_as_long_as_the_limit(
    model: tr.Model, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where float32 cannot hold the gradient's squares."""
    clip, step = 0.125, 0.5
    _gradients_times(factor, monkeypatch)
    session = edited_session(model, f"prediction:chunk=8,step={step},clip={clip}")
    before = session.snapshot().arrays
    moved = []
    original = MemoriesEditor._write

    def watch(editor: MemoriesEditor, values: dict[str, Array], sequence: Array) -> None:
        moved.append(math.hypot(*(np.linalg.norm(values[n] - before[f"state.{n}"]) for n in values)))
        original(editor, values, sequence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoriesEditor, "_write", watch)
        session.append(CODE[:9])
    assert session.last_edit is not None
    assert session.last_edit.gradient_norm[0] > clip
    assert moved == [pytest.approx(step * clip, rel=1e-4)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon", "sign"])
@pytest.mark.parametrize("clip", [0, 1])
def test_an_infinite_gradient_is_not_clipped_but_refused(
    model: tr.Model, optimizer: str, clip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an optimizer makes a finite step of it, as one that goes by the sign."""
    monkeypatch.setitem(OPTIMIZERS, "sign", _Sign)
    _gradients_times(np.inf, monkeypatch)
    session = edited_session(
        model, f"prediction:optimizer={optimizer},chunk=8,step=0.1,clip={clip},rollback=true"
    )
    session.append(CODE[:9])
    assert session.last_edit is not None
    assert session.last_edit.refusals == {"not finite": 1}


class _Sign:
    """A step of one length in every number."""

    moments = ()

    def __init__(self, size: float) -> None:
        self.size = np.float32(size)

    def step(self, value: Array, given: Step) -> tuple[Array, dict[str, Array]]:
        return value - self.size * np.sign(np.nan_to_num(given.gradient)), {}


def test_a_floor_bounds_what_is_forgotten(model: tr.Model) -> None:
    kept = {}
    for floor in (0.0, 1.0):
        session = model.session(edit=0.0, editor=None)
        session.append(CODE)
        before = session.snapshot().arrays["state.layers.0.memory"]
        editor = f"association:optimizer=titans,step=0,momentum=0,floor={floor},chunk=16,replace=true"
        session.observe(CODE[:16], tr.Editor.parse(editor))
        after = session.snapshot().arrays["state.layers.0.memory"]
        kept[floor] = float(np.linalg.norm(after) / np.linalg.norm(before))
    assert kept[1.0] == pytest.approx(1.0, rel=1e-6)
    assert kept[0.0] < 0.99


def test_time_that_is_spent_ends_the_lessons(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of 5 ms a look: with a budget of 12 ms the first periods are learnt from, the others not."""
    ticks = itertools.count()
    monkeypatch.setattr("titans_runtime.memories.time.perf_counter", lambda: 0.005 * next(ticks))
    session = edited_session(model, "prediction:chunk=8,step=0.01,budget=12")
    session.append(CODE)
    assert session.last_edit is not None
    refused = [lesson.refused for lesson in session.last_edit.lessons]
    learnt = refused.count("")
    assert 1 <= learnt < len(refused)
    assert refused == [""] * learnt + ["time budget spent"] * (len(refused) - learnt)


@pytest.mark.parametrize("editor", ["prediction:chunk=8,step=0.01,budget=12", "readout:chunk=8,budget=12"])
def test_every_call_has_the_whole_budget(
    model: tr.Model, editor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks, session, updates = itertools.count(), edited_session(model, editor), []
    for module in ("memories", "readout"):
        monkeypatch.setattr(f"titans_runtime.{module}.time.perf_counter", lambda: 0.005 * next(ticks))
    for _ in range(3):
        session.append(CODE)
        assert session.last_edit is not None
        assert session.last_edit.refusals
        updates.append(session.last_edit.updates)
    assert updates[0] == updates[1] == updates[2] > 0


@pytest.mark.parametrize("budget", [0, 12])
def test_the_graph_is_loaded_before_a_budget_runs(
    model: tr.Model, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, graph = [], model.backend.graph

    def watched(name: str) -> Graph:
        loaded.append(name)
        return graph(name)

    monkeypatch.setattr(model.backend, "graph", watched)
    edited_session(model, f"prediction:chunk=8,budget={budget}")
    assert ("gradient.prediction" in loaded) == bool(budget)


def test_a_step_that_does_harm_is_taken_back(model: tr.Model) -> None:
    session = edited_session(model, "association:chunk=8,step=10,rollback=true")
    plain = model.session(edit=0.0, editor=None)
    assert relative_error(session.append(CODE), plain.append(CODE)) <= 1e-5
    assert session.last_edit is not None
    assert session.last_edit.refusals == {"loss rose": len(session.last_edit.lessons)}
    assert session.last_edit.updates == 0


def test_the_step_that_raised_the_loss_is_taken_back_the_others_are_kept(model: tr.Model) -> None:
    """The momentum swings beyond the lowest point."""
    swinging = tr.Editor.parse("association:momentum=0.95,chunk=16,steps=5")
    check_rollback(model, swinging, CODE[:17], np.geomspace(0.005, 1.0, 12).tolist())


@pytest.mark.parametrize("rollback", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(
    model: tr.Model, rollback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = edited_session(model, f"prediction:chunk=8,step=0.1,rollback={str(rollback).lower()}")
    plain = model.session(edit=0.0, editor=None)
    session.append(CODE[:5])
    plain.append(CODE[:5])
    mark = session.snapshot()
    evaluate = MemoriesEditor._evaluate

    def broken(editor: MemoriesEditor, *given: Array) -> dict[str, Array]:
        found = evaluate(editor, *given)  # type: ignore[arg-type]
        found["grad.layers.1.memory"][0, 0, 1, 2] = np.nan
        return found

    monkeypatch.setattr(MemoriesEditor, "_evaluate", broken)
    if rollback:
        assert relative_error(session.append(CODE[5:]), plain.append(CODE[5:])) <= 1e-5
        assert session.last_edit is not None
        assert set(session.last_edit.refusals) == {"not finite"}
    else:
        with pytest.raises(
            tr.NumericsError, match="a step of prediction a memory is not finite; the session is as it"
        ):
            session.append(CODE[5:])
        assert_same_snapshot(session.snapshot(), mark)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("rollback", [True, False])
def test_moments_that_are_not_finite_are_not_kept(
    model: tr.Model, optimizer: str, rollback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step itself is zero then, and so would be all that follow."""
    settings = f"optimizer={optimizer},chunk=8,rollback={str(rollback).lower()}"
    session = edited_session(model, f"prediction:{settings}")
    session.append(CODE[:5])
    mark = session.snapshot()
    _gradients_times(1e22, monkeypatch)
    if rollback:
        session.append(CODE[5:20])
        assert session.last_edit is not None
        assert session.last_edit.refusals == {"not finite": 2}
        kept = session.snapshot().arrays
        assert not kept["memories.square.layers.0.memory"].any()
    else:
        message = "a step of prediction the optimizer's square is not finite; the session is as it was"
        with pytest.raises(tr.NumericsError, match=message):
            session.append(CODE[5:20])
        assert_same_snapshot(session.snapshot(), mark)


def test_more_steps_learn_more_of_a_period(model: tr.Model) -> None:
    losses = []
    for steps in (1, 2, 4):
        session = edited_session(model, f"prediction:chunk=32,step=0.02,steps={steps},rollback=true")
        session.append(CODE[:33])
        assert session.last_edit is not None
        (lesson,) = session.last_edit.lessons
        assert lesson.steps == steps
        losses.append(lesson.loss_after)
    assert losses[0] > losses[1] > losses[2]

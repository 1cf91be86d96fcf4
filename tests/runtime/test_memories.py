"""Editing the layers' memories through exported gradients: the rule, every policy, transactions."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import titans_runtime as tr
from tests.runtime.streams import append_parts, assert_same_snapshot, check_rollback, cuts, relative_error
from titans_runtime.backends import Array
from titans_runtime.editor import chosen_memories
from titans_runtime.manifest import Manifest
from titans_runtime.memories import MemoriesEditor
from titans_runtime.optimizers import OPTIMIZERS, Sgd, Step, Titans

TEXT = b"def f(x):\n    return [y * y for y in x if y % 2]\n" * 2
EDITORS = [
    "prediction:step=0.05,chunk=8",
    "prediction:optimizer=adam,step=0.01,chunk=8,steps=2",
    "association:optimizer=muon,step=0.01,chunk=16,memories=layers.1.*",
    "association:optimizer=titans,chunk=4,replace=true",
    "readout:step=0.5+prediction:step=0.05,chunk=8",
]


def _session(model: tr.Model, editor: str, edit: float = 0.0) -> tr.Session:
    return model.session(edit=edit, editor=tr.Editor.parse(editor))


def _memories(session: tr.Session) -> dict[str, Array]:
    return {name: array for name, array in session.snapshot().arrays.items() if ".memory" in name}


# --- the rule


def test_one_layer_edited_openly_token_by_token_is_the_fused_rule(one_layer: tr.Model) -> None:
    """``association`` with the model's own gates, in place of what the model writes, is λ = 1."""
    fused, opened = one_layer.session(edit=1.0, editor=None), one_layer.session(edit=0.0, editor=None)
    editor = tr.Editor.parse("association:optimizer=titans,chunk=1,replace=true")
    for start in range(0, len(TEXT), 7):
        fused.append(TEXT[start : start + 7])
        opened.observe(TEXT[start : start + 7], editor)
    names = ("state.layers.0.memory", "state.layers.0.momentum", "state.layers.0.conv")
    for name in names:
        expected = fused.snapshot().arrays[name]
        assert np.abs(expected).max() > 0.01
        assert relative_error(opened.snapshot().arrays[name], expected) <= 1e-4
    plain = one_layer.session(edit=0.0, editor=None)
    plain.append(TEXT)
    assert relative_error(plain.snapshot().arrays[names[0]], fused.snapshot().arrays[names[0]]) > 1e-2


@pytest.mark.parametrize("edit", [0.0, 1.0])
def test_deeper_layers_edited_openly_follow_the_fused_rule_where_it_runs(
    model: tr.Model, edit: float
) -> None:
    """A layer's input follows from what the layers below write as they run: by the fused rule, or not."""
    fused, opened = model.session(edit=1.0, editor=None), model.session(edit=edit, editor=None)
    fused.append(TEXT)
    opened.observe(TEXT, tr.Editor.parse("association:optimizer=titans,chunk=1,replace=true"))
    expected, found = fused.snapshot().arrays, opened.snapshot().arrays
    for kind in ("memory", "momentum"):
        first, second = (
            relative_error(found[name], expected[name])
            for name in (f"state.layers.{layer}.{kind}" for layer in range(2))
        )
        assert first <= 1e-4
        assert (second <= 1e-4) == (edit == 1.0)


class _Recorded(Titans):
    """Keeps the momentum that every step is given and returns."""

    steps: ClassVar[list[tuple[Array, Array]]] = []

    def step(self, value: Array, given: Step) -> tuple[Array, dict[str, Array]]:
        after, moments = super().step(value, given)
        self.steps.append((given.moments["momentum"].copy(), moments["momentum"].copy()))
        return after, moments


def test_the_steps_of_a_period_go_on_from_the_models_momentum_and_leave_theirs(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "titans", _Recorded)
    monkeypatch.setattr(_Recorded, "steps", [])
    settings = "chunk=4,steps=3,replace=true,momentum=0.9,retention=1,memories=layers.0.*"
    session = _session(model, f"association:optimizer=titans,{settings}")
    session.append(TEXT[:8])
    session.append(TEXT[8:9])  # completes a period, and takes a token of the next one
    given, kept = zip(*_Recorded.steps, strict=True)
    assert len(kept) == 6
    assert not given[0].any(), "the model's, as a stream begins"
    for number in range(1, 6):
        assert np.array_equal(given[number], kept[number - 1])
        assert np.abs(given[number]).max() > 1e-3
    anchor = session.snapshot().arrays["memories.anchor.layers.0.momentum"]
    assert np.array_equal(anchor, kept[-1])


def test_an_optimizer_of_another_convention_leaves_the_models_momentum_alone(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGD's buffer is a sum of gradients; the model's is what is added to the memory."""
    given: list[Array] = []
    kept: list[Array] = []

    class Recorded(Sgd):
        def step(self, value: Array, at: Step) -> tuple[Array, dict[str, Array]]:
            after, moments = super().step(value, at)
            given.append(at.moments["momentum"].copy())
            kept.append(moments["momentum"].copy())
            return after, moments

    monkeypatch.setitem(OPTIMIZERS, "sgd", Recorded)
    settings = "step=0.01,momentum=0.9,chunk=4,replace=true,memories=layers.0.*"
    session, plain = _session(model, f"association:{settings}"), model.session(edit=0.0, editor=None)
    session.append(TEXT[:9])
    plain.append(TEXT[:8])
    assert len(given) == 2
    assert not given[0].any()
    assert np.array_equal(given[1], kept[0])
    expected = plain.snapshot().arrays["state.layers.0.momentum"]
    anchor = session.snapshot().arrays["memories.anchor.layers.0.momentum"]
    assert np.abs(expected).max() > 1e-3
    assert relative_error(anchor, expected) <= 1e-5


def test_a_step_of_zero_changes_nothing(model: tr.Model) -> None:
    plain = model.session(edit=0.5, editor=None)
    edited = _session(model, "prediction:step=0,chunk=8", edit=0.5)
    assert relative_error(edited.append(TEXT), plain.append(TEXT)) <= 1e-5


def test_beside_the_readouts_editor_the_loss_is_that_of_what_was_predicted(model: tr.Model) -> None:
    """Not of a readout memory that has learnt the period's targets by then."""
    session = _session(model, "readout:step=0.5,chunk=8+prediction:step=0.05,chunk=8")
    scores = session.append(TEXT)
    assert session.last_edit is not None
    lessons = [lesson for lesson in session.last_edit.lessons if lesson.objective == "prediction"]
    assert len(lessons) == (len(TEXT) - 1) // 8
    chance = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    for lesson in lessons:
        rows = np.arange(lesson.position, lesson.position + 8)
        loss = -float(chance[rows, np.frombuffer(TEXT, np.uint8)[rows + 1]].mean())
        assert abs(lesson.loss - loss) <= 1e-4 * loss


def test_a_step_lowers_the_loss_of_its_own_period(model: tr.Model) -> None:
    """As a gradient must: a small step, and the loss falls by about the squared norm times the step."""
    step = 1e-3
    session = _session(model, f"prediction:step={step},chunk=16,rollback=true")
    session.append(TEXT)
    assert session.last_edit is not None
    for lesson in session.last_edit.lessons[1:]:  # at the beginning the memory is zero: the loss is curved
        fall = (lesson.loss - lesson.loss_after) * lesson.learnt
        assert fall == pytest.approx(step * math.hypot(*lesson.norms.values()) ** 2, rel=0.1)


@pytest.mark.parametrize("editor", EDITORS)
def test_editing_moves_the_chosen_memories_alone(model: tr.Model, editor: str) -> None:
    session = _session(model, editor)
    session.append(TEXT)
    moments = [name for name in session.snapshot().arrays if name.startswith("memories.mean.")]
    if "layers.1" in editor:
        assert moments == ["memories.mean.layers.1.memory"]
        lessons = session.last_edit.lessons if session.last_edit else []
        assert {name for lesson in lessons for name in lesson.norms} == {"layers.1.memory"}
    plain = model.session(edit=0.0, editor=None)
    plain.append(TEXT)
    changed = {
        name
        for name, array in _memories(session).items()
        if not name.startswith("memories.") and not np.array_equal(array, plain.snapshot().arrays[name])
    }
    assert changed == ({"state.layers.1.memory"} if "layers.1" in editor else set(_memories(plain)))


# --- streams


@settings(max_examples=15)
@given(data=st.data(), editor=st.sampled_from(EDITORS))
def test_the_cuts_of_a_stream_do_not_matter(model: tr.Model, data: st.DataObject, editor: str) -> None:
    whole, parts = _session(model, editor), _session(model, editor)
    expected = whole.append(TEXT)
    places = data.draw(cuts(len(TEXT)))
    assert relative_error(append_parts(parts, TEXT, places), expected) <= 1e-4


@pytest.mark.parametrize("editor", EDITORS)
def test_a_later_token_changes_no_earlier_score(model: tr.Model, editor: str) -> None:
    changed = TEXT[:40] + bytes(byte ^ 1 for byte in TEXT[40:])
    one, other = (_session(model, editor).append(text) for text in (TEXT, changed))
    assert np.array_equal(one[:40], other[:40])
    assert not np.array_equal(one[40:], other[40:])


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("length", [1, 16, 21])
def test_a_memory_file_continues_bit_for_bit(
    model: tr.Model, editor: str, length: int, tmp_path: Path
) -> None:
    session = _session(model, editor, edit=0.3)
    session.append(TEXT[:length])
    session.save(tmp_path / "memory")
    twin, loaded = session.fork(), model.load_session(tmp_path / "memory")
    expected = session.append(TEXT[length:])
    for copy in (twin, loaded):
        assert np.array_equal(copy.append(TEXT[length:]), expected)
        assert_same_snapshot(copy.snapshot(), session.snapshot())


def test_rows_of_a_batch_equal_single_sessions(model: tr.Model) -> None:
    specs = [*EDITORS[:3], EDITORS[4]]
    alone, together = ([_session(model, editor) for editor in specs] for _ in range(2))
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        one.append(TEXT[: 3 * number + 1])
        other.append(TEXT[: 3 * number + 1])
    lengths = [30, 33, 41, 38]
    with model.batch(together) as batch:
        rows = batch.append([TEXT[:length] for length in lengths])
        rows = batch.append([TEXT[:1] for _ in lengths])
    for session, length, row in zip(alone, lengths, rows, strict=True):
        session.append(TEXT[:length])
        assert relative_error(row, session.append(TEXT[:1])) <= 1e-4


def test_samples_teach_nothing(model: tr.Model) -> None:
    session = _session(model, "prediction:step=0.1,chunk=4")
    plain = model.session(edit=0.0, editor=None)
    session.append(b"a")
    plain.append(b"a")
    for token in session.generate(14, seed=1):
        plain.append([token])
    assert session.last_edit is not None
    assert relative_error(session.append(b"c"), plain.append(b"c")) <= 1e-5


# --- policies


def test_unsurprising_periods_are_not_learnt_from(model: tr.Model) -> None:
    open_session = _session(model, "prediction:chunk=8,step=0.01")
    open_session.append(TEXT)
    assert open_session.last_edit is not None
    losses = [lesson.loss for lesson in open_session.last_edit.lessons]
    threshold = float(np.median(losses))
    session = _session(model, f"prediction:chunk=8,step=0.01,threshold={threshold}")
    session.append(TEXT)
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
    session = _session(model, f"prediction:chunk=8,step={step},clip={clip}")
    before = session.snapshot().arrays
    moved = []
    original = MemoriesEditor._write

    def watch(editor: MemoriesEditor, values: dict[str, Array], sequence: Array) -> None:
        moved.append(math.hypot(*(np.linalg.norm(values[n] - before[f"state.{n}"]) for n in values)))
        original(editor, values, sequence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoriesEditor, "_write", watch)
        session.append(TEXT[:9])
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
    session = _session(model, f"prediction:optimizer={optimizer},chunk=8,step=0.1,clip={clip},rollback=true")
    session.append(TEXT[:9])
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
        session.append(TEXT)
        before = session.snapshot().arrays["state.layers.0.memory"]
        editor = f"association:optimizer=titans,step=0,momentum=0,floor={floor},chunk=16,replace=true"
        session.observe(TEXT[:16], tr.Editor.parse(editor))
        after = session.snapshot().arrays["state.layers.0.memory"]
        kept[floor] = float(np.linalg.norm(after) / np.linalg.norm(before))
    assert kept[1.0] == pytest.approx(1.0, rel=1e-6)
    assert kept[0.0] < 0.99


def test_time_that_is_spent_ends_the_lessons(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of 5 ms a look: with a budget of 12 ms the first periods are learnt from, the others not."""
    ticks = itertools.count()
    monkeypatch.setattr("titans_runtime.memories.time.perf_counter", lambda: 0.005 * next(ticks))
    session = _session(model, "prediction:chunk=8,step=0.01,budget=12")
    session.append(TEXT)
    assert session.last_edit is not None
    refused = [lesson.refused for lesson in session.last_edit.lessons]
    learnt = refused.count("")
    assert 1 <= learnt < len(refused)
    assert refused == [""] * learnt + ["time budget spent"] * (len(refused) - learnt)


def test_a_step_that_does_harm_is_taken_back(model: tr.Model) -> None:
    session = _session(model, "association:chunk=8,step=10,rollback=true")
    plain = model.session(edit=0.0, editor=None)
    assert relative_error(session.append(TEXT), plain.append(TEXT)) <= 1e-5
    assert session.last_edit is not None
    assert session.last_edit.refusals == {"loss rose": len(session.last_edit.lessons)}
    assert session.last_edit.updates == 0


def test_the_step_that_raised_the_loss_is_taken_back_the_others_are_kept(model: tr.Model) -> None:
    """The momentum swings beyond the lowest point."""
    swinging = tr.Editor.parse("association:momentum=0.95,chunk=16,steps=5")
    check_rollback(model, swinging, TEXT[:17], np.geomspace(0.005, 1.0, 12).tolist())


@pytest.mark.parametrize("rollback", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(
    model: tr.Model, rollback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _session(model, f"prediction:chunk=8,step=0.1,rollback={str(rollback).lower()}")
    plain = model.session(edit=0.0, editor=None)
    session.append(TEXT[:5])
    plain.append(TEXT[:5])
    mark = session.snapshot()
    evaluate = MemoriesEditor._evaluate

    def broken(editor: MemoriesEditor, *given: Array) -> dict[str, Array]:
        found = evaluate(editor, *given)  # type: ignore[arg-type]
        found["grad.layers.1.memory"][0, 0, 1, 2] = np.nan
        return found

    monkeypatch.setattr(MemoriesEditor, "_evaluate", broken)
    if rollback:
        assert relative_error(session.append(TEXT[5:]), plain.append(TEXT[5:])) <= 1e-5
        assert session.last_edit is not None
        assert set(session.last_edit.refusals) == {"not finite"}
    else:
        with pytest.raises(
            tr.NumericsError, match="a step of prediction a memory is not finite; the session is as it"
        ):
            session.append(TEXT[5:])
        assert_same_snapshot(session.snapshot(), mark)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("rollback", [True, False])
def test_moments_that_are_not_finite_are_not_kept(
    model: tr.Model, optimizer: str, rollback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step itself is zero then, and so would be all that follow."""
    settings = f"optimizer={optimizer},chunk=8,rollback={str(rollback).lower()}"
    session = _session(model, f"prediction:{settings}")
    session.append(TEXT[:5])
    mark = session.snapshot()
    _gradients_times(1e22, monkeypatch)
    if rollback:
        session.append(TEXT[5:20])
        assert session.last_edit is not None
        assert session.last_edit.refusals == {"not finite": 2}
        kept = session.snapshot().arrays
        assert not kept["memories.square.layers.0.memory"].any()
    else:
        message = "a step of prediction the optimizer's square is not finite; the session is as it was"
        with pytest.raises(tr.NumericsError, match=message):
            session.append(TEXT[5:20])
        assert_same_snapshot(session.snapshot(), mark)


def test_more_steps_learn_more_of_a_period(model: tr.Model) -> None:
    losses = []
    for steps in (1, 2, 4):
        session = _session(model, f"prediction:chunk=32,step=0.02,steps={steps},rollback=true")
        session.append(TEXT[:33])
        assert session.last_edit is not None
        (lesson,) = session.last_edit.lessons
        assert lesson.steps == steps
        losses.append(lesson.loss_after)
    assert losses[0] > losses[1] > losses[2]


# --- transactions


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("call", [1, 2, 5])
def test_ctrl_c_within_a_lesson_is_undone(
    model: tr.Model, editor: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, twin = _session(model, editor), _session(model, editor)
    session.append(TEXT[:21])
    twin.append(TEXT[:21])
    mark, calls = session.snapshot(), itertools.count(1)
    write = MemoriesEditor._write

    def interrupted(self: MemoriesEditor, values: dict[str, Array], sequence: Array) -> None:
        write(self, values, sequence)
        if next(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MemoriesEditor, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.append(TEXT)
    assert_same_snapshot(session.snapshot(), mark)
    assert np.array_equal(session.append(TEXT), twin.append(TEXT))


def test_a_lesson_of_another_editor_returns_to_the_session_own(model: tr.Model) -> None:
    own, other = "readout:step=0.5,chunk=4", tr.Editor.parse("prediction:step=0.05,chunk=8,rollback=true")
    session = _session(model, own)
    session.append(TEXT[:10])
    report = session.observe(TEXT[10:40], other)
    assert session.editor == tr.Editor.parse(own)
    assert report.updates > 0
    assert {lesson.objective for lesson in report.lessons} == {"readout", "prediction"}
    session.append(TEXT[40:])
    assert session.last_edit is not None
    assert {lesson.objective for lesson in session.last_edit.lessons} == {"readout"}


# --- what cannot be


@pytest.mark.parametrize(
    ("editor", "message"),
    [
        ("luck:step=1", "cannot be edited by 'luck'; known: readout, prediction, association"),
        ("prediction:memories=layers.7.*", "'layers.7.\\*' fits none of layers.0.memory, layers.1.memory"),
    ],
)
def test_what_the_bundle_has_not_is_refused(model: tr.Model, editor: str, message: str) -> None:
    with pytest.raises(tr.UsageError, match=message):
        _session(model, editor)


def _with_shape(manifest: Manifest, name: str, shape: tuple[int, ...]) -> Manifest:
    state = [replace(one, shape=("batch", *shape)) if one.name == name else one for one in manifest.state]
    return replace(manifest, state=tuple(state))


@pytest.mark.parametrize("shape", [(), (16,), (2, 16)], ids=["a number", "a vector", "a vector to each head"])
def test_muon_is_refused_for_what_is_no_matrix(model: tr.Model, shape: tuple[int, ...]) -> None:
    manifest = _with_shape(model.manifest, "layers.1.memory", shape)
    muon = tr.Editor("association", optimizer="muon")
    message = f"muon: it takes matrices, and layers.1.memory has shape {re.escape(str(shape))}, no .*; choose"
    with pytest.raises(tr.UsageError, match=message):
        chosen_memories(muon, manifest)
    assert chosen_memories(replace(muon, memories=("layers.0.*",)), manifest) == ("layers.0.memory",)
    assert len(chosen_memories(replace(muon, optimizer="adam"), manifest)) == 2
    assert len(chosen_memories(muon, model.manifest)) == 2


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> tr.Model:
    """A model of one layer, with lively gates."""
    import torch

    from titans_export.config import PRESETS
    from titans_export.model import TitansModel
    from titans_export.pipeline import export_bundle
    from titans_export.training.checkpoint import save_checkpoint

    torch.manual_seed(3)
    model = TitansModel(replace(PRESETS["tiny"], layers=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("one_layer")
    save_checkpoint(model, folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")
    return tr.load(folder / "bundle", threads=1)

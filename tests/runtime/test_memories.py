"""Editing the layers' memories through exported gradients: the rule, streams, transactions."""

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
from tests.runtime.streams import (
    CODE,
    append_parts,
    assert_same_snapshot,
    cuts,
    edited_session,
    relative_error,
)
from titans_runtime.backends import Array
from titans_runtime.editor import chosen_memories
from titans_runtime.manifest import Manifest
from titans_runtime.memories import MemoriesEditor
from titans_runtime.optimizers import OPTIMIZERS, Sgd, Step, Titans

EDITORS = [
    "prediction:step=0.05,chunk=8",
    "prediction:optimizer=adam,step=0.01,chunk=8,steps=2",
    "association:optimizer=muon,step=0.01,chunk=16,memories=layers.1.*",
    "association:optimizer=titans,chunk=4,replace=true",
    "readout:step=0.5+prediction:step=0.05,chunk=8",
]


def _memories(session: tr.Session) -> dict[str, Array]:
    return {name: array for name, array in session.snapshot().arrays.items() if ".memory" in name}


# --- the rule


def test_one_layer_edited_openly_token_by_token_is_the_fused_rule(one_layer: tr.Model) -> None:
    """``association`` with the model's own gates, in place of what the model writes, is λ = 1."""
    fused, opened = one_layer.session(edit=1.0, editor=None), one_layer.session(edit=0.0, editor=None)
    editor = tr.Editor.parse("association:optimizer=titans,chunk=1,replace=true")
    for start in range(0, len(CODE), 7):
        fused.append(CODE[start : start + 7])
        opened.observe(CODE[start : start + 7], editor)
    names = ("state.layers.0.memory", "state.layers.0.momentum", "state.layers.0.conv")
    for name in names:
        expected = fused.snapshot().arrays[name]
        assert np.abs(expected).max() > 0.01
        assert relative_error(opened.snapshot().arrays[name], expected) <= 1e-4
    plain = one_layer.session(edit=0.0, editor=None)
    plain.append(CODE)
    assert relative_error(plain.snapshot().arrays[names[0]], fused.snapshot().arrays[names[0]]) > 1e-2


@pytest.mark.parametrize("edit", [0.0, 1.0])
def test_deeper_layers_edited_openly_follow_the_fused_rule_where_it_runs(
    model: tr.Model, edit: float
) -> None:
    """A layer's input follows from what the layers below write as they run: by the fused rule, or not."""
    fused, opened = model.session(edit=1.0, editor=None), model.session(edit=edit, editor=None)
    fused.append(CODE)
    opened.observe(CODE, tr.Editor.parse("association:optimizer=titans,chunk=1,replace=true"))
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
    session = edited_session(model, f"association:optimizer=titans,{settings}")
    session.append(CODE[:8])
    session.append(CODE[8:9])  # completes a period, and takes a token of the next one
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
    session, plain = edited_session(model, f"association:{settings}"), model.session(edit=0.0, editor=None)
    session.append(CODE[:9])
    plain.append(CODE[:8])
    assert len(given) == 2
    assert not given[0].any()
    assert np.array_equal(given[1], kept[0])
    expected = plain.snapshot().arrays["state.layers.0.momentum"]
    anchor = session.snapshot().arrays["memories.anchor.layers.0.momentum"]
    assert np.abs(expected).max() > 1e-3
    assert relative_error(anchor, expected) <= 1e-5


def test_a_step_of_zero_changes_nothing(model: tr.Model) -> None:
    plain = model.session(edit=0.5, editor=None)
    edited = edited_session(model, "prediction:step=0,chunk=8", edit=0.5)
    assert relative_error(edited.append(CODE), plain.append(CODE)) <= 1e-5


def test_beside_the_readouts_editor_the_loss_is_that_of_what_was_predicted(model: tr.Model) -> None:
    """Not of a readout memory that has learnt the period's targets by then."""
    session = edited_session(model, "readout:step=0.5,chunk=8+prediction:step=0.05,chunk=8")
    scores = session.append(CODE)
    assert session.last_edit is not None
    lessons = [lesson for lesson in session.last_edit.lessons if lesson.objective == "prediction"]
    assert len(lessons) == (len(CODE) - 1) // 8
    chance = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    for lesson in lessons:
        rows = np.arange(lesson.position, lesson.position + 8)
        loss = -float(chance[rows, np.frombuffer(CODE, np.uint8)[rows + 1]].mean())
        assert abs(lesson.loss - loss) <= 1e-4 * loss


def test_a_step_lowers_the_loss_of_its_own_period(model: tr.Model) -> None:
    """As a gradient must: a small step, and the loss falls by about the squared norm times the step."""
    step = 1e-3
    session = edited_session(model, f"prediction:step={step},chunk=16,rollback=true")
    session.append(CODE)
    assert session.last_edit is not None
    for lesson in session.last_edit.lessons[1:]:  # at the beginning the memory is zero: the loss is curved
        fall = (lesson.loss - lesson.loss_after) * lesson.learnt
        assert fall == pytest.approx(step * math.hypot(*lesson.norms.values()) ** 2, rel=0.1)


@pytest.mark.parametrize("editor", EDITORS)
def test_editing_moves_the_chosen_memories_alone(model: tr.Model, editor: str) -> None:
    session = edited_session(model, editor)
    session.append(CODE)
    moments = [name for name in session.snapshot().arrays if name.startswith("memories.mean.")]
    if "layers.1" in editor:
        assert moments == ["memories.mean.layers.1.memory"]
        lessons = session.last_edit.lessons if session.last_edit else []
        assert {name for lesson in lessons for name in lesson.norms} == {"layers.1.memory"}
    plain = model.session(edit=0.0, editor=None)
    plain.append(CODE)
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
    whole, parts = edited_session(model, editor), edited_session(model, editor)
    expected = whole.append(CODE)
    places = data.draw(cuts(len(CODE)))
    assert relative_error(append_parts(parts, CODE, places), expected) <= 1e-4


@pytest.mark.parametrize("editor", EDITORS)
def test_a_later_token_changes_no_earlier_score(model: tr.Model, editor: str) -> None:
    changed = CODE[:40] + bytes(byte ^ 1 for byte in CODE[40:])
    one, other = (edited_session(model, editor).append(text) for text in (CODE, changed))
    assert np.array_equal(one[:40], other[:40])
    assert not np.array_equal(one[40:], other[40:])


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("length", [1, 16, 21])
def test_a_memory_file_continues_bit_for_bit(
    model: tr.Model, editor: str, length: int, tmp_path: Path
) -> None:
    session = edited_session(model, editor, edit=0.3)
    session.append(CODE[:length])
    session.save(tmp_path / "memory")
    twin, loaded = session.fork(), model.load_session(tmp_path / "memory")
    expected = session.append(CODE[length:])
    for copy in (twin, loaded):
        assert np.array_equal(copy.append(CODE[length:]), expected)
        assert_same_snapshot(copy.snapshot(), session.snapshot())


def test_rows_of_a_batch_equal_single_sessions(model: tr.Model) -> None:
    specs = [*EDITORS[:3], EDITORS[4]]
    alone, together = ([edited_session(model, editor) for editor in specs] for _ in range(2))
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        one.append(CODE[: 3 * number + 1])
        other.append(CODE[: 3 * number + 1])
    lengths = [30, 33, 41, 38]
    with model.batch(together) as batch:
        rows = batch.append([CODE[:length] for length in lengths])
        rows = batch.append([CODE[:1] for _ in lengths])
    for session, length, row in zip(alone, lengths, rows, strict=True):
        session.append(CODE[:length])
        assert relative_error(row, session.append(CODE[:1])) <= 1e-4


def test_samples_teach_nothing(model: tr.Model) -> None:
    session = edited_session(model, "prediction:step=0.1,chunk=4")
    plain = model.session(edit=0.0, editor=None)
    session.append(b"a")
    plain.append(b"a")
    for token in session.generate(14, seed=1):
        plain.append([token])
    assert session.last_edit is not None
    assert relative_error(session.append(b"c"), plain.append(b"c")) <= 1e-5


# --- transactions


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("call", [1, 2, 5])
def test_ctrl_c_within_a_lesson_is_undone(
    model: tr.Model, editor: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, twin = edited_session(model, editor), edited_session(model, editor)
    session.append(CODE[:21])
    twin.append(CODE[:21])
    mark, calls = session.snapshot(), itertools.count(1)
    write = MemoriesEditor._write

    def interrupted(self: MemoriesEditor, values: dict[str, Array], sequence: Array) -> None:
        write(self, values, sequence)
        if next(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MemoriesEditor, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.append(CODE)
    assert_same_snapshot(session.snapshot(), mark)
    assert np.array_equal(session.append(CODE), twin.append(CODE))


def test_a_lesson_of_another_editor_returns_to_the_session_own(model: tr.Model) -> None:
    own, other = "readout:step=0.5,chunk=4", tr.Editor.parse("prediction:step=0.05,chunk=8,rollback=true")
    session = edited_session(model, own)
    session.append(CODE[:10])
    report = session.observe(CODE[10:40], other)
    assert session.editor == tr.Editor.parse(own)
    assert report.updates > 0
    assert {lesson.objective for lesson in report.lessons} == {"readout", "prediction"}
    session.append(CODE[40:])
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
        edited_session(model, editor)


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

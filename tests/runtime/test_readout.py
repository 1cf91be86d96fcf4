"""Periodic editing of the readout memory against a few lines of NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import titans_runtime as tr
from tests.runtime.streams import (
    Array,
    append_parts,
    assert_same_snapshot,
    cuts,
    parts,
    relative_error,
    streams,
)
from titans_runtime.backends import DTYPES
from titans_runtime.editor import READOUT_OPTIMIZERS, Editor
from titans_runtime.state import save_snapshot

CHUNKS = [1, 3, 4, 7]


def _forward(model: tr.Model, text: bytes, places: list[int]) -> tuple[Array, Array]:
    """Logits without a readout memory, and readout keys, from the graph itself, cut in the same places."""
    spec = model.manifest.graphs["model"]
    past = {
        f"past.{entry.name}": np.full((1, *entry.row_shape), entry.initial, DTYPES[entry.dtype])
        for entry in model.manifest.state
    }
    logits, keys = [], []
    for part in parts(text, places):
        axes = {"batch": 1, "tokens": len(part)}
        outputs = {
            tensor.name: np.zeros([axes.get(axis, axis) for axis in tensor.shape], DTYPES[tensor.dtype])
            for tensor in spec.outputs
        }
        ids, edit = np.array([list(part)]), np.zeros((1, model.manifest.edit_layers), np.float32)
        model.graph.bind({"input_ids": ids, "edit": edit, **past}, outputs).run()
        past |= {f"past.{n[8:]}": array for n, array in outputs.items() if n.startswith("present.")}
        logits.append(outputs["logits"][0].astype(np.float64))
        keys.append(_whole_keys(model, outputs["readout_key"][0], outputs["readout_rows"][0]))
    return np.concatenate(logits), np.concatenate(keys)


def _whole_keys(model: tr.Model, dense: Array, rows: Array) -> Array:
    """Keys ``(T, Dr)`` with their one-hot parts written out."""
    (height,) = (entry.row_shape[0] for entry in model.manifest.state if entry.name == "readout")
    keys = np.zeros((len(dense), height))
    keys[:, : dense.shape[1]] = dense
    for picked in rows.T:
        keys[np.arange(len(dense)), picked] = model.manifest.model["readout_context_scale"]
    return keys


def _edited(
    model: tr.Model,
    text: bytes,
    places: list[int],
    step: float,
    chunk: int,
    optimizer: str = "sgd",
    retention: float = 1.0,
) -> tuple[Array, Array]:
    """Logits and readout memory after the whole text, one period after the other."""
    base, keys = _forward(model, text, places)
    R = np.zeros((keys.shape[1], base.shape[1]))
    energy = np.zeros(len(R))
    dense = model.manifest.model["d_model"]
    logits = np.empty_like(base)
    for start in range(0, len(text), chunk):
        end = min(start + chunk, len(text))
        logits[start:end] = base[start:end] + keys[start:end] @ R
        if end == len(text):  # the target of the last position is not known
            break
        gradient, picked = np.zeros_like(R), set[int]()
        for t in range(start, end):
            softmax = np.exp(logits[t] - logits[t].max())
            softmax /= softmax.sum()
            softmax[text[t + 1]] -= 1
            gradient += np.outer(keys[t], softmax)
            picked |= set(np.flatnonzero(keys[t][dense:]) + dense)
        if optimizer == "adagrad":
            energy += (gradient**2).sum(axis=1)
            gradient /= np.sqrt(1 + energy)[:, None]
        R[sorted(picked)] *= retention
        R -= step * gradient
    return logits, R


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("optimizer", READOUT_OPTIMIZERS)
@given(data=st.data(), text=streams, retention=st.sampled_from([1.0, 0.9, 0.0]))
def test_editing_equals_the_formula(
    model: tr.Model, data: st.DataObject, optimizer: str, chunk: int, text: bytes, retention: float
) -> None:
    places = data.draw(cuts(len(text)))
    expected, R = _edited(model, text, places, 0.5, chunk, optimizer, retention)
    session = model.session(0.0, Editor(step=0.5, chunk=chunk, optimizer=optimizer, retention=retention))
    assert relative_error(append_parts(session, text, places), expected) <= 1e-4
    np.testing.assert_allclose(session.snapshot().arrays["state.readout"][0], R, atol=1e-4)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_formula_moves_the_logits(model: tr.Model, chunk: int) -> None:
    """So the law above is not about a memory that stays zero."""
    text = b"the same words, the same words"
    expected, R = _edited(model, text, [], 0.5, chunk)
    assert relative_error(expected, _forward(model, text, [])[0]) > 1e-2
    assert np.abs(R).max() > 1e-2


@pytest.mark.parametrize("text", [b"a" * 200, b"ab" * 100, np.random.default_rng(0).bytes(200)])
@pytest.mark.parametrize("step", [1e3, 1e6])
@pytest.mark.parametrize("optimizer", READOUT_OPTIMIZERS)
def test_extreme_steps_equal_the_formula(model: tr.Model, optimizer: str, step: float, text: bytes) -> None:
    """Logits of up to 1e9: still finite, and those that float64 has."""
    for chunk in (1, 8, 150):
        with np.errstate(over="ignore", under="ignore"):
            expected, R = _edited(model, text, [], step, chunk, optimizer)
        session = model.session(0.0, Editor(step=step, chunk=chunk, optimizer=optimizer))
        assert relative_error(session.append(text), expected) <= 1e-4
        assert relative_error(session.snapshot().arrays["state.readout"][0], R) <= 1e-4


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_step_of_zero_teaches_nothing(model: tr.Model, chunk: int) -> None:
    plain = model.session(0.0, None).append(b"nothing to learn")
    edited = model.session(0.0, Editor(step=0.0, chunk=chunk)).append(b"nothing to learn")
    assert relative_error(edited, plain) <= 1e-6


@pytest.mark.parametrize("chunk", CHUNKS)
def test_pending_positions_are_those_since_the_last_update(model: tr.Model, chunk: int) -> None:
    session = model.session(0.0, Editor(chunk=chunk))
    for seen in range(1, 3 * chunk + 2):
        session.append([seen])
        pending = session.snapshot().arrays["pending.targets"]
        assert len(pending) == (seen - 1) % chunk + 1
        assert pending[-1] == -1, "what follows the last token is not known"
        assert pending[:-1].tolist() == list(range(seen - len(pending) + 2, seen + 1))


def test_samples_are_no_targets_and_their_period_is_skipped(model: tr.Model) -> None:
    session = model.session(0.0, Editor(chunk=2))
    session.append(b"a")
    list(session.generate(4, seed=0))
    assert session.last_edit is not None
    assert (session.last_edit.updates, session.last_edit.skipped) == (0, 1)
    list(session.generate(1, seed=0))
    assert session.snapshot().arrays["pending.targets"].tolist() == [-1, -1]


def test_a_period_of_samples_and_text_learns_from_the_text(model: tr.Model) -> None:
    session = model.session(0.0, Editor(chunk=4))
    session.append(b"ab")
    token = next(session.generate(1, seed=0))
    report = session.observe(b"cde")
    assert report.updates == 1
    assert len(report.surprise) == 3, "of four positions only the one before the sample has no target"
    assert token in range(256)


# --- periods are those of the stream


def test_periods_stay_aligned_after_another_editor(model: tr.Model) -> None:
    """Ends of periods are multiples of `chunk`, wherever a lesson by another editor ended."""
    session = model.session(0.0, Editor(chunk=4))
    session.append(b"abcdef")
    session.observe(b"ghi", Editor(chunk=3))
    updates = []
    for token in b"jklmnopqrs":
        session.append([token])
        assert session.last_edit is not None
        updates.append(session.position - 1 if session.last_edit.updates else None)
    assert [position for position in updates if position] == [12, 16]


def test_what_a_failed_call_left_behind_teaches_nothing(model: tr.Model) -> None:
    """The buffers of a period are reused; a shorter period must not read what stands behind its end."""
    session, twin = (model.session(0.0, Editor(chunk=7)) for _ in range(2))
    for one in (session, twin):
        one.append(b"abc")
    assert session._editing.readout is not None
    session._editing.readout._scored[0, 3:] = np.nan
    session._editing.readout._keys.dense[3:] = np.inf
    for one in (session, twin):
        one.observe(b"d", Editor(chunk=2))
    assert np.array_equal(session.snapshot().arrays["state.readout"], twin.snapshot().arrays["state.readout"])


@pytest.mark.parametrize("length", [2, 40])
def test_a_gradient_that_would_leave_float32_is_refused(
    model: tr.Model, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr("titans_runtime.readout._LARGEST_UPDATE", 1e-3)
    session = model.session(0.0, Editor(chunk=1))
    session.append(b"a")
    before = session.snapshot()
    with pytest.raises(
        tr.NumericsError, match="gradient is too large; the session is as it was before the call"
    ):
        session.append(b"b" * length)
    assert_same_snapshot(session.snapshot(), before)
    monkeypatch.undo()
    session.append(b"b" * length)


def test_what_the_optimizer_has_summed_up_belongs_to_the_state(model: tr.Model, tmp_path: Path) -> None:
    """Saved, restored, forked and rolled back like the memory itself."""
    session = model.session(0.0, Editor(optimizer="adagrad", chunk=3))
    session.append(b"some words to learn from, some words")
    session.save(tmp_path / "a.memory")
    mark, restored = session.snapshot(), model.load_session(tmp_path / "a.memory")
    assert mark.arrays["editor.energy"].max() > 0
    assert_same_snapshot(restored.snapshot(), mark)
    more = b"some words to learn from"
    expected = session.append(more)
    assert not np.array_equal(session.snapshot().arrays["editor.energy"], mark.arrays["editor.energy"])
    for twin in (restored, restored_from(model, mark)):
        assert np.array_equal(twin.append(more), expected)
    session.restore(mark)
    assert np.array_equal(session.append(more), expected)
    before = session.snapshot()
    session._editing.readout._keys.dense[:] = 0  # type: ignore[union-attr]
    session._editing.readout._scored[0, 0, 0] = np.nan  # type: ignore[union-attr]
    with pytest.raises(tr.NumericsError):
        session.append(more)
    np.testing.assert_array_equal(session.snapshot().arrays["editor.energy"], before.arrays["editor.energy"])


def restored_from(model: tr.Model, mark: tr.Snapshot) -> tr.Session:
    """A new session, with no editor of its own, that takes up ``mark``."""
    session = model.session(0.0, None)
    session.restore(mark)
    return session


def test_a_memory_without_its_sums_is_refused(model: tr.Model, tmp_path: Path) -> None:
    session = model.session(0.0, Editor(optimizer="adagrad"))
    session.append(b"words")
    mark = session.snapshot()
    mark.arrays.pop("editor.energy")
    save_snapshot(mark, tmp_path / "a.memory")
    with pytest.raises(tr.StateError, match=r"editor\.energy is missing"):
        model.load_session(tmp_path / "a.memory")

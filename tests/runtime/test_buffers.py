"""Two sets of state: what a graph reads it never writes, and what a failed call returns to stays whole."""

from __future__ import annotations

import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.streams import Array
from titans_runtime.buffers import StateBuffers


@pytest.fixture
def buffers(model: tr.Model) -> StateBuffers:
    return StateBuffers(model.manifest, model.initial)


def _fill(arrays: dict[str, Array], value: int) -> None:
    for array in arrays.values():
        array.fill(value)


def _values(buffers: StateBuffers) -> set[float]:
    return {float(value) for array in buffers.past.values() for value in np.unique(array)}


def test_a_new_stream_holds_the_initial_values(model: tr.Model, buffers: StateBuffers) -> None:
    assert list(buffers.past) == [entry.name for entry in model.manifest.state]
    for entry in model.manifest.state:
        assert buffers.past[entry.name].shape == (1, *entry.row_shape)
        assert (buffers.past[entry.name] == entry.initial).all()


def test_the_model_reads_one_set_and_writes_the_other(buffers: StateBuffers) -> None:
    for _ in range(3):
        past, spare = buffers.past, buffers.spare
        assert set(past) - set(spare) == {"readout"}, "the model does not write what its editor changes"
        for one in past.values():
            assert not any(np.shares_memory(one, other) for other in spare.values())
        buffers.swap()
        assert all(buffers.past[name] is spare[name] for name in spare)


def test_one_run_is_undone_without_a_copy(buffers: StateBuffers) -> None:
    before = buffers.past
    buffers.hold(runs=1)
    _fill(buffers.spare, 7)
    buffers.swap()
    buffers.rewind()
    assert all(buffers.past[name] is before[name] for name in before)
    assert _values(buffers) == {0.0}


@pytest.mark.parametrize("runs", [2, 3, 4])
def test_several_runs_are_undone(buffers: StateBuffers, runs: int) -> None:
    buffers.hold(runs)
    for run in range(runs):
        _fill(buffers.spare, run + 1)
        buffers.swap()
    assert runs in _values(buffers)
    buffers.rewind()
    assert _values(buffers) == {0.0}


def test_edited_rows_are_undone(buffers: StateBuffers) -> None:
    buffers.hold(runs=1)
    held = buffers.readout
    for rows in ([1, 5], [5, 2], [0]):
        buffers.edit_readout(np.array(rows))[rows] += 1
    assert held[0, :6, 0].tolist() == [1, 1, 1, 0, 0, 2], "edits are made in place"
    buffers.rewind()
    assert buffers.readout is held
    assert not held.any()


def test_each_call_holds_the_readout_memory_that_it_found(buffers: StateBuffers) -> None:
    rows = np.arange(buffers.readout.shape[1])
    for value in (1, 2, 3):
        buffers.hold(runs=1)
        buffers.edit_readout(rows)[rows] = value
        buffers.hold(runs=1)
        buffers.edit_readout(rows[::2])[rows[::2]] = -1
        buffers.rewind()
        assert (buffers.readout == value).all()


def test_restoring_is_undone_like_everything_else(model: tr.Model, buffers: StateBuffers) -> None:
    session = model.session()
    session.append(b"something")
    arrays = session.snapshot().arrays
    buffers.hold(runs=0)
    buffers.restore(arrays)
    for name, array in buffers.past.items():
        assert np.array_equal(array, arrays[f"state.{name}"])
    buffers.rewind()
    assert _values(buffers) == {0.0}

"""A model gives sessions: with the recommended editing, or with what is asked for where that can be meant."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import titans_runtime as tr
from titans_runtime.editor import Editor
from titans_runtime.model import checked_edit


def test_a_session_begins_as_the_manifest_recommends(model: tr.Model) -> None:
    session = model.session()
    assert session.edit == (0.5, 0.5)
    assert session.editor == Editor("readout", 0.5, 4)


def test_a_scalar_edit_holds_for_every_layer(model: tr.Model) -> None:
    scalar = model.session(0.25, None).append(b"one number")
    layers = model.session([0.25, 0.25], None).append(b"one number")
    array = model.session(np.array([0.25, 0.25]), None).append(b"one number")
    assert np.array_equal(scalar, layers)
    assert np.array_equal(scalar, array)


def test_each_layer_has_its_own_edit(model: tr.Model) -> None:
    rows = [model.session(edit, None).append(b"a word or two") for edit in ([1, 0], [0, 1], [0, 0])]
    for one, other in itertools.combinations(rows, 2):
        assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (-0.1, "edit is -0.1; it must lie between 0 and 1"),
        (1.5, "edit is 1.5"),
        (math.nan, "edit is nan"),
        ([0.5, 2], "edit is 2.0"),
        ([0.5], "edit has 1 values; the model has 2 layers"),
        ([0.5] * 3, "edit has 3 values; the model has 2 layers"),
        ([], "edit has 0 values"),
        ("high", "edit is 'high'; it must be a number from 0 to 1, or one per layer"),
        (None, "edit is None; it must be a number"),
        ([[0.5, 0.5]], "it must be a number"),
    ],
)
def test_an_edit_that_cannot_be_meant_is_refused(model: tr.Model, edit: object, message: str) -> None:
    with pytest.raises(tr.UsageError, match=message.replace("[", r"\[")):
        model.session(edit, None)


@given(strength=st.floats(0, 1), layers=st.integers(0, 5))
def test_checked_edit_gives_one_strength_a_layer(strength: float, layers: int) -> None:
    assert checked_edit(strength, layers) == (strength,) * layers
    assert checked_edit([strength] * layers, layers) == (strength,) * layers

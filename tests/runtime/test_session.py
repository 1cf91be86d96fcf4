"""The laws of a session: cuts and causality."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import titans_runtime as tr
from tests.runtime.streams import (
    EDITORS,
    LONG,
    append_parts,
    cuts,
    relative_error,
    streams,
)
from titans_runtime.editor import Editor
from titans_runtime.forward import SEGMENT

WORST_CASE = 1e-4
"""What a search for the worst stream may find. For b"\\x15$" the first read from the memory is all but
zero (rms 1e-4) before it is normalised: the cut at 1 makes a difference of 3e-5, eager PyTorch in float32
is 4e-5 off float64, and half a unit in the last place of the weights moves the exact logits by 8e-5."""
editors = st.sampled_from(EDITORS)


@given(data=st.data(), text=streams, editor=editors, edit=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_cuts_of_a_stream_do_not_matter(
    model: tr.Model, data: st.DataObject, text: bytes, editor: Editor | None, edit: float
) -> None:
    places = data.draw(cuts(len(text)))
    whole = model.session(edit, editor).append(text)
    assert relative_error(append_parts(model.session(edit, editor), text, places), whole) <= WORST_CASE


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("edit", [0.0, 0.5, 1.0])
def test_the_cuts_of_random_streams_do_not_matter(
    model: tr.Model, editor: Editor | None, edit: float
) -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        text = generator.bytes(40)
        places = sorted(generator.choice(np.arange(1, 40), 5, replace=False).tolist())
        whole = model.session(edit, editor).append(text)
        assert relative_error(append_parts(model.session(edit, editor), text, places), whole) <= 1e-5


@pytest.mark.parametrize("editor", EDITORS)
def test_cuts_of_input_longer_than_a_segment_do_not_matter(model: tr.Model, editor: Editor | None) -> None:
    whole = model.session(0.5, editor).append(LONG)
    assert whole.shape == (len(LONG), 256)
    cut = append_parts(model.session(0.5, editor), LONG, [1, 300, SEGMENT + 1, SEGMENT + 3])
    assert relative_error(cut, whole) <= 1e-5


@given(data=st.data(), text=streams, editor=editors)
def test_later_tokens_change_no_earlier_row(
    model: tr.Model, data: st.DataObject, text: bytes, editor: Editor | None
) -> None:
    places = data.draw(cuts(len(text)))
    known = data.draw(st.integers(1, len(text) - 1))
    rest = data.draw(st.binary(min_size=len(text) - known, max_size=len(text) - known))
    one = append_parts(model.session(0.5, editor), text, places)
    other = append_parts(model.session(0.5, editor), text[:known] + rest, places)
    assert one[:known].tobytes() == other[:known].tobytes()


@given(data=st.data(), text=streams, editor=editors)
def test_later_bytes_change_no_earlier_score(
    model: tr.Model, data: st.DataObject, text: bytes, editor: Editor | None
) -> None:
    known = data.draw(st.integers(1, len(text) - 1))
    rest = data.draw(st.binary(min_size=len(text) - known, max_size=len(text) - known))
    one = tr.score(model.session(0.5, editor), text).bits
    other = tr.score(model.session(0.5, editor), text[:known] + rest).bits
    assert one[:known].tobytes() == other[:known].tobytes()


def test_editing_changes_what_is_predicted(model: tr.Model) -> None:
    """Without this, the laws above could hold because nothing happens."""
    plain, fused, opened = (
        model.session(edit, editor).append(LONG[:30])
        for edit, editor in ((0.0, None), (1.0, None), (0.0, Editor(step=0.5)))
    )
    assert relative_error(fused, plain) > 1e-3
    assert relative_error(opened, plain) > 1e-3
    assert np.array_equal(opened[:4], plain[:4]), "no prediction of the first period knows an edit"


def test_position_counts_tokens_and_last_logits_are_the_last_row(model: tr.Model) -> None:
    session = model.session()
    assert session.last_logits is None
    for text, position in ((b"abc", 3), (b"d", 4), (b"efgh", 8)):
        logits = session.append(text)
        assert session.position == position
        assert np.array_equal(session.last_logits, logits[-1])
    session.last_logits.fill(0)
    assert session.last_logits.any(), "the caller's copy is not the session's"


def test_rows_that_were_returned_stay_as_they_are(model: tr.Model) -> None:
    session = model.session()
    logits = [session.append(text) for text in (b"a", b"bcdefg", b"h")]
    before = [rows.copy() for rows in logits]
    session.append(b"something else")
    for rows, copy in zip(logits, before, strict=True):
        assert np.array_equal(rows, copy)


def test_every_form_of_tokens_gives_the_same_logits(model: tr.Model) -> None:
    text = b"the same tokens"
    expected = model.session().append(text)
    for form in (list(text), bytearray(text), np.frombuffer(text, np.uint8), np.array(list(text))):
        assert np.array_equal(model.session().append(form), expected)

"""Bits per token against a plain log-softmax."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

import titans_runtime as tr
from tests.runtime.streams import Array, streams
from titans_runtime.forward import SEGMENT
from titans_runtime.scoring import segment_starts


def _bits(logits: Array, targets: bytes) -> Array:
    rows = logits.astype(np.float64)
    total = np.log2(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1) / np.log(2)
    return total - rows[np.arange(len(targets)), list(targets)] / np.log(2)


@given(text=streams)
def test_bits_are_those_of_the_rows_that_append_returns(model: tr.Model, text: bytes) -> None:
    score = tr.score(model.session(), text)
    expected = _bits(model.session().append(text)[:-1], text[1:])
    np.testing.assert_allclose(score.bits[1:], expected, rtol=1e-5, atol=1e-5)
    assert score.bits_per_token == pytest.approx(score.bits.mean(), rel=1e-6)


def test_the_first_byte_of_a_new_stream_costs_eight_bits(model: tr.Model) -> None:
    assert tr.score(model.session(), b"a").bits == pytest.approx([8.0])


def test_a_stream_goes_on_where_the_last_score_ended(model: tr.Model) -> None:
    whole = tr.score(model.session(), b"cut in two").bits
    session = model.session()
    halves = [tr.score(session, text).bits for text in (b"cut i", b"n two")]
    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-4)


def test_text_longer_than_a_segment_is_scored_whole(model: tr.Model) -> None:
    text = bytes(np.random.default_rng(1).integers(97, 123, 2 * SEGMENT + 1, dtype=np.uint8))
    seen = []
    session = model.session()
    bits = tr.score(session, text, (seen.append(start) or start for start in segment_starts(len(text)))).bits
    assert seen == [0, SEGMENT, 2 * SEGMENT]
    assert session.position == len(text)
    expected = _bits(model.session().append(text)[:-1], text[1:])
    np.testing.assert_allclose(bits[1:], expected, rtol=1e-4)


def test_an_empty_text_is_refused(model: tr.Model) -> None:
    with pytest.raises(tr.TokenError, match="no tokens"):
        tr.score(model.session(), b"")


def test_throughput_counts_every_token() -> None:
    assert tr.Score(np.ones(10, np.float32), 2.0).tokens_per_second == 5.0

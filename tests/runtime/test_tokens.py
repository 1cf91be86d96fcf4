"""Token input that cannot be meant is refused with what, where and limit; the session stays as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.streams import assert_same_snapshot
from titans_runtime import Editor, Model, TokenError
from titans_runtime.tokens import checked_tokens, checked_vectors

BAD = {
    "negative": ([1, -1], "token -1 at index 1; ids run from 0 to 255"),
    "beyond": ([0, 3, 256], "token 256 at index 2; ids run from 0 to 255"),
    "beyond int64": ([2**63], f"token {2**63} at index 0; ids run from 0 to 255"),
    "beyond any integer": ([2**70], "tokens are of type object; expected integers"),
    "float": ([1.0, 2.0], "tokens are of type float64; expected integers"),
    "NaN": ([float("nan")], "tokens are of type float64; expected integers"),
    "float16": (np.zeros(3, np.float16), "tokens are of type float16; expected integers"),
    "bool": ([True, False], "tokens are of type bool; expected integers"),
    "bool among integers": ([1, True], "tokens are of type bool; expected integers"),
    "NumPy bool among integers": ((1, np.True_), "tokens are of type bool; expected integers"),
    "rank 2": (np.zeros((1, 3), np.int64), "tokens have 2 axes; expected one"),
    "rank 0": (np.int64(3), "tokens have 0 axes; expected one"),
    "ragged": ([[1], [2, 3]], "tokens are rows of different lengths; expected one axis"),
    "empty list": ([], "no tokens; give at least one"),
    "empty bytes": (b"", "no tokens; give at least one"),
    "text": ("abc", "tokens are text; encode it first"),
    "empty text": ("", "tokens are text; encode it first"),
    "None": (None, "tokens have 0 axes; expected one"),
}


@pytest.mark.parametrize(("tokens", "message"), BAD.values(), ids=BAD.keys())
def test_bad_tokens_are_refused_and_change_nothing(model: Model, tokens: object, message: str) -> None:
    session = model.session()
    session.append(b"before")
    before = session.snapshot()
    calls: dict[str, Callable[[Any], object]] = {
        "append": session.append,
        "observe": session.observe,
        "observe by another editor": lambda t: session.observe(t, Editor("prediction", step=0.1)),
        "prepare": lambda t: session.prepare(t, passes=2),
        "a prompt": lambda t: session.generate(1, prompt=t),
    }
    if tokens is None:
        del calls["a prompt"]  # there is none
    for name, call in calls.items():
        with pytest.raises(TokenError, match=re.escape(message)):
            call(tokens)
        assert_same_snapshot(session.snapshot(), before), name
    other = model.session()
    with model.batch([session, other]) as batch, pytest.raises(TokenError, match=re.escape(message)):
        batch.append([tokens, b"fine"])  # type: ignore[list-item]
    assert_same_snapshot(session.snapshot(), before)
    assert other.position == 0


@given(ids=st.lists(st.integers(-300, 300), min_size=1, max_size=20), vocab=st.integers(1, 300))
def test_exactly_the_ids_of_the_vocabulary_pass(ids: list[int], vocab: int) -> None:
    bad = [i for i, token in enumerate(ids) if not 0 <= token < vocab]
    if bad:
        with pytest.raises(TokenError, match=f"token {ids[bad[0]]} at index {bad[0]};"):
            checked_tokens(ids, vocab)
    else:
        assert checked_tokens(ids, vocab).tolist() == ids


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, ">i4"])
def test_any_integer_type_gives_new_int64_ids(dtype: npt.DTypeLike) -> None:
    given_ids = np.array([0, 5, 127], dtype)
    ids = checked_tokens(given_ids, 256)
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 5, 127]
    assert not np.shares_memory(ids, given_ids)


def test_int64_ids_are_copied() -> None:
    given_ids = np.array([1, 2])
    assert not np.shares_memory(checked_tokens(given_ids, 256), given_ids)


@given(text=st.binary(min_size=1))
def test_bytes_lists_and_arrays_are_the_same_tokens(text: bytes) -> None:
    for form in (bytearray(text), list(text), tuple(text), np.frombuffer(text, np.uint8), memoryview(text)):
        assert checked_tokens(form, 256).tolist() == checked_tokens(text, 256).tolist()


def test_vectors_are_copied_as_float32() -> None:
    given = np.arange(6.0).reshape(2, 3)
    vectors = checked_vectors(given, 3)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, given)
    assert checked_vectors(given.astype(np.float32), 3) is not given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2, 3], "of type int64; expected floats, \\(T, 3\\)"),
        (b"abc", "expected floats"),
        (np.zeros(3), "have shape \\(3,\\); expected \\(T, 3\\)"),
        (np.zeros((2, 4)), "have shape \\(2, 4\\)"),
        (np.zeros((0, 3)), "no vectors"),
        ([[1.0, 2.0], [3.0]], "rows of different lengths"),
        ([[0.0, 0.0, 0.0], [0.0, np.nan, 0.0]], "vector 1 holds values that are not finite"),
        ([[1e300, 0.0, 0.0]], "vector 0 holds values that are not finite"),
    ],
)
def test_what_is_no_sequence_of_vectors_is_refused(given: object, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        checked_vectors(given, 3)

"""Token ids as callers give them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from titans_runtime.errors import TokenError

Tokens = Sequence[int] | npt.NDArray[np.integer] | bytes | bytearray
"""Ids as a sequence or an integer array of rank 1; ``bytes`` are ids of a byte vocabulary."""


def checked_tokens(tokens: Tokens, vocab_size: int) -> npt.NDArray[np.int64]:
    """Ids as a new ``(T,)`` int64 array. ONNX Runtime itself wraps negative ids silently.

    Raises:
        TokenError: empty, not of rank 1, not integers, or an id outside ``0 … vocab_size - 1``.
    """
    if isinstance(tokens, list | tuple) and any(isinstance(token, bool | np.bool) for token in tokens):
        raise TokenError("tokens are of type bool; expected integers")  # NumPy would mix 1 and 0 in
    try:
        given = (
            np.frombuffer(tokens, np.uint8) if isinstance(tokens, bytes | bytearray) else np.asarray(tokens)
        )
    except ValueError:
        raise TokenError("tokens are rows of different lengths; expected one axis, (T,)") from None
    if given.dtype.kind == "U":
        raise TokenError("tokens are text; encode it first, as in text.encode()")
    if given.size == 0:
        raise TokenError("no tokens; give at least one")
    if given.ndim != 1:
        raise TokenError(f"tokens have {given.ndim} axes; expected one, (T,)")
    if given.dtype.kind not in "iu":
        raise TokenError(f"tokens are of type {given.dtype.name}; expected integers")
    outside = (given < 0) | (given >= vocab_size)
    if outside.any():
        index = int(outside.argmax())
        raise TokenError(f"token {int(given[index])} at index {index}; ids run from 0 to {vocab_size - 1}")
    return given.astype(np.int64)

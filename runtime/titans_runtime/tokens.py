"""What callers give a model to see: token ids, or vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from titans_runtime.errors import TokenError
from titans_runtime.manifest import Manifest

Tokens = Sequence[int] | npt.NDArray[np.integer | np.floating] | bytes | bytearray
"""Ids as a sequence or an integer array of rank 1; ``bytes`` are ids of a byte vocabulary. For a model
without a vocabulary, an array of vectors ``(T, width)``."""


def checked_input(tokens: Tokens, manifest: Manifest) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
    """What a model takes, as a new array: ids ``(T,)`` int64, or vectors ``(T, width)`` float32.

    Raises:
        TokenError: see :func:`checked_tokens` and :func:`checked_vectors`.
    """
    if manifest.tokenizer == "vectors":
        return checked_vectors(tokens, int(manifest.sequence.shape[-1]))
    return checked_tokens(tokens, manifest.vocab_size)


def checked_vectors(vectors: object, width: int) -> npt.NDArray[np.float32]:
    """Vectors as a new ``(T, width)`` float32 array.

    Raises:
        TokenError: empty, not of shape ``(T, width)``, not floating-point, or not finite.
    """
    try:
        given = np.asarray(vectors)
    except ValueError:
        raise TokenError(f"vectors are rows of different lengths; expected (T, {width})") from None
    if given.dtype.kind != "f":
        raise TokenError(f"vectors are of type {given.dtype.name}; expected floats, (T, {width})")
    if given.ndim != 2 or given.shape[1] != width:
        raise TokenError(f"vectors have shape {given.shape}; expected (T, {width})")
    if len(given) == 0:
        raise TokenError("no vectors; give at least one")
    with np.errstate(over="ignore"):  # float64 that float32 cannot hold is infinite, and refused as such
        array = given.astype(np.float32)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise TokenError(f"vector {int(finite.argmin())} holds values that are not finite")
    return array


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

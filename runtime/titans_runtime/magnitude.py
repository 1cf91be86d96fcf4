"""What of a memory float32 can work with."""

from __future__ import annotations

import math

import numpy as np

from titans_runtime.backends import Array

NOT_FINITE, TOO_LARGE = "not finite", "too large for float32"


def fault(array: Array) -> str:
    """Why a model must not go on with a memory: :data:`NOT_FINITE`, :data:`TOO_LARGE` or nothing.

    What is read of a memory is normalised by its root mean square. Past 1.8e19 the squares overflow, and
    the norm answers zero: logits that are finite, and wrong. A key has a norm of one, so no read is longer
    than the memory, and it is enough that float32 holds the memory's own sum of squares.

    Args:
        array: of any shape, float32, contiguous.
    """
    flat = array.reshape(-1)
    with np.errstate(all="ignore"):
        if math.isfinite(np.dot(flat, flat)):
            return ""
        return TOO_LARGE if np.isfinite(flat).all() else NOT_FINITE

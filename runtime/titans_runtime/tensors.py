"""Named arrays as the bytes of a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save

from titans_runtime.backends import Arrays


def tensor_bytes(arrays: Arrays, metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a safetensors file.

    The library writes an array's memory as it lies, whatever its strides say: a transposed one would
    come back in the wrong order, so every array is made contiguous first.

    Args:
        arrays: any shapes, dtypes and strides.
        metadata: texts for the file's header.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return save(contiguous, None if metadata is None else dict(metadata))

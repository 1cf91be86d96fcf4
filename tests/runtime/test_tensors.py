from __future__ import annotations

import json
from typing import Any

import hypothesis.extra.numpy as arrays_of
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from titans_runtime.tensors import tensor_bytes


@st.composite
def strided_arrays(draw: st.DrawFn) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Arrays of any rank, transposed and with steps of either sign."""
    shape = draw(arrays_of.array_shapes(min_dims=0, max_dims=4, max_side=4))
    array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    axes = draw(st.permutations(range(array.ndim)))
    steps = draw(st.lists(st.sampled_from([-2, -1, 1, 2]), min_size=array.ndim, max_size=array.ndim))
    return np.transpose(array, axes)[tuple(slice(None, None, step) for step in steps)]


@given(array=strided_arrays())
def test_an_array_comes_back_whatever_its_strides(array: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    back = load(tensor_bytes({"array": array}))["array"]
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)


def test_the_header_carries_texts() -> None:
    content = tensor_bytes({"array": np.zeros(2, np.int64)}, {"key": "text"})
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length])["__metadata__"] == {"key": "text"}

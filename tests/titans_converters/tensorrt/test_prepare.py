"""The graph for TensorRT's parser computes what the bundle's does."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.titans_converters.test_function import _model
from tests.titans_export.memory_inputs import MemoryCase
from titans_converters import memory_op
from titans_converters.tensorrt.prepare import prepare


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_results_are_the_same_bit_for_bit(tokens: int) -> None:
    case = MemoryCase(tokens, 1, "random", "random", "random", repeated_keys=False, edit=(1.0, 0.0))
    feeds = {name: np.ascontiguousarray(tensor.float().numpy()) for name, tensor in case.tensors().items()}
    exported = _model(8)
    results = [
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, feeds
        )
        for model in (exported, prepare(exported))
    ]
    for name, expected, actual in zip(memory_op.OUTPUTS, *results, strict=True):
        assert np.array_equal(expected, actual), name


def test_the_bundles_own_graph_is_left_alone_and_the_new_one_is_valid() -> None:
    model = _model(8)
    before = model.SerializeToString(deterministic=True)
    prepared = prepare(model)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(prepared)

"""Sinkhorn's iteration as an ONNX function, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from titans_converters import memory_op
from titans_converters.onnx.function import OPSET
from titans_converters.onnx.sinkhorn import NAME, sinkhorn_function


def _run(logits: npt.NDArray[np.float32], iterations: int) -> npt.NDArray[np.float32]:
    size = logits.shape[-1]
    node = helper.make_node(NAME, ["x"], ["y"], domain=memory_op.DOMAIN, size=size, iterations=iterations)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, size, size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None, size, size])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(memory_op.DOMAIN, memory_op.VERSION)]
    function = sinkhorn_function(size, iterations)
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    result: npt.NDArray[np.float32] = session.run(None, {"x": logits})[0]
    return result


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("tokens", [1, 7])
def test_columns_and_rows_are_divided_by_their_sums_in_turn(size: int, iterations: int, tokens: int) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, tokens, size, size)).astype(np.float32)
    expected = np.exp(logits.astype(np.float64))
    for _ in range(iterations):
        expected /= expected.sum(-2, keepdims=True)
        expected /= expected.sum(-1, keepdims=True)
    assert np.abs(_run(logits, iterations) - expected).max() <= 1e-5


def test_large_logits_stay_finite() -> None:
    logits = np.full((1, 1, 4, 4), -200.0, np.float32)
    logits[0, 0] += 400 * np.eye(4, dtype=np.float32)
    assert np.allclose(_run(logits, 20)[0, 0], np.eye(4), atol=1e-5)

"""Quantised matrices: what is stored is what was rounded, and products with it are what they should be."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from titans_converters.onnx.quantize import BLOCK, CONTRIB, FLOAT_PRODUCTS, QuantisedRows

STEPS = {"int8": 127, "int4": 7}


def _matrix(outputs: int, inputs: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


@pytest.mark.parametrize("weights", STEPS)
def test_rounding_moves_a_weight_by_half_a_step_of_its_block(weights: str) -> None:
    matrix = _matrix(6, 3 * BLOCK)
    rounded = QuantisedRows(weights).round(matrix)
    blocks = np.abs(matrix).reshape(6, 3, BLOCK).max(-1, keepdims=True)
    error = np.abs(rounded - matrix).reshape(6, 3, BLOCK)
    assert 0 < (error / blocks).max() <= 0.51 / STEPS[weights] * (8 / 7)


def _graph(weight: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> onnx.ModelProto:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    tensors = {"weight": weight.T, "other": other.T}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], [f"y_{name}"]) for name in tensors],
        "products",
        [helper.make_tensor_value_info("x", kind, [1, "tokens", weight.shape[1]])],
        [helper.make_tensor_value_info(f"y_{name}", kind, None) for name in tensors],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(x), name) for name, x in tensors.items()],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


@pytest.mark.parametrize("weights", STEPS)
@pytest.mark.parametrize("inputs", [BLOCK, 3 * BLOCK])
def test_products_are_those_of_the_rounded_matrix(weights: str, inputs: int) -> None:
    """Rows of two matrices, joined after they were rounded; activations in float32."""
    rows = QuantisedRows(weights)
    joined = np.concatenate([rows.round(_matrix(5, inputs, 1)), rows.round(_matrix(4, inputs, 2))])
    other = _matrix(3, inputs, 3)
    model = _graph(joined, other)
    assert rows.replace_products(model.graph, FLOAT_PRODUCTS) == 1
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits", "MatMul"]
    assert {tensor.name for tensor in model.graph.initializer} == {"other", "weight.codes", "weight.scales"}
    x = np.random.default_rng(4).standard_normal((1, 7, inputs)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    product, kept = session.run(None, {"x": x})
    np.testing.assert_allclose(product, x @ joined.T, atol=2e-5)
    np.testing.assert_allclose(kept, x @ other.T, atol=2e-5)


def test_a_matrix_with_one_foreign_row_is_left_alone() -> None:
    rows = QuantisedRows("int8")
    matrix = rows.round(_matrix(5, BLOCK))
    matrix[3, 0] += 1e-3
    model = _graph(matrix, _matrix(2, BLOCK, 1))
    assert rows.replace_products(model.graph) == 0
    assert [node.op_type for node in model.graph.node] == ["MatMul", "MatMul"]


def test_quantising_leaves_the_log_alone() -> None:
    before = list(logging.getLogger().handlers), logging.getLogger().level
    QuantisedRows("int8").round(_matrix(1, BLOCK))
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before

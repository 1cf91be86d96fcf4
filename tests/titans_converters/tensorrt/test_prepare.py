"""The graph for TensorRT's parser computes what the bundle's does."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.titans_converters.test_function import _model
from tests.titans_export.memory_inputs import MemoryCase
from titans_converters import memory_op
from titans_converters.onnx.recurrence import KEPT
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


_RECURRENCE = """
<ir_version: 10, opset_import: ["": 23, "titans": 1]>
model (float[B, H, T, D] token_0, float[B, H, E, D] past_0)
  => (float[B, H, T, D] output, float[B, H, E, D] present) {
    output, present = titans.Toy (token_0, past_0)
}
<domain: "titans", opset_import: ["": 23]>
Toy (token_0, past_0) => (output, present) {
    shape = Shape <start = 2, end = 3> (token_0)
    one = Constant <value_ints = [1]> ()
    equal = Equal (shape, one)
    single = Squeeze (equal)
    output, present = If (single) <
        then_branch = one_token () => (float[B, H, T, D] y, float[B, H, E, D] m) {
            m = Add (past_0, token_0)
            axes = Constant <value_ints = [2]> ()
            y = ReduceSum <keepdims = 1> (m, axes)
        },
        else_branch = tiles () => (float[B, H, T, D] kept_token_0, float[B, H, E, D] tiles_m) {
            zero = Constant <value_ints = [0]> ()
            batch = Shape <end = 1> (token_0)
            kept_token_0 = Slice (token_0, zero, batch, zero)
            tiles_m = Identity (past_0)
        }
    >
}
"""


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_recurrence_takes_any_number_of_tokens_in_both_branches(tokens: int) -> None:
    text = onnx.parser.parse_model(_RECURRENCE).SerializeToString()  # its language knows no dots in names
    exported = onnx.load_from_string(text.replace(b"kept_token_0", f"{KEPT}token_0".encode()))
    prepared = prepare(exported)
    generator = np.random.default_rng(0)
    feeds = {"token_0": (2, 3, tokens, 4), "past_0": (2, 3, 5, 4)}
    arrays = {name: generator.normal(size=shape).astype(np.float32) for name, shape in feeds.items()}
    results = [
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, arrays
        )
        for model in (exported, prepared)
    ]
    for expected, actual in zip(*results, strict=True):
        assert np.array_equal(expected, actual)
    one_token, tiles = (attribute.g for attribute in prepared.functions[0].node[-1].attribute)
    assert [node.op_type for node in one_token.node].count("Slice") == 1
    assert one_token.node[-1].op_type == "Expand"
    assert "Slice" not in [node.op_type for node in tiles.node]

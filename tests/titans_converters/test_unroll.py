"""Unrolled graphs: standard operators alone, which compute what the function body and the rule do."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.titans_converters.test_lowering import _inputs, _program
from titans_converters.onnx.trace import memory_node, to_proto, trace
from titans_converters.onnx.unroll import unroll
from titans_export.memory import token_loop
from titans_runtime.errors import UsageError

TOKENS = (1, 5, 8, 19)  # a token, a part of a tile, a tile, two and a part
GATES = ("lively", "shut", "open", "no step")


@functools.cache
def _traced() -> ir.Model:
    return trace(_program(memory_node))


@functools.cache
def _sessions(tokens: int) -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    def session(model: ir.Model) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(
            to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )

    return session(_traced()), session(unroll(_traced(), tokens))


@pytest.mark.parametrize("tokens", TOKENS)
def test_nothing_but_standard_operators_is_left(tokens: int) -> None:
    proto = to_proto(unroll(_traced(), tokens))
    onnx.checker.check_model(proto, full_check=True)
    assert not proto.functions
    assert [opset.domain for opset in proto.opset_import] == [""]
    for node in proto.graph.node:
        assert node.domain == ""
        assert not any(item.type == onnx.AttributeProto.GRAPH for item in node.attribute)
    batch, _, count, _ = next(
        info for info in proto.graph.input if info.name == "query"
    ).type.tensor_type.shape.dim
    assert (batch.dim_param, count.dim_value) == ("batch", tokens)


def test_the_model_itself_is_left_as_it_is() -> None:
    before = to_proto(_traced()).SerializeToString(deterministic=True)
    unroll(_traced(), 5)
    assert to_proto(_traced()).SerializeToString(deterministic=True) == before


@settings(max_examples=60)
@given(tokens=st.sampled_from(TOKENS), gates=st.sampled_from(GATES), seed=st.integers(0, 2**20))
def test_it_is_the_function_and_the_rule(tokens: int, gates: str, seed: int) -> None:
    """Rows with λ of 0, 0.37 and 1 in one batch, from a filled memory."""
    inputs = _inputs(tokens, gates, seed)
    feeds = {name: x.numpy() for name, x in inputs.items()}
    results = [session.run(None, feeds) for session in _sessions(tokens)]
    oracle = token_loop(*(tensor.double() for tensor in inputs.values()))
    for whole, unrolled, exact in zip(*results, oracle, strict=True):
        scale = max(float(exact.abs().max()), 1.0)
        np.testing.assert_allclose(unrolled, whole, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(unrolled, exact.numpy(), rtol=0, atol=1e-4 * scale)


_CHOICE = """
<ir_version: 10, opset_import: ["": 23]>
choice (float[batch, tokens] x) => (float[batch, tokens] y) {
    total = ReduceSum<keepdims = 0>(x)
    zero = Constant<value_float = 0.0>()
    positive = Greater(total, zero)
    y = If (positive) <
        then_branch = doubled () => (float[batch, tokens] a) { a = Add(x, x) },
        else_branch = negated () => (float[batch, tokens] b) { b = Neg(x) }
    >
}
"""
_LOOP = """
<ir_version: 10, opset_import: ["": 23]>
loop (float[batch, tokens] x) => (float[batch, tokens] y) {
    total = ReduceSum<keepdims = 0>(x)
    times = Cast<to = 7>(total)
    yes = Constant<value = bool {1}>()
    y = Loop (times, yes, x) <
        body = twice (int64 i, bool c, float[batch, tokens] s) => (bool go, float[batch, tokens] t) {
            go = Identity(c)
            t = Add(s, s)
        }
    >
}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_CHOICE, "whether doubled or negated runs depends on data"),
        (_LOOP, "a Loop, whose end depends on data"),
    ],
)
def test_what_depends_on_data_is_refused_by_name(text: str, message: str) -> None:
    model = ir.from_proto(onnx.parser.parse_model(text))
    with pytest.raises(UsageError, match=message):
        unroll(model, 4)


def test_an_operator_of_another_domain_is_refused_by_name() -> None:
    text = _CHOICE.replace('["": 23]', '["": 23, "com.microsoft": 1]')
    start, end = text.index("total ="), text.rindex("}")
    text = text[:start] + "y = com.microsoft.QuickGelu(x)\n" + text[end:]
    with pytest.raises(UsageError, match=r"com\.microsoft::QuickGelu would be left"):
        unroll(ir.from_proto(onnx.parser.parse_model(text)), 4)

"""The operator's ONNX body in stock ONNX Runtime equals the token loop, whatever the gates and sizes."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from tests.titans_export.memory_inputs import MemoryCase, memory_cases, relative_error
from titans_converters import memory_op
from titans_converters.differentiation import gradient
from titans_converters.onnx.function import OPSET, neural_memory_function
from titans_export.memory import token_loop

TILES = (1, 2, 3, 5, 8, 12, 32)
_SHAPES = {
    "query": "BHTK",
    "key": "BHTK",
    "value": "BHTV",
    "log_retention": "BHT",
    "log_momentum": "BHT",
    "step": "BHT",
    "edit": "B",
    "past_memory": "BHKV",
    "past_momentum": "BHKV",
    "output": "BHTV",
    "present_memory": "BHKV",
    "present_momentum": "BHKV",
}


def _model(tile: int, momentum: bool = True) -> onnx.ModelProto:
    """One node, every axis free."""
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(_SHAPES[name])) for name in names]
        for names in (memory_op.INPUTS, memory_op.OUTPUTS)
    )
    node = helper.make_node(
        memory_op.NAME,
        memory_op.INPUTS,
        memory_op.OUTPUTS,
        domain=memory_op.DOMAIN,
        **memory_op.node_attributes(tile),
    )
    graph = helper.make_graph([node], "one_memory", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(memory_op.DOMAIN, memory_op.VERSION)]
    return helper.make_model(
        graph, functions=[neural_memory_function(tile, momentum)], opset_imports=opsets, ir_version=10
    )


@functools.cache
def _session(tile: int, momentum: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    content = _model(tile, momentum).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _assert_equals_token_loop(inputs: dict[str, Tensor], tile: int, momentum: bool = True) -> None:
    feeds = {name: np.ascontiguousarray(tensor.float().numpy()) for name, tensor in inputs.items()}
    outputs = _session(tile, momentum).run(list(memory_op.OUTPUTS), feeds)
    found = {name: torch.from_numpy(array) for name, array in zip(memory_op.OUTPUTS, outputs, strict=True)}
    exact = dict(zip(memory_op.OUTPUTS, token_loop(**inputs), strict=True))
    for name, actual in found.items():
        assert actual.shape == exact[name].shape, name
        assert torch.isfinite(actual).all(), name
    # Under gates of nearly 1 a memory of one key swings: it holds hundreds where its momentum turns around,
    # and reads of it are what momentum is made of. So their common scale is what counts.
    for state in (found, exact):
        state["present_momentum"] = torch.cat([state["present_momentum"], state["present_memory"]])
    for name, actual in found.items():
        assert relative_error(actual, exact[name]) <= 1e-4, name


@st.composite
def _cases_of_any_tile(draw: st.DrawFn) -> tuple[MemoryCase, int]:
    tile = draw(st.sampled_from(TILES))
    return dataclasses.replace(draw(memory_cases), tokens=draw(st.integers(1, 3 * tile + 1))), tile


@given(_cases_of_any_tile())
def test_body_equals_token_loop(case_and_tile: tuple[MemoryCase, int]) -> None:
    case, tile = case_and_tile
    _assert_equals_token_loop(case.tensors(), tile)


@given(_cases_of_any_tile())
def test_body_without_momentum_equals_token_loop(case_and_tile: tuple[MemoryCase, int]) -> None:
    """Of a past momentum, which such a model does not have, nothing is left after one token either way."""
    drawn, tile = case_and_tile
    case = dataclasses.replace(drawn, momentum="zero")
    _assert_equals_token_loop(case.tensors(), tile, momentum=False)


@given(
    case=memory_cases,
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 16),
    value_dim=st.integers(1, 5),
)
def test_one_session_takes_every_size(
    case: MemoryCase, batch: int, heads: int, key_dim: int, value_dim: int
) -> None:
    """Sizes of one value after the other in one session: nothing in the body remembers an axis."""
    sizes = {"B": batch, "H": heads, "T": case.tokens, "K": key_dim, "V": value_dim}
    inputs = {
        name: tensor[tuple(slice(sizes[axis]) for axis in _SHAPES[name])]
        for name, tensor in case.tensors().items()
    }
    for name in ("query", "key"):
        inputs[name] = torch.nn.functional.normalize(inputs[name], dim=-1)
    _assert_equals_token_loop(inputs, tile=8)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("edit", [0.0, 1.0])
def test_repeated_key_at_every_tile_boundary(tile: int, edit: float) -> None:
    """One key throughout, open gates, full steps: what a Neumann series loses in float32."""
    for tokens in sorted({1, 2, max(tile - 1, 1), tile, tile + 1, 2 * tile, 3 * tile + 1}):
        case = MemoryCase(tokens, 1, "near_one", "random", "one", repeated_keys=True, edit=(edit, edit))
        decay = torch.full((2, 3, tokens), 0.9, dtype=torch.float64).log()
        _assert_equals_token_loop(case.tensors() | {"log_momentum": decay}, tile)


@pytest.mark.parametrize("tokens", [1, 7, 8, 25])
def test_closed_gates(tokens: int) -> None:
    """``-inf`` in both logs: the memory forgets everything at every token, and nothing is NaN."""
    case = MemoryCase(tokens, 2, "zero", "zero", "one", repeated_keys=False, edit=(1.0, 0.0))
    _assert_equals_token_loop(case.tensors(), tile=8)


@pytest.mark.parametrize("tokens", [1, 8, 25])
def test_step_zero_leaves_the_memory_untouched(tokens: int) -> None:
    case = MemoryCase(tokens, 5, "one", "zero", "zero", repeated_keys=False, edit=(1.0, 0.0))
    inputs = {name: tensor.float().numpy() for name, tensor in case.tensors().items()}
    inputs["past_momentum"] = np.zeros_like(inputs["past_momentum"])
    memory, momentum = _session(8).run(["present_memory", "present_momentum"], inputs)
    assert np.array_equal(memory, inputs["past_memory"])
    assert np.array_equal(momentum, inputs["past_momentum"])


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("tile", TILES)
def test_checker_accepts_the_body(tile: int, momentum: bool) -> None:
    onnx.checker.check_model(_model(tile, momentum), full_check=True)


@pytest.mark.parametrize("momentum", [True, False])
def test_body_follows_the_operator_contract(momentum: bool) -> None:
    function = neural_memory_function(8, momentum)
    assert (function.domain, function.name) == (memory_op.DOMAIN, memory_op.NAME)
    assert tuple(function.input) == memory_op.INPUTS
    assert tuple(function.output) == memory_op.OUTPUTS
    assert tuple(function.attribute) == memory_op.ATTRIBUTES == tuple(memory_op.node_attributes(8))


def test_body_uses_standard_operators_only() -> None:
    function = neural_memory_function(8)
    assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", OPSET)]
    assert OPSET <= 23
    assert {node.domain for node in _all_nodes(function.node)} == {""}


def _all_nodes(nodes: object) -> list[onnx.NodeProto]:
    found = []
    for node in nodes:  # type: ignore[attr-defined]
        found.append(node)
        for attribute in node.attribute:
            found += _all_nodes(attribute.g.node)
    return found


@functools.cache
def _gradient(tile: int, momentum: bool = True) -> onnx.ModelProto:
    """By every input that counts, of waves through the outputs."""
    model = _model(tile, momentum)
    counting = [name for name in memory_op.INPUTS if momentum or not name.endswith("momentum")]
    names = {name: f"past.{name}" for name in memory_op.INPUTS}
    for info in model.graph.input:
        info.name = names[info.name]
    (node,) = model.graph.node
    node.input[:] = list(names.values())
    losses = onnx.parser.parse_graph("""
        losses (float[B, H, T, V] output, float[B, H, K, V] present_memory,
                float[B, H, K, V] present_momentum) => (float[one] loss) {
            seen_o = Sin(output)
            seen_m = Sin(present_memory)
            seen_s = Sin(present_momentum)
            o = ReduceSum<keepdims = 0>(seen_o)
            m = ReduceSum<keepdims = 0>(seen_m)
            s = ReduceSum<keepdims = 0>(seen_s)
            state = Add(m, s)
            all = Add(o, state)
            one = Constant<value_ints = [1]>()
            loss = Reshape(all, one)
        }""")
    model.graph.node.extend(losses.node)
    del model.graph.output[:]
    model.graph.output.extend(losses.output)
    return gradient(model, counting, "gradient.waves")


@functools.cache
def _gradient_session(tile: int, momentum: bool) -> ort.InferenceSession:
    content = _gradient(tile, momentum).SerializeToString()
    return ort.InferenceSession(content, providers=["CPUExecutionProvider"])


@given(_cases_of_any_tile(), st.booleans())
def test_gradient_is_that_of_the_token_loop(case_and_tile: tuple[MemoryCase, int], momentum: bool) -> None:
    """By every input, for ragged tiles and tiles that are shorter than they may be."""
    drawn, tile = case_and_tile
    gates = "random" if momentum else "zero"
    open_gates = dataclasses.replace(drawn, retention="random", momentum=gates)
    inputs = {name: tensor.requires_grad_() for name, tensor in open_gates.tensors().items()}
    loss = sum((output.sin().sum() for output in token_loop(**inputs)), torch.zeros(()))
    expected = torch.autograd.grad(loss, list(inputs.values()))
    feeds = {f"past.{name}": tensor.detach().float().numpy() for name, tensor in inputs.items()}
    session = _gradient_session(tile, momentum)
    taken = {value.name: np.ascontiguousarray(feeds[value.name]) for value in session.get_inputs()}
    found = dict(zip((value.name for value in session.get_outputs()), session.run(None, taken), strict=True))
    for name, exact in zip(inputs, expected, strict=True):
        if momentum or not name.endswith("momentum"):
            assert relative_error(torch.from_numpy(found[f"grad.{name}"]), exact) <= 1e-4, name
        else:  # nothing hangs on it
            assert not exact.any(), name


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 1), (4, 4), (32, 32), (33, 17), (40, 20), (64, 32), (65, 22)]
)
def test_a_call_takes_as_few_tiles_as_hold_it_all_of_one_length(tokens: int, length: int) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(_gradient(32))
    model.graph.output.append(helper.make_tensor_value_info("c__1", TensorProto.INT64, [1]))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    case = MemoryCase(tokens, 1, "random", "random", "one", repeated_keys=False, edit=(1.0, 0.0))
    given = {f"past.{name}": np.ascontiguousarray(x.float().numpy()) for name, x in case.tensors().items()}
    taken = {value.name: given[value.name] for value in session.get_inputs()}
    assert session.run(["c__1"], taken)[0].tolist() == [length]


@pytest.mark.parametrize("momentum", [True, False])
def test_gradient_goes_by_what_the_body_computes(momentum: bool) -> None:
    """Not through the steps of the inverse, and without looking for sizes while it runs."""
    nodes = _gradient(32, momentum).graph.node
    masks = {node.output[0] for node in nodes if node.output[0].startswith("mask_")}
    users = [name for node in nodes for name in node.input if name in masks]
    assert len(masks) == len(users) == 5
    kinds = [node.op_type for node in nodes]
    assert "NonZero" not in kinds
    assert kinds.count("ScatterND") == 1 + (not momentum)  # of the outputs' rows, and of the last write's


def test_without_momentum_its_inputs_are_not_read() -> None:
    nodes = _all_nodes(neural_memory_function(8, momentum=False).node)
    assert not {"log_momentum", "past_momentum"} & {name for node in nodes for name in node.input}

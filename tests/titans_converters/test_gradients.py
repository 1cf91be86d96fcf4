"""Gradients of graphs: every derivative against differences, a memory of one's own against autograd."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from titans_converters.differentiation import gradient
from titans_converters.memory import memory_answer, memory_gradient
from titans_converters.onnx.autodiff import RULES

ROOT = Path(__file__).resolve().parents[2]
Array = np.ndarray[Any, Any]

# Each a text of nodes from x (2, 3, 4) and w (4, 4), whose result y is weighed and summed.
CASES = {
    "Add, spread": "b = ReduceSum<keepdims = 0>(x, ax01)\ny = Add(x, b)",
    "Sub": "b = ReduceSum<keepdims = 1>(x, ax2)\ny = Sub(b, x)",
    "Mul": "b = ReduceMean<keepdims = 1>(x, ax2)\ny = Mul(x, b)",
    "Div": "a = Exp(x)\nb = ReduceSum<keepdims = 1>(a, ax2)\ny = Div(a, b)",
    "Max and Min": "a = Max(x, half)\ny = Min(a, one)",
    "Where": "c = Greater(x, half)\na = Neg(x)\nb = Mul(x, x)\ny = Where(c, a, b)",
    "Pow, Sqrt, Reciprocal": "a = Pow(x, three)\nb = Mul(x, x)\nc = Add(b, one)\nd = Sqrt(c)\ne = Reciprocal(d)\ny = Mul(a, e)",  # noqa: E501
    "Sigmoid, Tanh, Softplus": "a = Sigmoid(x)\nb = Tanh(x)\nc = Softplus(x)\nd = Mul(a, b)\ny = Mul(d, c)",
    "Silu, also by a gate that serves twice": "a = Sigmoid(x)\nb = Mul(x, a)\nc = Sigmoid(b)\nd = Mul(c, b)\ny = Mul(d, a)",  # noqa: E501
    "Erf, Sin, Cos, Abs": "a = Erf(x)\nb = Sin(x)\nc = Cos(x)\nd = Abs(x)\ne = Mul(a, b)\nf = Mul(c, d)\ny = Add(e, f)",  # noqa: E501
    "Pow, by both": "a = Abs(x)\nb = Add(a, half)\nc = Pow(b, x)\nd = Pow(x, counts)\ny = Add(c, d)",
    "Max and Min, of three": "a = Neg(x)\nb = Max(x, half, a)\nc = Min(x, a, b)\ny = Sub(b, c)",
    "Clip": "a = Clip(x, half, one)\nb = Clip(x, , half)\nc = Clip(x, half)\nd = Mul(a, b)\ny = Mul(d, c)",
    "LeakyRelu, Elu": "a = LeakyRelu<alpha = 0.2>(x)\nb = Elu<alpha = 1.5>(x)\ny = Mul(a, b)",
    "Gelu": "y = Gelu(x)",
    "Gelu, tanh": 'y = Gelu<approximate = "tanh">(x)',
    "Relu": "y = Relu(x)",
    "Log": "a = Exp(x)\nb = Add(a, one)\ny = Log(b)",
    "MatMul": "a = MatMul(x, w)\nb = Transpose<perm = [0, 2, 1]>(x)\ny = MatMul(a, b)",
    "Softmax": "y = Softmax(x)",
    "LogSoftmax": "y = LogSoftmax(x)",
    "RMSNormalization": "y = RMSNormalization<axis = -1, epsilon = 0.001>(x, row)",
    "LayerNormalization": "y = LayerNormalization<axis = -1, epsilon = 0.001>(x, row)",
    "LayerNormalization, learned": "r = ReduceMean<keepdims = 0>(w, ax0)\ny = LayerNormalization(x, r, r)",
    "RMSNormalization, learned": "r = ReduceMean<keepdims = 0>(w, ax0)\ny = RMSNormalization(x, r)",
    "ReduceMax, ReduceMin": "a = ReduceMax(x, ax2)\nb = ReduceMin<keepdims = 0>(x, ax01)\nc = ReduceMax<keepdims = 0>(x)\nd = Mul(a, b)\ny = Mul(d, c)",  # noqa: E501
    "ReduceL1, ReduceL2": "a = ReduceL2(x, ax2)\nb = ReduceL1<keepdims = 0>(x, ax01)\ny = Mul(a, b)",
    "ReduceLogSumExp": "a = ReduceLogSumExp(x, ax2)\nb = ReduceLogSumExp<keepdims = 0>(x)\ny = Mul(a, b)",
    "Einsum": 'a = Einsum<equation = "bij,jk->bki">(x, w)\nb = Einsum<equation = "bij,kl->bi">(x, w)\nc = ReduceSum(a)\ny = Mul(b, c)',  # noqa: E501
    "CumSum": "y = CumSum(x, axis1)",
    "CumSum, reverse": "y = CumSum<reverse = 1>(x, axis1)",
    "Concat and Split": "a, b = Split<axis = 2>(x, sizes)\nc = Mul(a, a)\ny = Concat<axis = 2>(c, b, c)",
    "Concat, of sizes 1, 1, 3": "a, b = Split<axis = 2>(x, sizes)\nc = Mul(a, a)\ny = Concat<axis = 2>(c, a, b)",  # noqa: E501
    "Slice": "a = Slice(x, i1, i3, i2)\nb = Slice(x, minus2, last, i1)\nc = ReduceSum<keepdims = 0>(a)\nd = Mul(b, b)\ny = Add(d, c)",  # noqa: E501
    "Slice, between transposes": "t = Transpose<perm = [0, 2, 1]>(x)\na = Slice(t, i1, i3, i1)\nb = Transpose<perm = [0, 2, 1]>(a)\ny = Mul(b, b)",  # noqa: E501
    "Slice, by steps": "a = Slice(x, i0, last, i2, i2)\nb = Slice(a, last, first, i1, minus2)\ny = Mul(b, b)",
    "Pad": "a = Pad(x, pads)\ny = Mul(a, a)",
    "Gather": "a = Gather<axis = 0>(x, picks)\ny = Mul(a, a)",
    "Gather, another axis": "a = Gather<axis = 2>(x, picks)\ny = Mul(a, a)",
    "GatherElements": "a = Cast<to = 7>(x)\nb = Abs(a)\nc = GatherElements<axis = -1>(x, b)\ny = Mul(c, x)",
    "GatherND": "a = GatherND(x, places)\ny = Mul(a, a)",
    "Reshape, Squeeze, Unsqueeze, Expand": "a = Unsqueeze(x, i0)\nb = Expand(a, shape)\nc = Reshape(b, flat)\nd = Mul(c, c)\ne = Unsqueeze(d, i0)\ny = Squeeze(e, i0)",  # noqa: E501
    "If": """c = ReduceSum<keepdims = 0>(w)
        d = Greater(c, half)
        e = Squeeze(d)
        y = If (e) <then_branch = g1 () => (float[a, b, c] u) {m = Mul(x, x)
            u = MatMul(m, w)},
            else_branch = g2 () => (float[a, b, c] v) {v = Neg(x)}>""",
    "A value named as one of the memory's is": "a = Mul(x, x)\ninverse = Identity(a)\ny = Mul(inverse, x)",
    "Scan, of values with numbers and sizes": """s = ReduceSum<keepdims = 0>(x, ax01)
        end, y = Scan<num_scan_inputs = 1,
            body = step (float[c] s0, float[b, c] t) => (float[c] s1, float[b, c] o) <float r> {
            r__1 = Mul(s0, t)
            r__2 = Mul(r__1, s0)
            r__3 = Mul(r__2, t)
            r = ReduceSum<keepdims = 0>(s0, ax0)
            q = Mul(r__3, t)
            o = Mul(q, r)
            s1 = Tanh(s0)}>(s, x)""",
    "Scan": """s = ReduceSum<keepdims = 0>(x, ax01)
        end, y = Scan<num_scan_inputs = 1,
            body = step (float[c] s0, float[b, c] t) => (float[c] s1, float[b, c] o) {
            r = ReduceSum<keepdims = 0>(t, ax0)
            q = Mul(s0, r)
            s1 = Tanh(q)
            z = MatMul(t, w)
            o = Mul(z, s1)}>(s, x)""",
}
_CONSTANTS = """
    one = Constant<value_float = 1.0>()
    half = Constant<value_float = 0.5>()
    three = Constant<value_float = 3.0>()
    row = Constant<value_floats = [1.0, 2.0, 0.5, 1.5]>()
    ax0 = Constant<value_ints = [0]>()
    ax2 = Constant<value_ints = [2]>()
    ax01 = Constant<value_ints = [0, 1]>()
    axis1 = Constant<value_int = 1>()
    sizes = Constant<value_ints = [1, 3]>()
    i0 = Constant<value_ints = [0]>()
    i1 = Constant<value_ints = [1]>()
    i2 = Constant<value_ints = [2]>()
    i3 = Constant<value_ints = [3]>()
    minus2 = Constant<value_ints = [-2]>()
    last = Constant<value_ints = [9223372036854775807]>()
    first = Constant<value_ints = [-9223372036854775807]>()
    counts = Constant<value_ints = [0, 1, 2, 3]>()
    pads = Constant<value_ints = [0, 1, 0, 0, 0, 2]>()
    picks = Constant<value_ints = [1, 0, 1]>()
    places_flat = Constant<value_ints = [0, 1, 1, 2, 0, 1]>()
    places_shape = Constant<value_ints = [3, 2]>()
    places = Reshape(places_flat, places_shape)
    shape = Constant<value_ints = [3, 2, 3, 4]>()
    flat = Constant<value_ints = [6, 12]>()
"""


def _model(nodes: str) -> onnx.ModelProto:
    """The case with its loss: the result weighed by fixed numbers of its own shape, and summed."""
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    case (float[b, n, 4] "past.x", float[4, 4] "past.w") => (float[one] loss) {{
        x = Identity("past.x")
        w = Identity("past.w")
        {_CONSTANTS}
        {nodes}
        weighed_shape = Shape(y)
        weighed_size = Size(y)
        count0 = Constant<value_int = 0>()
        count1 = Constant<value_int = 1>()
        numbers = Range(count0, weighed_size, count1)
        numbers_f = Cast<to = 1>(numbers)
        waves = Cos(numbers_f)
        weights = Reshape(waves, weighed_shape)
        weighed = Mul(y, weights)
        total = ReduceSum<keepdims = 0>(weighed)
        loss = Reshape(total, i1)
    }}"""
    return onnx.parser.parse_model(text.replace('"past.x"', "past_x").replace('"past.w"', "past_w"))


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The names of memories, which the text form cannot write."""
    for info in model.graph.input:
        info.name = info.name.replace("past_", "past.")
    for node in model.graph.node:
        node.input[:] = [name.replace("past_", "past.") for name in node.input]
    return model


@pytest.mark.parametrize("case", CASES)
def test_every_derivative_is_that_of_differences(case: str) -> None:
    model = _named(_model(CASES[case]))
    draw = np.random.default_rng(0)
    given = {
        "past.x": draw.uniform(-1, 1.5, (2, 3, 4)).astype(np.float32),
        "past.w": draw.uniform(0, 1, (4, 4)).astype(np.float32),
    }
    forward = onnxruntime.InferenceSession(model.SerializeToString())
    backward = onnxruntime.InferenceSession(gradient(model, ["x", "w"], "case").SerializeToString())
    taken = {value.name for value in backward.get_inputs()}
    names = [value.name for value in backward.get_outputs()]
    found = dict(zip(names, backward.run(None, {n: a for n, a in given.items() if n in taken}), strict=True))
    used = {value.name for value in forward.get_inputs()}

    def loss(arrays: Mapping[str, Array]) -> float:
        return float(forward.run(["loss"], {name: a for name, a in arrays.items() if name in used})[0][0])

    for name, array in given.items():
        expected = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            ends = []
            for step in (5e-3, -5e-3):
                moved = array.copy()
                moved[place] += step
                ends.append(loss({**given, name: moved}))
            expected[place] = (ends[0] - ends[1]) / 1e-2
        actual = found[f"grad.{name.removeprefix('past.')}"]
        np.testing.assert_allclose(actual, expected, rtol=2e-2, atol=5e-3)


def test_an_operator_without_a_derivative_is_named() -> None:
    model = _named(_model("y = Round(x)"))
    with pytest.raises(ValueError, match="operator Round has no derivative"):
        gradient(model, ["x"], "case")
    assert "Round" not in RULES


_SLICED = """<ir_version: 10, opset_import: ["": 23]>
    case (float[{sizes}] past_x, int64[2] starts, int64[2] ends) => (float[one] loss) {{
        x = Identity(past_x)
        axes = Constant<value_ints = [1, -1]>()
        {constants}
        y = Slice(x, starts, ends, axes)
        mean = ReduceMean<keepdims = 1>(y, last_axis)
        spread = Mul(y, mean)
        flat = Reshape<allowzero = 1>(spread, flat_shape)
        squares = Mul(flat, flat)
        total = ReduceSum<keepdims = 0>(squares)
        loss = Reshape(total, one_place)
    }}"""
_SLICE_CONSTANTS = """last_axis = Constant<value_ints = [-1]>()
        one_place = Constant<value_ints = [1]>()
        y_shape = Shape(y)
        tail = Slice(y_shape, one_place, three)
        two = Slice(y_shape, zero, one_place)
        product = ReduceProd<keepdims = 1>(tail)
        flat_shape = Concat<axis = 0>(two, product)"""


def _sliced(sizes: str, constants: Mapping[str, list[int]]) -> onnx.ModelProto:
    """The loss of what a slice takes; ``constants`` in place of inputs where its ends are known."""
    text = _SLICED.format(sizes=sizes, constants="zero = Constant<value_ints = [0]>()")
    text = text.replace("y = Slice(x", "three = Constant<value_ints = [3]>()\n        y = Slice(x")
    text = text.replace("mean = ", _SLICE_CONSTANTS + "\n        mean = ", 1)
    model = _named(onnx.parser.parse_model(text))
    for name, numbers in constants.items():
        (own,) = (info for info in model.graph.input if info.name == name)
        model.graph.input.remove(own)
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value_ints=numbers))
    return model


@pytest.mark.parametrize("known", [False, True], ids=["found when it runs", "constants"])
@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        ([1, 0], [3, 4]),
        ([0, 0], [0, 4]),  # nothing, at the start
        ([3, 0], [3, 4]),  # at the end
        ([2, 1], [2, 3]),  # between
        ([2, 0], [1, 4]),  # its end before its start
        ([9, 0], [12, 4]),  # beyond the end
        ([-1, 0], [-2, 4]),  # counted from the end
        ([0, 4], [3, 4]),  # on the other axis
        ([2, 3], [1, -4]),  # on both
        ([-9, -2], [2, 99]),  # clamped
    ],
)
def test_a_slice_that_takes_nothing_has_a_gradient_of_zeros(
    starts: list[int], ends: list[int], known: bool
) -> None:
    constants = {"starts": starts, "ends": ends} if known else {}
    backward = gradient(_sliced("2, 3, 4" if known else "b, n, 4", constants), ["x"], "case")
    session = onnxruntime.InferenceSession(backward.SerializeToString())
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    taken = x[:, starts[0] : ends[0], starts[1] : ends[1]]
    loss = (taken * taken.mean(-1, keepdim=True)).square().sum()
    (expected,) = torch.autograd.grad(loss, x)
    given = {"past.x": x.detach().numpy(), "starts": np.array(starts), "ends": np.array(ends)}
    inputs = {value.name: given[value.name] for value in session.get_inputs()}
    (found,) = session.run(["grad.x"], inputs)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


class _Layered:
    """An MLP with LayerNorm and GELU, and a loss that weighs late pairs more."""

    parameters: Mapping[str, tuple[int, ...]] = {"first": (6, 10), "second": (10, 6)}

    def forward(self, weights: Mapping[str, Tensor], query: Tensor) -> Tensor:
        hidden = F.gelu(query @ weights["first"]) @ weights["second"]
        return query + F.layer_norm(hidden, hidden.shape[-1:])

    def loss(self, weights: Mapping[str, Tensor], key: Tensor, value: Tensor) -> Tensor:
        age = torch.arange(key.shape[1], dtype=key.dtype) + 1
        return ((self.forward(weights, key) - value).square().sum(-1) * age).sum(-1)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 7)])
def test_a_memory_of_ones_own_equals_autograd(sizes: tuple[int, int]) -> None:
    memory, (batch, tokens) = _Layered(), sizes
    generator = torch.Generator().manual_seed(tokens)
    weights = {
        name: torch.randn(batch, *shape, generator=generator).double().requires_grad_()
        for name, shape in memory.parameters.items()
    }
    key, value = (torch.randn(batch, tokens, 6, generator=generator).double() for _ in range(2))
    loss = memory.loss(weights, key, value)
    expected = torch.autograd.grad(loss.sum(), list(weights.values()))
    given = {f"past.{name}": tensor.detach().float().numpy() for name, tensor in weights.items()}
    pairs = {"key": key.float().numpy(), "value": value.float().numpy()}
    session = onnxruntime.InferenceSession(memory_gradient(memory, 6).SerializeToString())
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, given | pairs), strict=True))
    np.testing.assert_allclose(found["loss"], loss.detach().numpy(), rtol=1e-5)
    for name, own in zip(memory.parameters, expected, strict=True):
        error = np.abs(found[f"grad.{name}"] - own.numpy()).max() / own.abs().max().item()
        assert error <= 1e-5
    answers = onnxruntime.InferenceSession(memory_answer(memory, 6).SerializeToString())
    (answer,) = answers.run(None, given | {"query": pairs["key"]})
    np.testing.assert_allclose(answer, memory.forward(weights, key).detach().numpy(), rtol=1e-4, atol=1e-4)


class _Losing(_Layered):
    """With the loss that a test gives."""

    def __init__(self, loss: Callable[[Tensor, Tensor], object]) -> None:
        self._loss = loss

    def loss(self, weights: Mapping[str, Tensor], key: Tensor, value: Tensor) -> Tensor:
        return self._loss(self.forward(weights, key), value)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda a, v: (a - v).square().sum(), r"_Losing.loss gives shape \(\) for 11 streams of 37 tokens"),
        (lambda a, v: (a - v).square().sum(-1), r"gives shape \(11, 37\) .* it must be \(11,\); sum over"),
        (lambda a, v: (a - v).square().sum((1, 2)).double(), "gives torch.float64 from float32"),
        (lambda a, v: ((a - v).sum((1, 2)), a), "_Losing.loss gives tuple: it must give one tensor"),
    ],
)
def test_a_loss_that_is_not_one_number_a_stream_is_refused(
    loss: Callable[[Tensor, Tensor], object], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        memory_gradient(_Losing(loss), 6)
    assert "\n" not in str(refused.value)


def test_answers_of_another_shape_are_refused() -> None:
    class Summed(_Layered):
        def forward(self, weights: Mapping[str, Tensor], query: Tensor) -> Tensor:
            return super().forward(weights, query).sum(1)

    with pytest.raises(ValueError, match=r"Summed.forward gives shape \(11, 6\) .* it must be \(11, 37, 6\)"):
        memory_answer(Summed(), 6)


def test_what_a_loss_ignores_stays_an_input() -> None:
    class Partial(_Layered):
        parameters: Mapping[str, tuple[int, ...]] = {**_Layered.parameters, "spare": (3,)}

    class Decays(Partial):
        def loss(self, weights: Mapping[str, Tensor], key: Tensor, value: Tensor) -> Tensor:
            return weights["second"].square().sum((1, 2))

    model = memory_gradient(Decays(), 6)
    names = ["past.first", "past.second", "past.spare", "key", "value"]
    assert [info.name for info in model.graph.input] == names
    draw = np.random.default_rng(0)
    given = {
        info.name: draw.standard_normal((2, *shape)).astype(np.float32)
        for info, shape in zip(model.graph.input, [(6, 10), (10, 6), (3,), (5, 6), (5, 6)], strict=True)
    }
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(["grad.first", "grad.second", "grad.spare"], given)
    np.testing.assert_allclose(found[1], 2 * given["past.second"], rtol=1e-6)
    assert not found[0].any()
    assert not found[2].any()
    answers = memory_answer(Partial(), 6)
    assert [info.name for info in answers.graph.input] == [*names[:3], "query"]
    taken = {name: given[name] for name in names[:3]} | {"query": given["key"]}
    onnxruntime.InferenceSession(answers.SerializeToString()).run(None, taken)


def test_the_example_learns_what_it_is_taught() -> None:
    path = ROOT / "examples" / "gated_memory.py"
    spec = importlib.util.spec_from_file_location("gated_memory", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.main(steps=100)
    assert losses[-1] < 0.02 * losses[0]

"""Derivatives of sums, softmaxes and norms."""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from titans_converters.onnx.autodiff import Tape, rule
from titans_converters.onnx.gradient_rules.common import Gradients, attributes, only


def _kept_axes(tape: Tape, node: NodeProto, gradient: str) -> str:
    """The gradient of a sum, with the axes that it was summed over as axes of size 1."""
    if attributes(node).get("keepdims", 1) or len(node.input) < 2 or not node.input[1]:
        return gradient
    return tape.op("Unsqueeze", gradient, node.input[1])


@rule("ReduceSum")
def _reduce_sum(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g = _kept_axes(tape, node, only(gradients))
    return [tape.op("Expand", g, tape.op("Shape", node.input[0])), *[None] * (len(node.input) - 1)]


@rule("ReduceMean")
def _reduce_mean(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    x, y = node.input[0], node.output[0]
    g = tape.op("Expand", _kept_axes(tape, node, only(gradients)), tape.op("Shape", x))
    least = tape.op("Constant", value_int=1)  # of nothing there is no mean, and nothing to divide by
    count = tape.op("Div", tape.op("Size", x), tape.op("Max", tape.op("Size", y), least))
    count = tape.op("Cast", count, to=tape.types.elements.get(x, 1))
    return [tape.op("Div", g, count), *[None] * (len(node.input) - 1)]


def _kept(tape: Tape, node: NodeProto) -> str:
    """A reduction's result with the axes that it was taken over as axes of size 1."""
    return _kept_axes(tape, node, node.output[0])


@rule("ReduceMax", "ReduceMin")
def _reduce_extreme(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """The gradient goes to what was taken; in equal parts where several are."""
    x, *axes = node.input
    g = _kept_axes(tape, node, only(gradients))
    element = tape.types.elements.get(x) or TensorProto.FLOAT
    taken = tape.op("Cast", tape.op("Equal", x, _kept(tape, node)), to=element)
    noop = attributes(node).get("noop_with_empty_axes", 0)
    count = tape.op("ReduceSum", taken, *axes, keepdims=1, noop_with_empty_axes=noop)
    return [tape.op("Mul", taken, tape.op("Div", g, count)), *[None] * len(axes)]


@rule("ReduceL1")
def _reduce_l1(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    x, *axes = node.input
    g = _kept_axes(tape, node, only(gradients))
    return [tape.op("Mul", g, tape.op("Sign", x)), *[None] * len(axes)]


@rule("ReduceL2")
def _reduce_l2(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """``x / ‖x‖``, zero where all of ``x`` is."""
    x, *axes = node.input
    g, y, zero = _kept_axes(tape, node, only(gradients)), _kept(tape, node), tape.number(0.0, x)
    rate = tape.op("Where", tape.op("Equal", y, zero), zero, tape.op("Div", g, y))
    return [tape.op("Mul", x, rate), *[None] * len(axes)]


@rule("ReduceLogSumExp")
def _reduce_log_sum_exp(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    x, *axes = node.input
    share = tape.op("Exp", tape.op("Sub", x, _kept(tape, node)))
    return [tape.op("Mul", _kept_axes(tape, node, only(gradients)), share), *[None] * len(axes)]


@rule("CumSum")
def _cumsum(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    given = attributes(node)
    back = 1 - given.get("reverse", 0)
    return [
        tape.op("CumSum", only(gradients), node.input[1], exclusive=given.get("exclusive", 0), reverse=back),
        None,
    ]


@rule("Softmax")
def _softmax(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, y = only(gradients), node.output[0]
    axis = tape.ints(attributes(node).get("axis", -1))
    along = tape.op("ReduceSum", tape.op("Mul", g, y), axis, keepdims=1)
    return [tape.op("Mul", y, tape.op("Sub", g, along))]


@rule("LogSoftmax")
def _log_softmax(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, y = only(gradients), node.output[0]
    axis = tape.ints(attributes(node).get("axis", -1))
    total = tape.op("ReduceSum", g, axis, keepdims=1)
    return [tape.op("Sub", g, tape.op("Mul", tape.op("Exp", y), total))]


@rule("RMSNormalization")
def _rms_norm(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """With ``n = x r``, ``r = 1 / √(mean x² + ε)``:  ``r (g w - n mean(g w ∘ n))``."""
    return _through_norm(tape, node, only(gradients), centred=False)


@rule("LayerNormalization")
def _layer_norm(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """The same for ``x - mean x``, and the mean of the gradient taken out."""
    return _through_norm(tape, node, only(gradients), centred=True)


def _through_norm(tape: Tape, node: NodeProto, g: str, centred: bool) -> Gradients:
    x, weight, *bias = node.input
    y, given = node.output[0], attributes(node)
    if given.get("axis", -1) != -1 and given["axis"] != tape.rank(x) - 1:
        raise ValueError(f"gradient: {node.op_type} is differentiated over its last axis alone")
    axis = tape.ints(-1)
    z = tape.op("Sub", x, tape.op("ReduceMean", x, axis, keepdims=1)) if centred else x
    variance = tape.op("ReduceMean", tape.op("Mul", z, z), axis, keepdims=1)
    epsilon = tape.number(given.get("epsilon", 1e-5), x)
    scale = tape.op("Reciprocal", tape.op("Sqrt", tape.op("Add", variance, epsilon)))
    normal = tape.op("Mul", z, scale)
    weighted = tape.op("Mul", g, weight)
    along = tape.op("ReduceMean", tape.op("Mul", weighted, normal), axis, keepdims=1)
    inner = tape.op("Sub", weighted, tape.op("Mul", normal, along))
    if centred:
        inner = tape.op("Sub", inner, tape.op("ReduceMean", weighted, axis, keepdims=1))
    of_weight = tape.summed_to(tape.op("Mul", g, normal), weight, y) if tape.wants(weight) else None
    of_bias = [tape.summed_to(g, name, y) if tape.wants(name) else None for name in bias]
    return [tape.op("Mul", scale, inner), of_weight, *of_bias]

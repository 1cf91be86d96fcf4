"""Derivatives element by element, with broadcasting."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator

from onnx import NodeProto, TensorProto

from titans_converters.onnx.autodiff import Rule, Tape, rule
from titans_converters.onnx.gradient_rules.common import Gradients, attributes, only


@rule("Add")
def _add(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g = only(gradients)
    return [tape.summed_to(g, name, node.output[0]) if tape.wants(name) else None for name in node.input]


@rule("Sub")
def _sub(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (a, b) = only(gradients), node.input
    return [
        tape.summed_to(g, a, node.output[0]) if tape.wants(a) else None,
        tape.op("Neg", tape.summed_to(g, b, node.output[0])) if tape.wants(b) else None,
    ]


@rule("Mul")
def _mul(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (a, b) = only(gradients), node.input
    return [
        tape.summed_to(tape.op("Mul", g, other), name, node.output[0]) if tape.wants(name) else None
        for name, other in ((a, b), (b, a))
    ]


def silus(nodes: Iterable[NodeProto]) -> Iterator[tuple[str, Rule]]:
    """A rule for every product of a value and its own sigmoid: ``σ + y (1 - σ)``, in place of two."""
    gates: dict[str, str] = {}
    for node in nodes:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Sigmoid":
            gates[node.output[0]] = node.input[0]
        elif node.op_type == "Mul":
            for gate, x in (node.input, reversed(node.input)):
                if gates.get(gate) == x:
                    yield node.output[0], functools.partial(_silu, x, gate)


def _silu(x: str, gate: str, tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    y = node.output[0]
    slope = tape.op("Add", gate, tape.op("Sub", y, tape.op("Mul", y, gate)))
    whole = tape.op("Mul", only(gradients), slope)
    return [whole if name == x else None for name in node.input]


@rule("Div")
def _div(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (a, b), y = only(gradients), node.input, node.output[0]
    by = tape.op("Div", g, b)
    return [
        tape.summed_to(by, a, y) if tape.wants(a) else None,
        tape.summed_to(tape.op("Neg", tape.op("Mul", by, y)), b, y) if tape.wants(b) else None,
    ]


@rule("Max", "Min")
def _extreme(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """The gradient goes to the value that was taken; in equal parts where several were."""
    g, y = only(gradients), node.output[0]
    if len(node.input) == 1:
        return [g]
    element = tape.types.elements.get(y) or TensorProto.FLOAT
    taken = [tape.op("Cast", tape.op("Equal", name, y), to=element) for name in node.input]
    count = functools.reduce(lambda a, b: tape.op("Add", a, b), taken)
    part = tape.op("Div", g, count)
    return [
        tape.summed_to(tape.op("Mul", part, one), name, y) if tape.wants(name) else None
        for one, name in zip(taken, node.input, strict=True)
    ]


@rule("Clip")
def _clip(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """The gradient from one end to the other, both included."""
    g, (x, *ends) = only(gradients), node.input
    if any(tape.wants(end) for end in ends):
        raise ValueError("gradient: Clip is differentiated by its input alone")
    zero = tape.number(0.0, x)
    for within, end in zip(("GreaterOrEqual", "LessOrEqual"), ends, strict=False):
        if end:
            g = tape.op("Where", tape.op(within, x, end), g, zero)
    return [g, *[None] * len(ends)]


@rule("Where")
def _where(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (condition, a, b), y = only(gradients), node.input, node.output[0]
    zero = tape.number(0.0, y)
    result: Gradients = [None]
    for name, chosen in ((a, (g, zero)), (b, (zero, g))):
        part = tape.op("Where", condition, *chosen) if tape.wants(name) else None
        result.append(None if part is None else tape.summed_to(part, name, y))
    return result


@rule("Pow")
def _pow(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """``e x^(e-1)`` and ``y log x``, each zero where autograd takes its power for constant."""
    g, (x, exponent), y = only(gradients), node.input, node.output[0]
    result: Gradients = [None, None]
    if tape.wants(x):
        slope = _power_slope(tape, x, exponent)
        result[0] = tape.summed_to(tape.op("Mul", g, slope), x, y)
    if tape.wants(exponent):
        zero = tape.number(0.0, x)
        at_zero = tape.op("And", tape.op("Equal", x, zero), tape.op("GreaterOrEqual", exponent, zero))
        slope = tape.op("Where", at_zero, zero, tape.op("Mul", y, tape.op("Log", x)))
        result[1] = tape.summed_to(tape.op("Mul", g, slope), exponent, y)
    return result


def _power_slope(tape: Tape, x: str, exponent: str) -> str:
    elements = tape.types.elements
    known = tape.types.constants.get(exponent)
    if elements.get(exponent) != elements.get(x):
        exponent = tape.op("Cast", exponent, to=elements.get(x) or TensorProto.FLOAT)
    less = tape.op("Sub", exponent, tape.number(1.0, x))
    slope = tape.op("Mul", exponent, tape.op("Pow", x, less))
    if known is not None and known.all():
        return slope
    zero = tape.number(0.0, x)
    return tape.op("Where", tape.op("Equal", exponent, zero), zero, slope)


def _unary(*op_types: str) -> Callable[[Callable[[Tape, str, str], str]], None]:
    """Register an operator by its slope, computed from its input and output."""

    def register(slope: Callable[[Tape, str, str], str]) -> None:
        @rule(*op_types)
        def derivative(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
            return [tape.op("Mul", only(gradients), slope(tape, node.input[0], node.output[0]))]

    return register


@_unary("Exp")
def _exp(tape: Tape, x: str, y: str) -> str:
    return y


@_unary("Log")
def _log(tape: Tape, x: str, y: str) -> str:
    return tape.op("Reciprocal", x)


@_unary("Sqrt")
def _sqrt(tape: Tape, x: str, y: str) -> str:
    return tape.op("Div", tape.number(0.5, y), y)


@_unary("Reciprocal")
def _reciprocal(tape: Tape, x: str, y: str) -> str:
    return tape.op("Neg", tape.op("Mul", y, y))


@_unary("Sigmoid")
def _sigmoid(tape: Tape, x: str, y: str) -> str:
    return tape.op("Mul", y, tape.op("Sub", tape.number(1.0, y), y))


@_unary("Tanh")
def _tanh(tape: Tape, x: str, y: str) -> str:
    return tape.op("Sub", tape.number(1.0, y), tape.op("Mul", y, y))


@_unary("Softplus")
def _softplus(tape: Tape, x: str, y: str) -> str:
    return tape.op("Sigmoid", x)


@_unary("Erf")
def _erf(tape: Tape, x: str, y: str) -> str:
    square = tape.op("Neg", tape.op("Mul", x, x))
    return tape.op("Mul", tape.number(2 / math.sqrt(math.pi), x), tape.op("Exp", square))


@_unary("Sin")
def _sin(tape: Tape, x: str, y: str) -> str:
    return tape.op("Cos", x)


@_unary("Cos")
def _cos(tape: Tape, x: str, y: str) -> str:
    return tape.op("Neg", tape.op("Sin", x))


@_unary("Abs")
def _abs(tape: Tape, x: str, y: str) -> str:
    return tape.op("Sign", x)


@rule("Neg")
def _neg(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    return [tape.op("Neg", only(gradients))]


@rule("Relu")
def _relu(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, y = only(gradients), node.output[0]
    zero = tape.number(0.0, y)
    return [tape.op("Where", tape.op("Greater", y, zero), g, zero)]


@rule("LeakyRelu")
def _leaky_relu(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, x = only(gradients), node.input[0]
    below = tape.op("Mul", g, tape.number(attributes(node).get("alpha", 0.01), x))
    return [tape.op("Where", tape.op("Greater", x, tape.number(0.0, x)), g, below)]


@rule("Elu")
def _elu(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """``α eˣ`` up to 0, itself included."""
    g, x = only(gradients), node.input[0]
    below = tape.op("Mul", tape.number(attributes(node).get("alpha", 1.0), x), tape.op("Exp", x))
    above = tape.op("Greater", x, tape.number(0.0, x))
    return [tape.op("Where", above, g, tape.op("Mul", g, below))]


@rule("Gelu")
def _gelu(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """``Φ(x) + x φ(x)``, or the slope of the approximation by ``tanh``."""
    g, x = only(gradients), node.input[0]
    half, one = tape.number(0.5, x), tape.number(1.0, x)
    square = tape.op("Mul", x, x)
    if attributes(node).get("approximate", b"none") == b"tanh":
        root, cubic = tape.number(math.sqrt(2 / math.pi), x), tape.number(0.044715, x)
        inner = tape.op("Mul", root, tape.op("Add", x, tape.op("Mul", cubic, tape.op("Mul", square, x))))
        t = tape.op("Tanh", inner)
        inner_slope = tape.op(
            "Mul", root, tape.op("Add", one, tape.op("Mul", tape.number(3 * 0.044715, x), square))
        )
        below = tape.op("Mul", half, tape.op("Add", one, t))
        turn = tape.op("Mul", tape.op("Sub", one, tape.op("Mul", t, t)), inner_slope)
        slope = tape.op("Add", below, tape.op("Mul", tape.op("Mul", half, x), turn))
    else:
        scaled = tape.op("Mul", x, tape.number(math.sqrt(0.5), x))
        below = tape.op("Mul", half, tape.op("Add", one, tape.op("Erf", scaled)))
        density = tape.op("Exp", tape.op("Mul", tape.number(-0.5, x), square))
        density = tape.op("Mul", tape.number(1 / math.sqrt(2 * math.pi), x), density)
        slope = tape.op("Add", below, tape.op("Mul", x, density))
    return [tape.op("Mul", g, slope)]


@rule("Identity")
def _identity(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    return [only(gradients)]


@rule("Cast")
def _cast(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    element = tape.types.elements.get(node.input[0], 1)
    return [tape.op("Cast", only(gradients), to=element)]

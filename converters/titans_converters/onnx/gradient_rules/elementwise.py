"""Derivatives element by element, with broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable

from onnx import NodeProto

from titans_converters.onnx.autodiff import Tape, rule
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
    """Of two values: the gradient goes to the one that was taken; to the first where they are equal."""
    g, (a, b), y = only(gradients), node.input, node.output[0]
    taken = tape.op("GreaterOrEqual", *((a, b) if node.op_type == "Max" else (b, a)))
    zero = tape.number(0.0, y)
    first, second = tape.op("Where", taken, g, zero), tape.op("Where", taken, zero, g)
    return [
        tape.summed_to(one, name, y) if tape.wants(name) else None for one, name in ((first, a), (second, b))
    ]


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
    g, (x, exponent), y = only(gradients), node.input, node.output[0]
    if tape.wants(exponent):
        raise ValueError("gradient: Pow is differentiated by its base alone")
    less = tape.op("Sub", exponent, tape.number(1.0, exponent))
    slope = tape.op("Mul", exponent, tape.op("Pow", x, less))
    return [tape.summed_to(tape.op("Mul", g, slope), x, y), None]


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

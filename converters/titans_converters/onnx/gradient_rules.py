"""The derivative of every operator that memories and networks around them are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from onnx import GraphProto, NodeProto, helper

from titans_converters.onnx.autodiff import (
    Tape,
    captured,
    pruned,
    renamed_copy,
    rule,
    subgraphs,
    typed_value,
)

Gradients = list[str | None]


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _only(gradients: Gradients) -> str:
    (gradient,) = (one for one in gradients[:1] if one is not None)
    return gradient


# --- element by element, with broadcasting


@rule("Add")
def _add(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g = _only(gradients)
    return [tape.summed_to(g, name, node.output[0]) if tape.wants(name) else None for name in node.input]


@rule("Sub")
def _sub(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (a, b) = _only(gradients), node.input
    return [
        tape.summed_to(g, a, node.output[0]) if tape.wants(a) else None,
        tape.op("Neg", tape.summed_to(g, b, node.output[0])) if tape.wants(b) else None,
    ]


@rule("Mul")
def _mul(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (a, b) = _only(gradients), node.input
    return [
        tape.summed_to(tape.op("Mul", g, other), name, node.output[0]) if tape.wants(name) else None
        for name, other in ((a, b), (b, a))
    ]


@rule("Div")
def _div(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (a, b), y = _only(gradients), node.input, node.output[0]
    by = tape.op("Div", g, b)
    return [
        tape.summed_to(by, a, y) if tape.wants(a) else None,
        tape.summed_to(tape.op("Neg", tape.op("Mul", by, y)), b, y) if tape.wants(b) else None,
    ]


@rule("Max", "Min")
def _extreme(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """Of two values: the gradient goes to the one that was taken; to the first where they are equal."""
    g, (a, b), y = _only(gradients), node.input, node.output[0]
    taken = tape.op("GreaterOrEqual", *((a, b) if node.op_type == "Max" else (b, a)))
    zero = tape.number(0.0, y)
    first, second = tape.op("Where", taken, g, zero), tape.op("Where", taken, zero, g)
    return [
        tape.summed_to(one, name, y) if tape.wants(name) else None for one, name in ((first, a), (second, b))
    ]


@rule("Where")
def _where(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (condition, a, b), y = _only(gradients), node.input, node.output[0]
    zero = tape.number(0.0, y)
    result: Gradients = [None]
    for name, chosen in ((a, (g, zero)), (b, (zero, g))):
        part = tape.op("Where", condition, *chosen) if tape.wants(name) else None
        result.append(None if part is None else tape.summed_to(part, name, y))
    return result


@rule("Pow")
def _pow(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (x, exponent), y = _only(gradients), node.input, node.output[0]
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
            return [tape.op("Mul", _only(gradients), slope(tape, node.input[0], node.output[0]))]

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
    return [tape.op("Neg", _only(gradients))]


@rule("Relu")
def _relu(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, y = _only(gradients), node.output[0]
    zero = tape.number(0.0, y)
    return [tape.op("Where", tape.op("Greater", y, zero), g, zero)]


@rule("Gelu")
def _gelu(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """``Φ(x) + x φ(x)``, or the slope of the approximation by ``tanh``."""
    g, x = _only(gradients), node.input[0]
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
    return [_only(gradients)]


@rule("Cast")
def _cast(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    element = tape.types.elements.get(node.input[0], 1)
    return [tape.op("Cast", _only(gradients), to=element)]


# --- products


@rule("MatMul")
def _matmul(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, (a, b), y = _only(gradients), node.input, node.output[0]
    result: Gradients = [None, None]
    if tape.rank(a) < 2 or tape.rank(b) < 2:
        raise ValueError("gradient: MatMul with a vector; give it a second axis")
    if tape.wants(a):
        product = tape.op("MatMul", g, tape.transposed(b, tape.rank(b)))
        result[0] = tape.summed_to(product, a, y, inner=2)
    if tape.wants(b):
        product = tape.op("MatMul", tape.transposed(a, tape.rank(a)), g)
        result[1] = tape.summed_to(product, b, y, inner=2)
    return result


@rule("Gemm")
def _gemm(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, given = _only(gradients), attributes(node)
    if given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise ValueError("gradient: Gemm with factors is not supported")
    a, b, *rest = node.input
    result: Gradients = [None] * len(node.input)
    if tape.wants(a):
        turned = b if given.get("transB") else tape.transposed(b, 2)
        product = tape.op("MatMul", g, turned)
        result[0] = tape.transposed(product, 2) if given.get("transA") else product
    if tape.wants(b):
        turned = a if given.get("transA") else tape.transposed(a, 2)
        product = tape.op("MatMul", turned, g)
        result[1] = tape.transposed(product, 2) if given.get("transB") else product
    for index, bias in enumerate(rest, 2):
        if tape.wants(bias):
            result[index] = tape.summed_to(g, bias, node.output[0])
    return result


@rule("Conv")
def _conv(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """By its input: a depthwise one with turned taps over a padded gradient; others transposed."""
    g, (_, weight, *bias), given = _only(gradients), node.input, attributes(node)
    if any(tape.wants(name) for name in (weight, *bias)):
        raise ValueError("gradient: Conv is differentiated by its input alone")
    taps = tape.types.shapes[weight][2:]
    plain = all(
        set(given.get(name, [value])) == {value}
        for name, value in (("strides", 1), ("dilations", 1), ("pads", 0))
    )
    if plain and tape.types.shapes[weight][1] == 1 and tape.types.shapes[weight][0] == given.get("group", 1):
        axes = range(2, 2 + len(taps))
        count = len(taps)
        turned = tape.op(
            "Slice",
            weight,
            tape.ints(*[-1] * count),
            tape.ints(*[-(2**62)] * count),
            tape.ints(*axes),
            tape.ints(*[-1] * count),
        )
        pads = [int(size) - 1 for size in taps if isinstance(size, int)] * 2
        return [tape.op("Conv", g, turned, group=given.get("group", 1), pads=pads), *[None] * (1 + len(bias))]
    kept = {name: given[name] for name in ("strides", "dilations", "pads", "group") if name in given}
    return [tape.op("ConvTranspose", g, weight, **kept), *[None] * (1 + len(bias))]


# --- shapes


@rule("Reshape", "Squeeze", "Unsqueeze", "Flatten")
def _reshape(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    shape = tape.op("Shape", node.input[0])
    return [tape.op("Reshape", _only(gradients), shape), *[None] * (len(node.input) - 1)]


@rule("Expand")
def _expand(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    return [tape.summed_to(_only(gradients), node.input[0], node.output[0]), None]


@rule("Transpose")
def _transpose(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    rank = tape.rank(node.input[0])
    perm = list(attributes(node).get("perm", reversed(range(rank))))
    return [tape.op("Transpose", _only(gradients), perm=[perm.index(axis) for axis in range(rank)])]


@rule("Concat")
def _concat(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    axis = attributes(node)["axis"] % tape.rank(node.output[0])
    sizes = [tape.op("Shape", name, start=axis, end=axis + 1) for name in node.input]
    whole = tape.op("Concat", *sizes, axis=0)
    parts: Gradients = []
    parts.extend(tape.emit("Split", [_only(gradients), whole], len(node.input), axis=axis))
    return parts


@rule("Split")
def _split(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    parts = [gradient or tape.zeros_like(name) for name, gradient in zip(node.output, gradients, strict=True)]
    given = attributes(node)
    return [tape.op("Concat", *parts, axis=given.get("axis", 0)), None]


@rule("Slice")
def _slice(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """The gradient between zeros."""
    x, starts, ends, *rest = node.input
    steps = tape.types.numbers(rest[1]) if len(rest) > 1 else [1]
    axes = tape.types.numbers(rest[0]) if rest else list(range(tape.rank(x)))
    if axes is None or steps is None or set(steps) != {1}:
        raise ValueError("gradient: Slice is differentiated for constant axes and steps of 1")
    before, after = zip(
        *(_room(tape, x, axis, starts, ends, place) for place, axis in enumerate(axes)), strict=True
    )
    pads = tape.op("Concat", *before, *after, axis=0)
    padded = tape.op("Pad", _only(gradients), pads, "", tape.ints(*axes))
    return [padded, *[None] * (len(node.input) - 1)]


def _room(tape: Tape, x: str, axis: int, starts: str, ends: str, place: int) -> tuple[str, str]:
    """How many places of an axis stand before and after those that a slice has taken."""
    shape, first, last = tape.types.shapes.get(x), tape.types.numbers(starts), tape.types.numbers(ends)
    size = shape[axis] if shape else None
    if isinstance(size, int) and first and last:
        taken = range(size)[first[place] : last[place]]
        return tape.ints(taken.start), tape.ints(size - taken.stop)
    count = tape.op("Shape", x, **_span(axis))
    zero, one = tape.op("Constant", value_int=0), tape.op("Constant", value_int=1)
    places = tape.op("Range", zero, tape.op("Squeeze", count), one)
    which = [tape.ints(place), tape.ints(place + 1)]
    taken_places = tape.op("Slice", places, tape.op("Slice", starts, *which), tape.op("Slice", ends, *which))
    before = tape.op("Slice", taken_places, tape.ints(0), tape.ints(1))
    used = tape.op("Add", before, tape.op("Shape", taken_places))
    return before, tape.op("Sub", count, used)


def _span(axis: int) -> dict[str, int]:
    """Attributes of ``Shape`` for one axis."""
    return {"start": axis} if axis == -1 else {"start": axis, "end": axis + 1}


def _zero(tape: Tape, like: str) -> Any:  # noqa: ANN401 - onnx.TensorProto
    return helper.make_tensor("zero", tape.types.elements.get(like, 1), [1], [0])


@rule("Pad")
def _pad(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """The padding taken off again."""
    _, pads, *rest = node.input
    if attributes(node).get("mode", b"constant") != b"constant":
        raise ValueError("gradient: Pad is differentiated in its constant mode alone")
    if len(rest) > 1:
        raise ValueError("gradient: Pad with axes is not supported")
    return [tape.op("Pad", _only(gradients), tape.op("Neg", pads)), *[None] * (len(node.input) - 1)]


@rule("Gather")
def _gather(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """Rows added where they were taken from."""
    data, indices = node.input
    last, g = tape.op("Unsqueeze", indices, tape.ints(-1)), _only(gradients)
    if not attributes(node).get("axis", 0):
        return [tape.op("ScatterND", tape.zeros_like(data), last, g, reduction="add"), None]
    rank = tape.rank(data)
    axis, taken = attributes(node)["axis"] % rank, tape.rank(indices)
    others = [other for other in range(rank) if other != axis]
    behind = [other if other < axis else other + taken - 1 for other in others]
    first = tape.op("Transpose", g, perm=[*range(axis, axis + taken), *behind])
    sizes = tape.op("Gather", tape.op("Shape", data), tape.ints(axis, *others), axis=0)
    zeros = tape.op("ConstantOfShape", sizes, value=_zero(tape, data))
    moved = tape.op("ScatterND", zeros, last, first, reduction="add")
    back = [[axis, *others].index(place) for place in range(rank)]
    return [tape.op("Transpose", moved, perm=back), None]


@rule("GatherND")
def _gather_nd(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    data, indices = node.input
    if attributes(node).get("batch_dims", 0):
        raise ValueError("gradient: GatherND with batch axes is not supported")
    return [tape.op("ScatterND", tape.zeros_like(data), indices, _only(gradients), reduction="add"), None]


# --- sums and norms


def _kept_axes(tape: Tape, node: NodeProto, gradient: str) -> str:
    """The gradient of a sum, with the axes that it was summed over as axes of size 1."""
    if attributes(node).get("keepdims", 1) or len(node.input) < 2:
        return gradient
    return tape.op("Unsqueeze", gradient, node.input[1])


@rule("ReduceSum")
def _reduce_sum(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g = _kept_axes(tape, node, _only(gradients))
    return [tape.op("Expand", g, tape.op("Shape", node.input[0])), *[None] * (len(node.input) - 1)]


@rule("ReduceMean")
def _reduce_mean(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    x, y = node.input[0], node.output[0]
    g = tape.op("Expand", _kept_axes(tape, node, _only(gradients)), tape.op("Shape", x))
    count = tape.op("Div", tape.op("Size", x), tape.op("Size", y))
    count = tape.op("Cast", count, to=tape.types.elements.get(x, 1))
    return [tape.op("Div", g, count), *[None] * (len(node.input) - 1)]


@rule("CumSum")
def _cumsum(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    given = attributes(node)
    back = 1 - given.get("reverse", 0)
    return [
        tape.op("CumSum", _only(gradients), node.input[1], exclusive=given.get("exclusive", 0), reverse=back),
        None,
    ]


@rule("Softmax")
def _softmax(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, y = _only(gradients), node.output[0]
    axis = tape.ints(attributes(node).get("axis", -1))
    along = tape.op("ReduceSum", tape.op("Mul", g, y), axis, keepdims=1)
    return [tape.op("Mul", y, tape.op("Sub", g, along))]


@rule("LogSoftmax")
def _log_softmax(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    g, y = _only(gradients), node.output[0]
    axis = tape.ints(attributes(node).get("axis", -1))
    total = tape.op("ReduceSum", g, axis, keepdims=1)
    return [tape.op("Sub", g, tape.op("Mul", tape.op("Exp", y), total))]


@rule("RMSNormalization")
def _rms_norm(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """With ``n = x r``, ``r = 1 / √(mean x² + ε)``:  ``r (g w - n mean(g w ∘ n))``."""
    return _through_norm(tape, node, _only(gradients), centred=False)


@rule("LayerNormalization")
def _layer_norm(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """The same for ``x - mean x``, and the mean of the gradient taken out."""
    return _through_norm(tape, node, _only(gradients), centred=True)


def _through_norm(tape: Tape, node: NodeProto, g: str, centred: bool) -> Gradients:
    x, weight = node.input[:2]
    given = attributes(node)
    if any(tape.wants(name) for name in node.input[1:]):
        raise ValueError(f"gradient: {node.op_type} is differentiated by its input alone")
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
    return [tape.op("Mul", scale, inner), *[None] * (len(node.input) - 1)]


# --- branches and loops


@rule("If")
def _if(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """The same choice: the branch is computed again, and differentiated."""
    branches = subgraphs(node)
    wanted = list(dict.fromkeys(name for one in branches for name in captured(one) if tape.wants(name)))
    if not wanted:
        return [None]
    parts = [_branch(tape, one, gradients, wanted) for one in branches]
    made = dict(zip((item.name for item in node.attribute), parts, strict=True))
    for name, gradient in zip(wanted, tape.emit("If", [node.input[0]], len(wanted), **made), strict=True):
        tape.add_gradient(name, gradient)
    return [None]


def _branch(tape: Tape, graph: GraphProto, gradients: Gradients, wanted: list[str]) -> GraphProto:
    nodes, names = renamed_copy(graph, tape)
    inner = Tape(nodes, tape.types, tape.names)
    seeds: dict[str, str] = {}
    for info, gradient in zip(graph.output, gradients, strict=True):
        if gradient is not None:
            _seed(inner, seeds, names.get(info.name, info.name), gradient)
    found = inner.backward(seeds, wanted)
    outputs = [inner.op("Identity", found.get(name) or inner.zeros_like(name)) for name in wanted]
    return helper.make_graph(
        pruned(inner.nodes, outputs),
        tape.names.new("branch"),
        [],
        [typed_value(output, tape.types, name) for output, name in zip(outputs, wanted, strict=True)],
    )


@rule("Scan")
def _scan(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """Backwards through the steps, each computed again from the state before it."""
    given = attributes(node)
    if set(given) - {"body", "num_scan_inputs"}:
        raise ValueError("gradient: Scan with axes or directions is not supported")
    body: GraphProto = next(item.g for item in node.attribute if item.name == "body")
    scanned = given["num_scan_inputs"]
    count = len(node.input) - scanned
    before = _keep_states(tape, node, body, count)
    outer = [name for name in captured(body) if tape.wants(name)]
    return _run_backwards(tape, node, body, count, before, outer, gradients)


def _keep_states(tape: Tape, node: NodeProto, body: GraphProto, count: int) -> list[str]:
    """Let the forward loop put out the state before every step."""
    kept = []
    for info in list(body.input)[:count]:
        inside, outside = tape.names.new("before"), tape.names.new("states")
        body.node.append(helper.make_node("Identity", [info.name], [inside]))
        body.output.append(typed_value(inside, tape.types, info.name))
        tape.types.elements[outside] = tape.types.elements.get(info.name, 1)
        node.output.append(outside)
        kept.append(outside)
    return kept


def _run_backwards(
    tape: Tape,
    node: NodeProto,
    body: GraphProto,
    count: int,
    before: list[str],
    outer: list[str],
    gradients: Gradients,
) -> Gradients:
    nodes, names = renamed_copy(body, tape)
    inner = Tape(nodes, tape.types, tape.names)
    inputs = [info.name for info in body.input]
    results = [info.name for info in body.output][: len(body.output) - count]
    states, scans = inputs[:count], inputs[count:]
    floats = [name for name in states if tape.types.is_float(name)]
    live = [name for name in scans if tape.wants(node.input[inputs.index(name)])]

    seeds: dict[str, str] = {}
    carried, streamed = [], []
    for index, name in enumerate(results):
        if index < count and states[index] in floats:
            seed = tape.names.new("carried")
            carried.append((seed, gradients[index] or tape.zeros_like(node.input[index]), states[index]))
        elif index >= count and (gradient := gradients[index]) is not None:
            seed = tape.names.new("streamed")
            streamed.append((seed, gradient, name))
        else:
            continue
        tape.types.alias(seed, name)
        _seed(inner, seeds, names.get(name, name), seed)
    totals = [(tape.names.new("total"), tape.zeros_like(name), name) for name in outer]

    found = inner.backward(seeds, [*(names[name] for name in (*floats, *live)), *outer])
    zero = inner.zeros_like
    next_states = [inner.op("Identity", found.get(names[n]) or zero(names[n])) for n in floats]
    next_totals = [
        inner.op("Add", total, found[name]) if name in found else inner.op("Identity", total)
        for total, _, name in totals
    ]
    out_scans = [inner.op("Identity", found.get(names[n]) or zero(names[n])) for n in live]

    def info(name: str, like: str) -> Any:  # noqa: ANN401 - onnx.ValueInfoProto
        return typed_value(name, tape.types, like)

    body_inputs = [info(seed, like) for seed, _, like in (*carried, *totals)]
    body_inputs += [info(names[name], name) for name in states + scans]
    body_inputs += [info(seed, name) for seed, _, name in streamed]
    outputs = [*next_states, *next_totals, *out_scans]
    likes = [*floats, *outer, *live]
    backward = helper.make_graph(
        pruned(inner.nodes, outputs),
        tape.names.new("backwards"),
        body_inputs,
        [info(output, like) for output, like in zip(outputs, likes, strict=True)],
    )
    taken = [*before, *node.input[count:], *(gradient for _, gradient, _ in streamed)]
    made = tape.emit(
        "Scan",
        [*(start for _, start, _ in (*carried, *totals)), *taken],
        len(outputs),
        body=backward,
        num_scan_inputs=len(taken),
        scan_input_directions=[1] * len(taken),
        **({"scan_output_directions": [1] * len(live)} if live else {}),
    )
    for name, gradient in zip(outer, made[len(floats) :], strict=False):
        tape.add_gradient(name, gradient)
    by_input = dict(
        zip([*floats, *live], [*made[: len(floats)], *made[len(floats) + len(outer) :]], strict=True)
    )
    return [by_input.get(name) for name in inputs]


def _seed(tape: Tape, seeds: dict[str, str], value: str, gradient: str) -> None:
    """Note a gradient to begin with; a value that is put out twice has the sum of both."""
    seeds[value] = tape.op("Add", seeds[value], gradient) if value in seeds else gradient

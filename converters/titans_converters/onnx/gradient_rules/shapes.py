"""Derivatives of what moves numbers without changing them."""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, helper

from titans_converters.onnx.autodiff import Tape, rule
from titans_converters.onnx.gradient_rules.common import Gradients, attributes, only


@rule("Reshape", "Squeeze", "Unsqueeze", "Flatten")
def _reshape(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    shape = tape.op("Shape", node.input[0])
    back = tape.op("Reshape", only(gradients), shape, allowzero=1)
    return [back, *[None] * (len(node.input) - 1)]


@rule("Expand")
def _expand(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    return [tape.summed_to(only(gradients), node.input[0], node.output[0]), None]


@rule("Transpose")
def _transpose(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    rank = tape.rank(node.input[0])
    perm = list(attributes(node).get("perm", reversed(range(rank))))
    return [tape.op("Transpose", only(gradients), perm=[perm.index(axis) for axis in range(rank)])]


@rule("Concat")
def _concat(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    axis = attributes(node)["axis"] % tape.rank(node.output[0])
    shapes = [tape.types.shapes.get(name) for name in node.input]
    known = [shape[axis] for shape in shapes if shape and isinstance(shape[axis], int)]
    if len(known) == len(shapes):
        whole = tape.ints(*known)
    else:
        sizes = [tape.op("Shape", name, start=axis, end=axis + 1) for name in node.input]
        whole = tape.op("Concat", *sizes, axis=0)
    parts: Gradients = []
    parts.extend(tape.emit("Split", [only(gradients), whole], len(node.input), axis=axis))
    return parts


@rule("Split")
def _split(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    parts = [gradient or tape.zeros_like(name) for name, gradient in zip(node.output, gradients, strict=True)]
    given = attributes(node)
    return [tape.op("Concat", *parts, axis=given.get("axis", 0)), None]


@rule("Slice")
def _slice(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """The gradient between zeros; one number at a time where steps lie between or lead back."""
    x, starts, ends, *rest = node.input
    steps = tape.types.numbers(rest[1]) if len(rest) > 1 else [1]
    axes = tape.types.numbers(rest[0]) if rest else [*range(len(tape.types.numbers(starts) or []))]
    if not axes or steps is None or set(steps) != {1}:
        return [_put_back(tape, node, only(gradients)), *[None] * (len(node.input) - 1)]
    rooms = {axis: _room(tape, x, axis, starts, ends, place) for place, axis in enumerate(axes)}
    return [_padded(tape, x, only(gradients), rooms), *[None] * (len(node.input) - 1)]


def _padded(tape: Tape, x: str, gradient: str, rooms: dict[int, tuple[str, str]]) -> str:
    """The gradient with zeros before and after it along some axes, as large as ``x``.

    The axes are named by the place of their pads among those of all: ONNX Runtime moves transposes past a
    Pad, and takes the pads of one that names its axes for those of all of them.
    """
    shape, none = tape.types.shapes.get(x), tape.ints(0)
    if shape is None:
        before, after = zip(*rooms.values(), strict=True)
        return tape.op("Pad", gradient, tape.op("Concat", *before, *after, axis=0), "", tape.ints(*rooms))
    known = {axis % len(shape): room for axis, room in rooms.items()}
    sides = [[known.get(axis, (none, none))[side] for axis in range(len(shape))] for side in (0, 1)]
    return tape.op("Pad", gradient, tape.op("Concat", *sides[0], *sides[1], axis=0))


def _put_back(tape: Tape, node: NodeProto, gradient: str) -> str:
    """Every number of a slice's gradient to the place that the same slice of all places names."""
    x, *how = node.input
    shape, count = tape.op("Shape", x), tape.op("Size", x)
    zero, one = tape.op("Constant", value_int=0), tape.op("Constant", value_int=1)
    places = tape.op("Reshape", tape.op("Range", zero, count, one), shape, allowzero=1)
    flat = tape.ints(-1)
    taken = tape.op("Reshape", tape.op("Slice", places, *how), flat)
    zeros = tape.op("ConstantOfShape", tape.op("Reshape", count, flat), value=_zero(tape, x))
    moved = tape.op("ScatterElements", zeros, taken, tape.op("Reshape", gradient, flat), axis=0)
    return tape.op("Reshape", moved, shape, allowzero=1)


def _room(tape: Tape, x: str, axis: int, starts: str, ends: str, place: int) -> tuple[str, str]:
    """How many places of an axis stand before and after those that a slice has taken.

    Where it has taken none, the two are all places nonetheless.
    """
    shape, first, last = tape.types.shapes.get(x), tape.types.numbers(starts), tape.types.numbers(ends)
    size = shape[axis] if shape else None
    if isinstance(size, int) and first and last:
        taken = range(size)[first[place] : last[place]]
        return tape.ints(taken.start), tape.ints(size - max(taken.start, taken.stop))
    count = tape.op("Shape", x, **_span(axis))
    zero, one = tape.op("Constant", value_int=0), tape.op("Constant", value_int=1)
    places = tape.op("Range", zero, tape.op("Squeeze", count), one)
    which = [tape.ints(place), tape.ints(place + 1)]
    taken_places = tape.op("Slice", places, tape.op("Slice", starts, *which), tape.op("Slice", ends, *which))
    taken_or_end = tape.op("Concat", taken_places, count, axis=0)
    before = tape.op("Slice", taken_or_end, tape.ints(0), tape.ints(1))
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
    return [tape.op("Pad", only(gradients), tape.op("Neg", pads)), *[None] * (len(node.input) - 1)]


@rule("Gather")
def _gather(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    """Rows added where they were taken from."""
    data, indices = node.input
    last, g = tape.op("Unsqueeze", indices, tape.ints(-1)), only(gradients)
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


@rule("GatherElements")
def _gather_elements(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    data, indices = node.input
    axis, zeros = attributes(node).get("axis", 0) % tape.rank(data), tape.zeros_like(data)
    moved = tape.op("ScatterElements", zeros, indices, only(gradients), axis=axis, reduction="add")
    return [moved, None]


@rule("GatherND")
def _gather_nd(tape: Tape, node: NodeProto, gradients: Gradients) -> Gradients:
    data, indices = node.input
    if attributes(node).get("batch_dims", 0):
        raise ValueError("gradient: GatherND with batch axes is not supported")
    return [tape.op("ScatterND", tape.zeros_like(data), indices, only(gradients), reduction="add"), None]

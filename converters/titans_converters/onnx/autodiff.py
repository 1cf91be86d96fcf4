"""Reverse-mode differentiation of an ONNX graph: the graph of a loss becomes the graph of its gradient.

Works on graphs, not on the code that they were traced from, so that it costs no second trace, sees
exactly what will run, and knows no architecture. ``If`` and ``Scan`` are differentiated, too: a branch
is computed again beside its gradient; a loop keeps the state before every step and runs backwards.

:mod:`titans_converters.onnx.gradient_rules` holds one rule for each operator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

Shape = tuple[int | str | None, ...]
"""Sizes as far as they are known: a number, a name that stands for the same size everywhere, or None."""

Rule = Callable[["Tape", NodeProto, list[str | None]], list[str | None]]
"""Gradients of a node's outputs, None for zero → gradients of its inputs, None where there is none."""

RULES: dict[str, Rule] = {}
"""By operator of ONNX itself; one of another domain has none, whatever its name."""

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE})
_DISCRETE = frozenset(
    {TensorProto.BOOL, TensorProto.STRING}
    | {getattr(TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (2, 4, 8, 16, 32, 64)}
)
"""Element types through which no gradient flows, in autograd neither."""


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register the derivative of operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


class Types:
    """Element types and shapes of all values of a model, as shape inference found them."""

    def __init__(self, graph: GraphProto = GraphProto()) -> None:  # noqa: B008 - only read
        """``graph``: after shape inference."""
        self.elements: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        self._read(graph)

    def _read(self, graph: GraphProto) -> None:
        for info in (*graph.input, *graph.output, *graph.value_info):
            tensor = info.type.tensor_type
            self.elements[info.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.shapes[info.name] = tuple(_size(axis) for axis in tensor.shape.dim)
        for initializer in graph.initializer:
            self.elements[initializer.name] = initializer.data_type
            self.shapes[initializer.name] = tuple(initializer.dims)
            self._keep_constant(initializer.name, initializer)
        for node in graph.node:
            if node.op_type == "Constant":
                self._keep_constant(node.output[0], helper.get_node_attr_value(node, node.attribute[0].name))
            for inner in subgraphs(node):
                self._read(inner)

    def _keep_constant(self, name: str, value: Any) -> None:  # noqa: ANN401 - a tensor, a number or a list
        if not isinstance(value, TensorProto):
            self.constants[name] = np.asarray(value)
        elif value.data_type == TensorProto.INT64 or (value.data_type in _FLOATS and not value.dims):
            self.constants[name] = numpy_helper.to_array(value)

    def numbers(self, name: str) -> list[int] | None:
        """The integers of a constant, or None where the value is no constant."""
        value = self.constants.get(name)
        return None if value is None or value.dtype.kind not in "iu" else [int(x) for x in value.reshape(-1)]

    def alias(self, new: str, old: str) -> None:
        """Let ``new`` have the type of ``old``."""
        if old in self.constants:
            self.constants[new] = self.constants[old]
        if old in self.elements:
            self.elements[new] = self.elements[old]
        if old in self.shapes:
            self.shapes[new] = self.shapes[old]

    def differentiable(self, name: str) -> bool:
        """Whether a gradient may flow through the value; where its element type is not known, it may."""
        return self.elements.get(name) not in _DISCRETE

    def check_precision(self, name: str, operator: str) -> None:
        """Refuse the gradient of a value of less than 32 bits.

        Raises:
            ValueError: the value has such a type; the message names it, and ``operator``, which computes it.
        """
        element = self.elements.get(name) or TensorProto.FLOAT
        if element not in _FLOATS:
            raise ValueError(
                f"gradient: {operator} gives {TensorProto.DataType.Name(element).lower()}, through which no "
                "gradient is taken here; compute in float32"
            )


class Names:
    """Names that no other value of the model has."""

    def __init__(self, prefix: str = "d") -> None:
        """``prefix``: the writer's own."""
        self._prefix, self._count = prefix, 0

    def new(self, hint: str) -> str:
        """A fresh name."""
        self._count += 1
        return f"{self._prefix}.{self._count}.{hint}"


class Tape:
    """The nodes of one graph scope, to which backward nodes are added."""

    def __init__(self, nodes: Iterable[NodeProto], types: Types, names: Names) -> None:
        """``nodes``: the scope's forward nodes, in order; owned by the tape."""
        self.nodes = list(nodes)
        self.types, self.names = types, names
        self.needed: set[str] = set()
        self.known: dict[str, Rule] = {}
        """Rules for single values, in place of those of the nodes that compute them."""
        self.stopped: frozenset[str] = frozenset()
        """Values that are taken for constants."""
        self._grads: dict[str, str] = {}

    # --- writing nodes

    def emit(self, op_type: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> list[str]:  # noqa: ANN401
        """Add a node; returns the names of its outputs."""
        results = [self.names.new(op_type) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, results, **attributes))
        return results

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401
        """Add a node with one output."""
        return self.emit(op_type, inputs, **attributes)[0]

    def ints(self, *values: int) -> str:
        """A constant vector of integers."""
        return self.op("Constant", value=numpy_helper.from_array(np.array(values, np.int64)))

    def number(self, value: float, like: str) -> str:
        """A constant of the element type of ``like``."""
        element = self.types.elements.get(like) or TensorProto.FLOAT
        dtype = helper.tensor_dtype_to_np_dtype(element)
        return self.op("Constant", value=numpy_helper.from_array(np.array(value, dtype)))

    def zeros_like(self, name: str) -> str:
        """Zeros of the shape and type of a value."""
        element = self.types.elements.get(name, TensorProto.FLOAT)
        value = helper.make_tensor("zero", element, [1], [0])
        return self.op("ConstantOfShape", self.op("Shape", name), value=value)

    def rank(self, name: str) -> int:
        """Number of axes.

        Raises:
            ValueError: shape inference did not find it.
        """
        shape = self.types.shapes.get(name)
        if shape is None:
            raise ValueError(f"gradient: the rank of {name} is not known")
        return len(shape)

    def transposed(self, name: str, rank: int) -> str:
        """The last two axes exchanged."""
        return self.op("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])

    def summed_to(self, gradient: str, value: str, result: str, inner: int = 0) -> str:
        """``gradient`` summed over the axes along which ``value`` was spread in ``result``.

        The last ``inner`` axes are those of ``value``, whatever ``result`` has there.
        """
        own, spread = self.types.shapes.get(value), self.types.shapes.get(result)
        axes = None
        if own is not None and spread is not None:
            axes = spread_axes(own[: len(own) - inner], spread[: len(spread) - inner])
            if axes is not None and len(own) == len(spread):
                return self.op("ReduceSum", gradient, self.ints(*axes), keepdims=1) if axes else gradient
        target = self.op("Shape", value)
        if axes is None:  # found when it runs
            whole = self.op("Shape", gradient)
            padded = self._padded(target, whole, own, spread)
            differs = self.op("Not", self.op("Equal", padded, whole))
            over = self.op("Squeeze", self.op("NonZero", differs), self.ints(0))
        else:
            over = self.ints(*axes)
        total = self.op("ReduceSum", gradient, over, keepdims=1, noop_with_empty_axes=1)
        return self.op("Reshape", total, target, allowzero=1)

    def _padded(self, target: str, whole: str, own: Shape | None, spread: Shape | None) -> str:
        """The sizes ``target`` with ones before them, as many as ``whole`` is longer."""
        if own is None or spread is None:
            missing = self.op("Sub", self.op("Shape", whole), self.op("Shape", target))
            one = numpy_helper.from_array(np.array([1], np.int64))
            return self.op("Concat", self.op("ConstantOfShape", missing, value=one), target, axis=0)
        if len(own) == len(spread):
            return target
        return self.op("Concat", self.ints(*[1] * (len(spread) - len(own))), target, axis=0)

    # --- differentiating

    def backward(self, seeds: Mapping[str, str], sources: Iterable[str]) -> dict[str, str]:
        """Differentiate with respect to ``sources``.

        Args:
            seeds: gradients of values of this scope, by value.
            sources: values that the scope is given, or defines.

        Returns:
            The gradient of every source that the seeded values depend on.

        Raises:
            ValueError: an operator on the way has no derivative here.
        """
        sources = list(sources)
        forward = list(self.nodes)
        self.needed = dependents(forward, sources, self.types, self.stopped)
        self._grads = {value: seed for value, seed in seeds.items() if value in self.needed}
        for node in reversed(forward):
            gradients = [self._grads.get(name) for name in node.output]
            if not any(gradients):
                continue
            wanted = self._rule(node, gradients)(self, node, gradients)
            for name, gradient in zip(node.input, wanted, strict=False):
                if gradient is not None and name in self.needed:
                    self.add_gradient(name, gradient)
        return {name: self._grads[name] for name in sources if name in self._grads}

    def _rule(self, node: NodeProto, gradients: Sequence[str | None]) -> Rule:
        own = node.domain in ("", "ai.onnx")
        name = node.op_type if own else f"{node.domain}.{node.op_type}"
        found = self.known.get(node.output[0]) or RULES.get(name)
        if found is None:
            raise ValueError(f"gradient: operator {name} has no derivative in this project")
        for output, gradient in zip(node.output, gradients, strict=True):
            if gradient is not None:
                self.types.check_precision(output, name)
        return found

    def add_gradient(self, value: str, gradient: str) -> None:
        """Count ``gradient`` towards the gradient of ``value``."""
        known = self._grads.get(value)
        self._grads[value] = gradient if known is None else self.op("Add", known, gradient)

    def wants(self, name: str) -> bool:
        """Whether the gradient of a value is asked for."""
        return name in self.needed


def spread_axes(value: Shape | None, result: Shape | None) -> list[int] | None:
    """Axes of ``result`` along which ``value`` was spread; None where the shapes do not tell."""
    if value is None or result is None:
        return None
    lead = len(result) - len(value)
    axes = list(range(lead))
    for axis, (one, whole) in enumerate(zip(value, result[lead:], strict=True), lead):
        if one is None or whole is None:
            return None
        if one == whole:
            continue
        if one != 1:
            return None
        axes.append(axis)
    return axes


def _size(axis: onnx.TensorShapeProto.Dimension) -> int | str | None:
    return axis.dim_value if axis.HasField("dim_value") else axis.dim_param or None


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """Graphs that a node holds."""
    return [item.g for item in node.attribute if item.type == AttributeProto.GRAPH]


def captured(graph: GraphProto) -> list[str]:
    """Values that a subgraph takes from around it, in order of first use."""
    known = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    found: dict[str, None] = {}
    for node in graph.node:
        used = [*node.input, *(name for inner in subgraphs(node) for name in captured(inner))]
        found.update(dict.fromkeys(name for name in used if name and name not in known))
        known.update(node.output)
    found.update(dict.fromkeys(info.name for info in graph.output if info.name not in known))
    return list(found)


def dependents(
    nodes: Iterable[NodeProto], sources: Iterable[str], types: Types, stopped: Container[str] = ()
) -> set[str]:
    """Values not of whole numbers that depend on ``sources``, those included, by no way through ``stopped``.

    One whose element type is not known counts: its operator is then an error, where silence would cut a path.
    """
    needed = set(sources)
    for node in nodes:
        used = {*node.input, *(name for inner in subgraphs(node) for name in captured(inner))}
        if used & needed:
            found = (name for name in node.output if name and types.differentiable(name))
            needed.update(name for name in found if name not in stopped)
    return needed


def renamed_copy(graph: GraphProto, tape: Tape) -> tuple[list[NodeProto], dict[str, str]]:
    """A subgraph's nodes under names of their own, and the new name of each of its values."""
    names: dict[str, str] = {}

    def define(name: str) -> str:
        names[name] = tape.names.new(name.removeprefix("d.").lstrip("0123456789.") or "value")
        tape.types.alias(names[name], name)
        return names[name]

    def copied(nodes: Iterable[NodeProto]) -> list[NodeProto]:
        result = []
        for node in nodes:
            new = copy.deepcopy(node)
            new.name = ""
            new.input[:] = [names.get(name, name) for name in node.input]
            for inner in subgraphs(new):
                for info in inner.input:
                    info.name = define(info.name)
                inside = copied(inner.node)
                del inner.node[:]
                inner.node.extend(inside)
                for info in inner.output:
                    info.name = names.get(info.name, info.name)
                del inner.value_info[:]
            new.output[:] = [define(name) if name else "" for name in node.output]
            result.append(new)
        return result

    if graph.initializer:
        raise ValueError("gradient: a branch or loop with initializers of its own is not supported")
    for info in graph.input:
        define(info.name)
    return copied(graph.node), names


def pruned(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """The nodes that ``outputs`` depend on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(node.input)
            for inner in subgraphs(node):
                wanted.update(captured(inner))
    return kept[::-1]


def typed_value(name: str, types: Types, like: str | None = None) -> onnx.ValueInfoProto:
    """A subgraph's input or output: its element type, and its shape left open."""
    element = types.elements.get(like or name, TensorProto.FLOAT)
    return helper.make_tensor_value_info(name, element, None)

"""A graph for one number of tokens: no control flow, no functions, standard operators only.

1. Functions are put where they are called.
2. The axis of tokens gets its size, and what follows from it is folded.
3. Of an ``If`` the branch that its condition chooses stays; where that depends on data, the branch that is
   right whatever the data are.
4. A ``Scan`` becomes its body, once for every element that it runs over.

The batch stays free.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    InlinePass,
    NameFixPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)

from titans_converters import memory_op
from titans_converters.onnx.function import GENERAL
from titans_converters.onnx.recurrence import KEPT
from titans_runtime.errors import UsageError

_LARGEST_SHARED = 2**12  # elements; larger constants are compared when they are written


def unroll(model: ir.Model, tokens: int) -> ir.Model:
    """A traced model for calls of ``tokens`` tokens; the model itself is left as it is.

    Raises:
        UsageError: something would be left that only control flow can express; the message names it.
    """
    model = model.clone()
    for function in model.functions.values():
        _keep_empty_tiles(function)
    model = InlinePass()(model).model
    model.opset_imports.pop(memory_op.DOMAIN, None)
    model.meta.clear()
    _set_tokens(model.graph, tokens)
    _simplify(model)
    while any(_is_control_flow(node) for node in model.graph):
        _open_next(model.graph)
        _simplify(model)
    CommonSubexpressionEliminationPass(size_limit=_LARGEST_SHARED)(model)
    _simplify(model)
    _refuse_what_is_left(model)
    return model


def _keep_empty_tiles(function: ir.Function) -> None:
    """How many tiles hold a token depends on data; one that holds none changes nothing."""
    for node in function.all_nodes():
        whole = node.inputs[0] if node.inputs else None
        if str(node.outputs[0].name).startswith(KEPT) and whole is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], whole)


def _set_tokens(graph: ir.Graph, tokens: int) -> None:
    """Give the axis of tokens its size, and forget what was said of other free sizes within the graph."""
    ends = (*graph.inputs, *graph.outputs)
    for value in ends:
        value.shape = ir.Shape([tokens if str(axis) == "tokens" else axis for axis in value.shape or ()])
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None and value not in ends:
                value.shape = ir.Shape([axis if isinstance(axis, int) else None for axis in value.shape])


def _simplify(model: ir.Model) -> None:
    """Fold what is known, and remove what nothing needs any more, until that changes nothing."""
    before = -1
    while before != (before := len(model.graph)):
        NameFixPass()(model)
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
        IdentityEliminationPass()(model)
        RemoveUnusedNodesPass()(model)


def _is_control_flow(node: ir.Node) -> bool:
    return any(item.type == ir.AttributeType.GRAPH for item in node.attributes.values())


def _open_next(graph: ir.Graph) -> None:
    """Replace the first node of control flow."""
    node = next(node for node in graph if _is_control_flow(node))
    if node.op_type == "If":
        _open_if(graph, node)
    elif node.op_type == "Scan":
        _open_scan(graph, node)
    else:
        raise UsageError(
            f"--scan unrolled: a {node.op_type}, whose end depends on data; choose plugin or scan"
        )


def _open_if(graph: ir.Graph, node: ir.Node) -> None:
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    condition = node.inputs[0].const_value if node.inputs[0] is not None else None
    if condition is not None:
        branch = branches[0 if bool(condition.numpy().item()) else 1]
    else:
        general = [branch for branch in branches if branch.name in GENERAL]
        if not general:
            names = " or ".join(str(branch.name) for branch in branches)
            raise UsageError(f"--scan unrolled: whether {names} runs depends on data; choose plugin or scan")
        branch = general[0]
    _hoist_initializers(graph, branch)
    ends = list(branch.outputs)
    nodes = _taken_out(branch)
    graph.insert_before(node, nodes)
    _replace(graph, node, ends)


def _open_scan(graph: ir.Graph, node: ir.Node) -> None:
    body = node.attributes["body"].as_graph()
    _hoist_initializers(graph, body)
    others = node.attributes.keys() - {"body", "num_scan_inputs"}
    if others:
        raise UsageError(f"--scan unrolled: a Scan with {', '.join(sorted(others))}, which none of ours has")
    streamed = node.attributes["num_scan_inputs"].as_int()
    given = [value for value in node.inputs if value is not None]
    states, elements = given[:-streamed], given[-streamed:]
    count = _count(node, elements)
    gathered: list[list[ir.Value]] = [[] for _ in node.outputs[len(states) :]]
    for index in range(count):
        turn = body.clone(allow_outer_scope_values=True)
        picked = [_element(graph, node, value, index, count) for value in elements]
        inputs = dict(zip(turn.inputs, (*states, *picked), strict=True))
        ends = [inputs.get(value, value) for value in turn.outputs]
        for formal, actual in inputs.items():
            ir.convenience.replace_all_uses_with(formal, actual)
        graph.insert_before(node, _taken_out(turn))
        states, results = ends[: len(states)], ends[len(states) :]
        for found, value in zip(gathered, results, strict=True):
            found.append(_added(graph, node, "Unsqueeze", [value, _index(graph, node, [0])]))
    streams = [found[0] if count == 1 else _added(graph, node, "Concat", found, axis=0) for found in gathered]
    _replace(graph, node, [*states, *streams])


def _count(node: ir.Node, elements: Sequence[ir.Value]) -> int:
    """How often a Scan runs: the first size of what it runs over."""
    for value in elements:
        if value.shape is not None and isinstance(value.shape[0], int):
            return value.shape[0]
    raise UsageError(
        f"--scan unrolled: how often {node.name or node.op_type} runs does not follow from the tokens"
    )


def _element(graph: ir.Graph, before: ir.Node, value: ir.Value, index: int, count: int) -> ir.Value:
    if count == 1:
        return _added(graph, before, "Squeeze", [value, _index(graph, before, [0])])
    return _added(graph, before, "Gather", [value, _index(graph, before, index)], axis=0)


def _index(graph: ir.Graph, before: ir.Node, value: int | list[int]) -> ir.Value:
    attribute = (
        ir.AttrInt64("value_int", value) if isinstance(value, int) else ir.AttrInt64s("value_ints", value)
    )
    node = ir.Node("", "Constant", [], [attribute])
    graph.insert_before(before, node)
    return node.outputs[0]


def _added(
    graph: ir.Graph, before: ir.Node, op_type: str, inputs: Sequence[ir.Value], **attributes: int
) -> ir.Value:
    node = ir.Node("", op_type, inputs, [ir.AttrInt64(name, value) for name, value in attributes.items()])
    graph.insert_before(before, node)
    return node.outputs[0]


def _hoist_initializers(graph: ir.Graph, inner: ir.Graph) -> None:
    """Let the constants of a subgraph be those of the graph around it."""
    for name in list(inner.initializers):
        value = inner.initializers.pop(name)
        while value.name in graph.initializers:
            value.name = f"{value.name}.inner"
        graph.register_initializer(value)


def _taken_out(graph: ir.Graph) -> list[ir.Node]:
    """The nodes of a subgraph, for another graph."""
    graph.outputs.clear()
    nodes = list(graph)
    graph.remove(nodes)
    return nodes


def _replace(graph: ir.Graph, node: ir.Node, values: Sequence[ir.Value]) -> None:
    """Let ``values`` stand for the outputs of a node, which goes."""
    for old, new in zip(node.outputs, values, strict=True):
        if old in graph.outputs:  # a graph's output keeps its name
            end = _added(graph, node, "Identity", [new])
            end.name, end.type, end.shape = old.name, old.type, old.shape
            graph.outputs[list(graph.outputs).index(old)] = end
        ir.convenience.replace_all_uses_with(old, new)
    graph.remove(node, safe=True)


def _refuse_what_is_left(model: ir.Model) -> None:
    """No control flow, no function, no operator that is not ONNX's own."""
    foreign = {f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes() if node.domain}
    if foreign or model.functions:
        raise UsageError(
            f"--scan unrolled: {', '.join(sorted(foreign))} would be left; choose plugin or scan"
        )

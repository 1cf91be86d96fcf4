"""Recurrences as model-local ONNX functions, put together from traced parts.

The body is ``If (one token, not apart) {one} else {tiles, Scan over step, rows}``, or with a step that takes
all tiles together ``{tiles, step, rows}`` and a function, with a ``Scan``, for each loop within the step.
Each part is traced from PyTorch by itself, so that what runs in a graph is what runs in training, and only
the loop is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir

from titans_converters import memory_op
from titans_converters.onnx.function import OPSET
from titans_converters.onnx.trace import trace_graph
from titans_converters.program import LoopProgram, Program, RecurrenceProgram

KEPT = "kept."
"""Prefix of what a tile is cut from once empty tiles are left out; a converter may leave them in."""


class RecurrenceFunctions(NamedTuple):
    """Bodies of one operator: its own and, where its recurrence reveals something, one that puts that out.

    ``loops``: what the body calls.
    """

    body: ir.Function
    revealing: ir.Function | None
    loops: list[ir.Function]


Parts = Mapping[str, ir.Graph]
"""The traced parts of a recurrence by their names: each is used more than once."""


def recurrence_functions(recurrence: RecurrenceProgram) -> RecurrenceFunctions:
    """The operator's bodies, for any batch and any number of tokens."""
    programs = (recurrence.one, recurrence.tiles, recurrence.step, recurrence.rows)
    parts = {program.name: trace_graph(program) for program in programs}
    plain = _function(recurrence, parts, reveal=False)
    revealing = _function(recurrence, parts, reveal=True) if recurrence.revealed else None
    return RecurrenceFunctions(plain, revealing, [_loop_function(loop) for loop in recurrence.loops])


def _loop_function(loop: LoopProgram) -> ir.Function:
    """One ``Scan`` over tiles."""
    step = loop.step
    inputs = {name: _like_example(name, step) for name in step.inputs}
    for name in loop.tiles:
        inputs[name].shape = ir.Shape([None] * (1 + len(step.input_axes[name])))
    moving = {name: _sized(f"step.{name}", step, name) for name in (*loop.carry, *loop.tiles)}
    parts = {step.name: trace_graph(step)}
    nodes, outputs = _splice(step, parts, "step.", {**inputs, **moving}, list(step.output_axes))
    body = ir.Graph(list(moving.values()), list(outputs.values()), nodes=nodes, name="tile")
    scan = ir.Node(
        "",
        "Scan",
        [inputs[name] for name in (*loop.carry, *loop.tiles)],
        [ir.AttrGraph("body", body), ir.AttrInt64("num_scan_inputs", len(loop.tiles))],
        num_outputs=len(step.output_axes),
    )
    for value, name in zip(scan.outputs, step.output_axes, strict=True):
        value.name = name
        _set_type(value, step, name)
    for value in scan.outputs[len(loop.carry) :]:
        value.shape = ir.Shape([None] * (1 + len(value.shape or ())))
    graph = ir.Graph(
        list(inputs.values()),
        list(scan.outputs),
        nodes=[scan],
        opset_imports={"": OPSET, memory_op.DOMAIN: memory_op.VERSION},
        name=loop.name,
    )
    return ir.Function(memory_op.DOMAIN, loop.name, graph=graph, attributes=[])


def _function(recurrence: RecurrenceProgram, parts: Parts, reveal: bool) -> ir.Function:
    inputs = {name: _like_example(name, recurrence.one) for name in recurrence.one.inputs}
    condition = _is_single(recurrence, inputs)
    names = [name for name in recurrence.one.output_axes if reveal or name != recurrence.revealed]
    branches = {
        "then_branch": _one_token(recurrence, parts, inputs, names),
        "else_branch": _tiles(recurrence, parts, inputs, names),
    }
    choice = ir.Node(
        "",
        "If",
        [condition[-1].outputs[0]],
        [ir.AttrGraph(name, graph) for name, graph in branches.items()],
        num_outputs=len(names),
    )
    for value, name in zip(choice.outputs, names, strict=True):
        value.name = name
    graph = ir.Graph(
        list(inputs.values()),
        list(choice.outputs),
        nodes=[*condition, choice],
        opset_imports={"": OPSET, memory_op.DOMAIN: memory_op.VERSION},
        name=recurrence.name,
    )
    # Declared, like those of the other operator, for readers of the graph; the body is built for them.
    attributes = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in memory_op.ATTRIBUTES]
    return ir.Function(memory_op.DOMAIN, recurrence.name, graph=graph, attributes=attributes)


def _is_single(recurrence: RecurrenceProgram, inputs: Mapping[str, ir.Value]) -> list[ir.Node]:
    """Whether there is one token, which no row has at a place apart: the last node's scalar."""
    query = inputs[recurrence.tokens[0]]
    shape, axis = _node("Shape", [query], start=2, end=3), _constant("unit", [1])
    single = _node("Equal", [shape.outputs[0], axis.outputs[0]])
    nodes = [shape, axis, single, _node("Squeeze", [single.outputs[0]])]
    if recurrence.apart:
        tile, apart = _constant("tile", [recurrence.tile]), _constant("apart", recurrence.apart)
        place = _node("Mod", [inputs["position"], tile.outputs[0]])
        places = _node("Unsqueeze", [place.outputs[0], axis.outputs[0]])
        equal = _node("Equal", [places.outputs[0], apart.outputs[0]])
        ones = _node("Cast", [equal.outputs[0]], to=ir.DataType.INT64)
        any_ = _node("ReduceMax", [ones.outputs[0]], keepdims=0)
        bool_ = _node("Cast", [any_.outputs[0]], to=ir.DataType.BOOL)
        none = _node("Not", [bool_.outputs[0]])
        both = _node("And", [nodes[-1].outputs[0], none.outputs[0]])
        nodes += [tile, apart, place, places, equal, ones, any_, bool_, none, both]
    for index, node in enumerate(nodes):
        if not node.outputs[0].name:
            node.outputs[0].name = f"is_single_{index}"
    return nodes


def _one_token(
    recurrence: RecurrenceProgram, parts: Parts, inputs: Mapping[str, ir.Value], names: Sequence[str]
) -> ir.Graph:
    nodes, outputs = _splice(recurrence.one, parts, "one.", inputs, names)
    return ir.Graph([], [outputs[name] for name in names], nodes=nodes, name="one_token")


def _tiles(
    recurrence: RecurrenceProgram, parts: Parts, inputs: Mapping[str, ir.Value], names: Sequence[str]
) -> ir.Graph:
    cut_nodes, tiles = _splice(recurrence.tiles, parts, "cut.", inputs)
    count_nodes, tiles = _without_empty(tiles)
    if recurrence.together:
        nodes, last, streamed_tiles = _together(recurrence, parts, {**inputs, **tiles})
    else:
        nodes, last, streamed_tiles = _scan(recurrence, parts, inputs, tiles, names)
    bindings = {**inputs, **streamed_tiles}
    streamed = [name for name in names if name in recurrence.rows.output_axes]
    row_nodes, rows = _splice(recurrence.rows, parts, "rows.", bindings, streamed)
    results = {**rows, **last}
    return ir.Graph(
        [],
        [results[name] for name in names],
        nodes=[*cut_nodes, *count_nodes, *nodes, *row_nodes],
        name="tiles",
    )


Found = tuple[list[ir.Node], dict[str, ir.Value], dict[str, ir.Value]]
"""Nodes, the state after them by name, and what they put out, ``tiles.<name>``."""


def _together(recurrence: RecurrenceProgram, parts: Parts, bindings: Mapping[str, ir.Value]) -> Found:
    nodes, outputs = _splice(recurrence.step, parts, "step.", bindings, list(recurrence.step.output_axes))
    output = recurrence.output
    return (
        nodes,
        {name: value for name, value in outputs.items() if name != output},
        {f"tiles.{output}": outputs[output]},
    )


def _scan(
    recurrence: RecurrenceProgram,
    parts: Parts,
    inputs: Mapping[str, ir.Value],
    tiles: Mapping[str, ir.Value],
    names: Sequence[str],
) -> Found:
    """A loop over the step."""
    step, carried = recurrence.step, recurrence.carry
    body_inputs = {name: _sized(f"step.{name}", step, name) for name in (*carried, *tiles)}
    nodes, outputs = _splice(step, parts, "step.", {**inputs, **body_inputs}, names)
    streamed = [name for name in names if name in recurrence.rows.output_axes]
    states = [name for name in names if name not in streamed]
    body = ir.Graph(
        list(body_inputs.values()),
        [outputs[name] for name in (*states, *streamed)],
        nodes=nodes,
        name="tile",
    )
    scan = ir.Node(
        "",
        "Scan",
        [*(inputs[name] for name in carried), *tiles.values()],
        [ir.AttrGraph("body", body), ir.AttrInt64("num_scan_inputs", len(tiles))],
        num_outputs=len(states) + len(streamed),
    )
    for value, name in zip(scan.outputs, (*states, *streamed), strict=True):
        value.name = f"tiles.{name}"
    last = dict(zip(states, scan.outputs, strict=False))
    # A trace may read sizes off what is not put out here: its tiles are as many as those of the read.
    read = scan.outputs[len(states) + streamed.index(recurrence.output)]
    found = {f"tiles.{name}": read for name in recurrence.rows.output_axes}
    found |= {str(value.name): value for value in scan.outputs[len(states) :]}
    for name, value in last.items():
        _set_type(value, step, name)
    return [scan], last, found


def _without_empty(tiles: Mapping[str, ir.Value]) -> tuple[list[ir.Node], dict[str, ir.Value]]:
    """The tiles that hold a token: the last one may hold none, since it is there for rows that begin late."""
    zero, axes = _constant("tiles.zero", [0]), _constant("tiles.axes", [1, 2])
    ones = _node("Cast", [tiles["live"]], to=ir.DataType.INT64)
    held = _node("ReduceMax", [ones.outputs[0], axes.outputs[0]], keepdims=0)
    count = _node("ReduceSum", [held.outputs[0]], keepdims=1)
    nodes = [zero, axes, ones, held, count]
    for name, node in (("ones", ones), ("held", held), ("count", count)):
        node.outputs[0].name = f"tiles.{name}"
    kept = {}
    for name, value in tiles.items():
        node = _node("Slice", [value, zero.outputs[0], count.outputs[0], zero.outputs[0]])
        node.outputs[0].name = f"{KEPT}{name}"
        nodes.append(node)
        kept[name] = node.outputs[0]
    return nodes, kept


def _splice(
    program: Program,
    parts: Parts,
    prefix: str,
    bindings: Mapping[str, ir.Value],
    wanted: Sequence[str] | None = None,
) -> tuple[list[ir.Node], dict[str, ir.Value]]:
    """The nodes of a traced program, reading ``bindings`` in place of its inputs; and its outputs.

    Those that are not ``wanted`` are left out, and the nodes that they alone need.

    Names get ``prefix``: in a graph within a graph none may occur twice. Initializers become constants,
    since a function has none.
    """
    graph = parts[program.name].clone()
    nodes: list[ir.Node] = []
    for name, value in list(graph.initializers.items()):
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", _tensor(name, value))])
        constant.outputs[0].name = name
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        nodes.append(constant)
    for value in graph.inputs:
        ir.convenience.replace_all_uses_with(value, bindings[str(value.name)])
    traced = list(graph)
    ends = [bindings[str(value.name)] if value in graph.inputs else value for value in graph.outputs]
    graph.outputs.clear()  # what remains is no graph's output but that of the graph that is put together
    graph.remove(traced)
    nodes += traced
    outputs: dict[str, ir.Value] = {}
    own = {value for node in traced for value in node.outputs}
    for name, end in zip(program.output_axes, ends, strict=True):
        if wanted is not None and name not in wanted:
            continue
        if end in own and end not in outputs.values():
            _set_type(end, program, name)
            outputs[name] = end
            continue
        # An output of its own, even where the program hands an input through or one value out twice: a copy,
        # which ONNX Runtime does make.
        identity = _node("Identity", [end])
        identity.outputs[0].name = f"out.{name}"
        _set_type(identity.outputs[0], program, name)
        nodes.append(identity)
        outputs[name] = identity.outputs[0]
    if wanted is not None:
        nodes = _needed(nodes, outputs.values())
    for node in nodes:
        node.name = None
        for value in node.outputs:
            value.name = prefix + str(value.name)
    return nodes, outputs


def _needed(nodes: Sequence[ir.Node], outputs: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that ``outputs`` depend on; traced parts hold no graphs of their own."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted.update(value for value in node.inputs if value is not None)
        else:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
    return kept[::-1]


def _tensor(name: str, value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ValueError(f"initializer {name} has no value")
    return value.const_value


def _like_example(name: str, program: Program, of: str | None = None) -> ir.Value:
    """A value of the dtype and rank of a program's input."""
    value = ir.Value(name=name)
    _set_type(value, program, of or name)
    return value


def _sized(name: str, program: Program, of: str) -> ir.Value:
    """The same, with its sizes: outside a loop inference loses them, and gradients would look for them."""
    value = _like_example(name, program, of)
    value.shape = ir.Shape(program.input_axes[of])
    return value


def _set_type(value: ir.Value, program: Program, name: str) -> None:
    """Dtype and rank; sizes are left open."""
    axes = (program.input_axes | program.output_axes)[name]
    dtype = str(program.dtype(name)).removeprefix("torch.")
    names = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "bool": ir.DataType.BOOL}
    value.type = ir.TensorType(names[dtype])
    value.shape = ir.Shape([None] * len(axes))


def _node(op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Node:
    """A node whose attributes are integers."""
    return ir.Node("", op_type, inputs, [ir.AttrInt64(name, value) for name, value in attributes.items()])


def _constant(name: str, values: Sequence[int]) -> ir.Node:
    node = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", values)])
    node.outputs[0].name = name
    return node

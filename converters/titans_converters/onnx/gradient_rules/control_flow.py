"""Derivatives of branches and loops: each becomes another one that runs backwards."""

from __future__ import annotations

from typing import Any

from onnx import GraphProto, NodeProto, helper

from titans_converters.onnx.autodiff import Tape, captured, pruned, renamed_copy, rule, subgraphs, typed_value
from titans_converters.onnx.gradient_rules.common import Gradients, attributes


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
    floats = [name for name in states if tape.types.differentiable(name)]
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

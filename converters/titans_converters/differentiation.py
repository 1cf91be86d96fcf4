"""A graph's loss, differentiated with respect to the memories that it comes in with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx
import onnx.inliner
import onnx.shape_inference
from onnx import GraphProto, ModelProto, NodeProto, helper

from titans_converters import memory_op
from titans_converters.as_autograd import APART, DETACHED
from titans_converters.memory_rules import known, note_alike, note_sizes
from titans_converters.onnx import gradient_rules  # noqa: F401 - registers the rules
from titans_converters.onnx.autodiff import Names, Tape, Types, captured, pruned, subgraphs
from titans_converters.onnx.function import GENERAL
from titans_converters.onnx.gradient_rules.elementwise import silus

_LOSS = "loss"


def gradient(
    model: ModelProto, memories: Sequence[str], name: str, sources: Mapping[str, str] | None = None
) -> ModelProto:
    """Differentiate a graph's output ``loss`` with respect to memories.

    Args:
        model: with an output ``loss (B,)``, and inputs ``past.<memory>``.
        memories: names of those whose gradient is wanted.
        name: of the result, ``gradient.<objective>``.
        sources: the value to differentiate by, where it is another than ``past.<memory>``.

    Returns:
        The graph with the outputs of ``model`` and ``grad.<memory>`` for every memory; zero where the loss
        does not depend on one.

    Raises:
        ValueError: an operator between the memories and the loss has no derivative here; the message
            names it.
    """
    inlined = onnx.inliner.inline_local_functions(model)
    general = list(_general(inlined.graph.node))
    stopped = frozenset(_read_notes(general))
    del inlined.graph.node[:]
    inlined.graph.node.extend(general)
    note_sizes(inlined.graph)
    whole = onnx.shape_inference.infer_shapes(inlined, data_prop=True)
    graph = whole.graph
    types = Types(graph)
    note_alike(graph.node, types)
    tape = Tape(graph.node, types, Names())
    pasts = [f"past.{memory}" for memory in memories]
    tape.known = dict(silus(graph.node)) | dict(known(graph.node))
    tape.stopped = stopped
    one = helper.make_tensor("one", types.elements[_LOSS], [1], [1])
    seed = tape.op("ConstantOfShape", tape.op("Shape", _LOSS), value=one)
    by = {memory: (sources or {}).get(memory, past) for memory, past in zip(memories, pasts, strict=True)}
    found = tape.backward({_LOSS: seed}, by.values())
    inputs = {info.name: info for info in graph.input}
    outputs = list(graph.output)
    for memory, past in zip(memories, pasts, strict=True):
        result, gradient_of = f"grad.{memory}", found.get(by[memory])
        tape.nodes.append(helper.make_node("Identity", [gradient_of or tape.zeros_like(past)], [result]))
        outputs.append(_renamed(inputs[past], result))
    return _model(whole, graph, tape.nodes, outputs, name)


def _read_notes(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Names of values that autograd takes for constants. Makes plain what noted them, in place."""
    for node in nodes:
        if node.domain == memory_op.DOMAIN and node.op_type in (DETACHED, APART):
            if node.op_type == DETACHED:
                yield node.output[0]
            node.domain, node.op_type = "", "Identity"
            del node.attribute[:]


def _general(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes with the memory rule's general form in place of its choices between forms.

    A choice is differentiated by computing the branch again, within a branch again: three times in all.
    """
    for node in nodes:
        branch = next((graph for graph in subgraphs(node) if graph.name in GENERAL), None)
        if node.op_type != "If" or branch is None:
            yield node
            continue
        yield from _general(branch.node)
        for info, name in zip(branch.output, node.output, strict=True):
            yield helper.make_node("Identity", [info.name], [name])


def _renamed(info: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(info)
    copy.name = name
    return copy


def _model(
    whole: ModelProto,
    graph: GraphProto,
    nodes: Sequence[NodeProto],
    outputs: Sequence[onnx.ValueInfoProto],
    name: str,
) -> ModelProto:
    """The model of the nodes that the outputs need."""
    kept = pruned(nodes, [info.name for info in outputs])
    used = {value for node in kept for value in _values(node)}
    result = helper.make_graph(
        kept,
        name,
        [info for info in graph.input if info.name in used],
        outputs,
        [tensor for tensor in graph.initializer if tensor.name in used],
    )
    opsets = [opset for opset in whole.opset_import if opset.domain != memory_op.DOMAIN]
    return helper.make_model(result, opset_imports=opsets, ir_version=whole.ir_version)


def _values(node: NodeProto) -> Iterable[str]:
    yield from node.input
    for inner in subgraphs(node):
        yield from captured(inner)

"""A model's graph → the graphs of its gradients with respect to its memories.

Every gradient graph has one interface, by names: inputs ``input_ids (B, T)``, ``edit`` and ``past.*``,
and ``target_ids (B, T)`` where the loss is one of prediction; outputs ``loss (B)``, the sum over the
tokens, ``grad.<memory>``, and the model's own gates, ``gate.<memory>.<retention|momentum|step>``.
Gradients are with respect to the state as it came in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from titans_converters import memory_op
from titans_converters.differentiation import gradient
from titans_converters.onnx.autodiff import Names, Tape, Types
from titans_converters.onnx.trace import REVEALING

NORM_EPS = 1e-3
"""In the LayerNorm of a deep memory, as ``titans_export.memory.mlp`` has it."""


def gradient_graphs(
    model: ir.Model, memories: Sequence[str], report: Callable[[str], None] = lambda _: None
) -> dict[str, ir.Model]:
    """All gradient graphs that a traced graph ``model`` allows, by name.

    One of prediction where it has logits, one of association where its memories are operators that tell
    what they are taught, and none where it has no memories. A graph with an operator that has no derivative
    here has none of prediction; ``report`` is told which.
    """
    found = {}
    if memories and any(value.name == "logits" for value in model.graph.outputs):
        try:
            found["gradient.prediction"] = prediction_gradient(model, memories)
        except ValueError as error:
            report(f"no graph gradient.prediction: {error}")
    if memories and _layers(_opened(model)[0], model, memories):
        found["gradient.association"] = association_gradient(model, memories)
    return {name: ir.from_proto(proto) for name, proto in found.items()}


def prediction_gradient(model: ir.Model, memories: Sequence[str]) -> ModelProto:
    """``gradient.prediction``: the next-token loss through the whole network, all memories jointly.

    The loss of a row is the sum of ``-log p(target)`` over its tokens, in nats; a target below 0 is
    unknown or must not be learnt from, and counts nothing.

    Args:
        model: a graph ``model`` as it was traced, with the output ``logits (B, T, V)``.
        memories: names of the state entries to differentiate by.
    """
    writer, inputs, logits = _opened(model)
    batch, tokens, vocab = _axes(logits)
    ids = writer.op("Constant", value=numpy_helper.from_array(np.arange(int(vocab), dtype=np.int64)))
    target = writer.op("Unsqueeze", "target_ids", writer.ints(-1))
    one_hot = writer.op("Cast", writer.op("Equal", target, ids), to=TensorProto.FLOAT)
    log_probability = writer.op("LogSoftmax", logits.name, axis=-1)
    parts = writer.op("Mul", log_probability, one_hot)
    loss = writer.op("Neg", writer.op("ReduceSum", parts, writer.ints(1, 2), keepdims=0))
    inputs.append(helper.make_tensor_value_info("target_ids", TensorProto.INT64, [batch, tokens]))
    outputs = {"loss": (loss, (batch,))} | _gates(writer, _layers(writer, model, memories), batch, tokens)
    return gradient(_closed(model, writer, inputs, outputs), memories, "gradient.prediction")


def association_gradient(model: ir.Model, memories: Sequence[str]) -> ModelProto:
    """``gradient.association``: ``½ ‖f_M(k) - v‖²`` of every layer, summed over heads and tokens.

    Keys and values are what the layer's own rule is given in a forward pass at ``edit``; no gradient
    flows into them. ``loss`` is the sum over layers, ``loss.<layer>`` one layer's part.

    Args:
        model: a graph ``model`` as it was traced.
        memories: names of the state entries to differentiate by.

    Raises:
        ValueError: no operator of ours has a memory among ``memories``.
    """
    writer, inputs, scores = _opened(model)
    batch, tokens, _ = _axes(scores)
    layers = _layers(writer, model, memories)
    if not layers:
        raise ValueError("gradient.association: the graph has no memory operator")
    outputs: dict[str, tuple[str, tuple[int | str, ...]]] = {}
    alias = {memory: writer.op("Identity", f"past.{memory}") for layer in layers for memory in layer.memories}
    for layer in layers:
        weights = [alias[memory] for memory in layer.memories]
        outputs[f"loss.{layer.name}"] = (_associative_loss(writer, layer, weights), (batch,))
    losses = [value for value, _ in outputs.values()]
    total = {"loss": (functools.reduce(lambda a, b: writer.op("Add", a, b), losses), (batch,))}
    outputs = total | outputs | _gates(writer, layers, batch, tokens)
    closed = _closed(model, writer, inputs, outputs)
    return gradient(closed, memories, "gradient.association", sources=alias)


class _Layer(NamedTuple):
    """What one layer's rule is given: names of values.

    Attributes:
        name: what the names of its memories begin with.
        memories: its weights, the first layer's first.
        key: ``(B, H, T, D)``.
        value: likewise.
        gates: ``log_retention``, ``log_momentum`` and ``step (B, H, T)``, as far as they are there.
        heads: their number.
        deep: whether the memory is an MLP.
    """

    name: str
    memories: tuple[str, ...]
    heads: int
    deep: bool
    key: str
    value: str
    gates: dict[str, str]


def _layers(writer: Tape, model: ir.Model, memories: Sequence[str]) -> list[_Layer]:
    """The operators of ours in a graph, and what their memories are taught.

    One that derives that within itself is exchanged for its revealing form.
    """
    layers = []
    heads = {memory: _input_axes(model, f"past.{memory}")[1] for memory in memories}
    for node in list(writer.nodes):
        own = tuple(memory for memory in memories if f"past.{memory}" in node.input)
        if node.domain != memory_op.DOMAIN or not own:
            continue
        if node.op_type in TAUGHT:
            taught = _given(node)
        elif node.op_type in model.meta.get(REVEALING, {}):
            taught = _revealed(writer, node, _input_axes(model, f"past.{own[0]}"))
        else:
            continue
        name = own[0].removesuffix(".0")
        layers.append(_Layer(name, own, heads[own[0]], own[0].endswith(".0"), **taught))
    return layers


TAUGHT = {
    memory_op.NAME: memory_op.INPUTS[:6],
    "PeriodicMemory": ("position", "query", "key", "value", "log_retention", "step", "log_momentum"),
}
"""Names of the first inputs of operators that are given what their memory is taught."""


def _given(node: NodeProto) -> dict[str, Any]:
    given = dict(zip(TAUGHT[node.op_type], node.input, strict=False))
    if given.get("log_momentum", "past.").startswith("past."):  # without momentum the state follows
        given.pop("log_momentum", None)
    gates = {name: given[name] for name in ("log_retention", "log_momentum", "step") if name in given}
    return {"key": given["key"], "value": given["value"], "gates": gates}


def _revealed(writer: Tape, node: NodeProto, memory: Sequence[int]) -> dict[str, Any]:
    """One more output of an operator: ``[key | value | log retention | step | log momentum]``."""
    revealed = f"{node.output[0]}.revealed"
    node.output.append(revealed)
    momentum = any(name.startswith("past.") and ".momentum" in name for name in node.input)
    names = ("log_retention", "step", "log_momentum")[: 3 if momentum else 2]
    _, heads, width, _ = memory
    sizes = writer.ints(width, width, len(names))
    key, value, logs = writer.emit("Split", [revealed, sizes], 3, axis=3)
    for name in (key, value):  # shape inference does not see through the operator's body
        writer.types.elements[name] = TensorProto.FLOAT
        writer.types.shapes[name] = (None, heads, None, width)
    columns = {
        name: writer.op(
            "Squeeze",
            writer.op("Slice", logs, *(writer.ints(i) for i in (index, index + 1, 3))),
            writer.ints(3),
        )
        for index, name in enumerate(names)
    }
    return {"key": key, "value": value, "gates": columns}


def _associative_loss(writer: Tape, layer: _Layer, weights: Sequence[str]) -> str:
    """``½ ‖f_M(k) - v‖²``, one number a row; ``f_M`` as in ``docs/mathematics.md``, section 6."""
    answer = writer.op("MatMul", layer.key, weights[0])
    for weight in weights[1:]:
        answer = writer.op("MatMul", writer.op("Gelu", answer), weight)
    if layer.deep:
        one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1])
        scale = writer.op("ConstantOfShape", writer.op("Shape", layer.key, start=3, end=4), value=one)
        normal = writer.op("LayerNormalization", answer, scale, axis=-1, epsilon=NORM_EPS)
        answer = writer.op("Add", layer.key, normal)
    error = writer.op("Sub", answer, layer.value)
    squares = writer.op("ReduceSum", writer.op("Mul", error, error), writer.ints(1, 2, 3), keepdims=0)
    return writer.op("Mul", squares, writer.number(0.5, squares))


def _gates(
    writer: Tape, layers: Sequence[_Layer], batch: int | str, tokens: int | str
) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """Outputs ``gate.<memory>.<name> (B, H, T)`` of every memory."""
    outputs: dict[str, tuple[str, tuple[int | str, ...]]] = {}
    for layer in layers:
        for name, value in layer.gates.items():
            gate = writer.op("Exp", value) if name.startswith("log_") else value
            for memory in layer.memories:
                shape = (batch, layer.heads, tokens)
                outputs[f"gate.{memory}.{name.removeprefix('log_')}"] = (gate, shape)
    return outputs


Axes = tuple[int | str, ...]


def _opened(model: ir.Model) -> tuple[Tape, list[onnx.ValueInfoProto], onnx.ValueInfoProto]:
    """A traced model's nodes to add to, its inputs, and its first output: what it says of every token."""
    graph = ir.to_proto(model).graph
    return Tape(graph.node, Types(), Names("a")), list(graph.input), graph.output[0]


def _axes(info: onnx.ValueInfoProto) -> tuple[int | str, int | str, int | str]:
    batch, tokens, width = (
        axis.dim_value if axis.HasField("dim_value") else axis.dim_param
        for axis in info.type.tensor_type.shape.dim
    )
    return batch, tokens, width


def _input_axes(model: ir.Model, name: str) -> list[int]:
    """Sizes of an input; 0 for a free one."""
    (value,) = (value for value in model.graph.inputs if value.name == name)
    return [axis if isinstance(axis, int) else 0 for axis in value.shape or ()]


def _closed(
    model: ir.Model,
    writer: Tape,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Mapping[str, tuple[str, Axes]],
) -> ModelProto:
    """The model with other nodes and outputs, and with its operators' revealing bodies."""
    proto = ir.to_proto(model)
    del proto.graph.node[:], proto.graph.output[:], proto.graph.input[:]
    proto.graph.node.extend(writer.nodes)
    proto.graph.input.extend(inputs)
    for name, (value, axes) in outputs.items():
        proto.graph.node.append(helper.make_node("Identity", [value], [name]))
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, axes))
    for name, shape in writer.types.shapes.items():
        element = writer.types.elements[name]
        proto.graph.value_info.append(helper.make_tensor_value_info(name, element, shape))
    for name, function in model.meta.get(REVEALING, {}).items():
        (own,) = (one for one in proto.functions if one.name == name)
        own.CopyFrom(ir.to_proto(function))
    return proto

"""A program to an ONNX model, with the memory rule as one node a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from titans_converters import memory_op
from titans_converters.exported import dynamic_shapes
from titans_converters.onnx import sinkhorn
from titans_converters.onnx.function import OPSET, neural_memory_function
from titans_converters.program import Program, RecurrenceProgram
from titans_runtime.quiet import quiet

Tensors = tuple[Tensor, ...]

REVEALING = "titans.revealing"
"""Where a traced model keeps, beside its functions, those that gradient graphs take in their place."""


class Looping(Protocol):
    """What a node says of its loop."""

    @property
    def name(self) -> str:
        """Of the operator."""
        ...

    @property
    def results(self) -> list[tuple[int, ...]]:
        """Sizes of what a tile puts out, without axes of tiles and batch."""
        ...


class Recurrent(Protocol):
    """What a node says of its recurrence."""

    @property
    def name(self) -> str:
        """Of the operator."""
        ...

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        ...


def memory_node(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_retention: Tensor,
    log_momentum: Tensor,
    step: Tensor,
    edit: Tensor,
    past_memory: Tensor,
    past_momentum: Tensor,
    *,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for the memory rule while a model is traced: leaves one ``titans::NeuralMemory`` node."""
    output, memory, momentum = torch.onnx.ops.symbolic_multi_out(
        f"{memory_op.DOMAIN}::{memory_op.NAME}",
        (
            query,
            key,
            value,
            log_retention,
            log_momentum,
            step,
            edit,
            past_memory,
            past_momentum,
        ),
        memory_op.node_attributes(tile),
        dtypes=(query.dtype, past_memory.dtype, past_momentum.dtype),
        shapes=((*query.shape[:-1], past_memory.shape[-1]), past_memory.shape, past_momentum.shape),
        version=memory_op.VERSION,
    )
    return output, memory, momentum


def recurrence_node(
    core: Recurrent,
    position: Tensor,
    tokens: Tensors,
    carry: Tensors,
    shared: Tensors,
    width: int | None = None,
) -> tuple[Tensor, Tensors]:
    """Stands for a recurrence while a model is traced: leaves one ``titans::<name>`` node.

    ``width``: of its output; default is that of the first of ``tokens``.
    """
    output, *present = torch.onnx.ops.symbolic_multi_out(
        f"{memory_op.DOMAIN}::{core.name}",
        (position, *tokens, *carry, *shared),
        memory_op.node_attributes(core.tile),
        dtypes=(tokens[0].dtype, *(tensor.dtype for tensor in carry)),
        shapes=(
            (*tokens[0].shape[:-1], tokens[0].shape[-1] if width is None else width),
            *(tensor.shape for tensor in carry),
        ),
        version=memory_op.VERSION,
    )
    return output, tuple(present)


def loop_node(core: Looping, tiles: Tensors, carry: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
    """Stands for a loop over tiles while a model is traced: leaves one ``titans::<name>`` node."""
    like = tiles[0]
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{memory_op.DOMAIN}::{core.name}",
        (*tiles, *carry, *shared),
        {},
        dtypes=(*(tensor.dtype for tensor in carry), *(like.dtype for _ in core.results)),
        shapes=(
            *(tensor.shape for tensor in carry),
            *((like.shape[0], like.shape[1], *sizes) for sizes in core.results),
        ),
        version=memory_op.VERSION,
    )
    return tuple(outputs[: len(carry)]), tuple(outputs[len(carry) :])


def trace(program: Program, recurrences: Sequence[RecurrenceProgram] = ()) -> ir.Model:
    """Trace ``program`` with free axes, name its tensors, and give its memory nodes their bodies.

    Args:
        program: what to trace.
        recurrences: what its other nodes of ours stand for.

    Raises:
        ValueError: a free axis was fixed by the module's code; the message names the output.
    """
    from titans_converters.onnx.recurrence import recurrence_functions

    model = _export(program)
    model.graph.name = program.name
    _forget_tracing(model)
    _state_axes(model, program)
    _add_memory_function(model)
    used = {node.op_type for node in model.graph if node.domain == memory_op.DOMAIN}
    for recurrence in recurrences:
        if recurrence.name in used and recurrence.name != memory_op.NAME:  # whose body is written by hand
            functions = recurrence_functions(recurrence)
            model.functions[functions.body.identifier()] = functions.body
            for loop in functions.loops:
                model.functions[loop.identifier()] = loop
            if functions.revealing is not None:
                model.meta[REVEALING] = {
                    **model.meta.get(REVEALING, {}),
                    recurrence.name: functions.revealing,
                }
            model.opset_imports[memory_op.DOMAIN] = memory_op.VERSION
    _add_sinkhorn_function(model)
    return model


def trace_graph(program: Program) -> ir.Graph:
    """The graph of a part, without the tracer's notes."""
    model = _export(program)
    _forget_tracing(model)
    return model.graph


def _export(program: Program) -> ir.Model:
    with quiet():
        exported = torch.onnx.export(
            program.module,
            tuple(program.inputs.values()),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(program),
            input_names=list(program.inputs),
            output_names=list(program.output_axes),
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    if exported is None:
        raise ValueError(f"program {program.name}: torch.onnx.export returned nothing")
    _drop_thresholds(exported.model.graph)
    return exported.model


def _drop_thresholds(graph: ir.Graph) -> None:
    """Above a threshold PyTorch's softplus is its argument, by two operators; ONNX Runtime's is by itself."""
    for node in list(graph):
        if node.op_type != "Where":
            continue
        above, _, softplus = (value.producer() if value is not None else None for value in node.inputs)
        if softplus is None or softplus.op_type != "Softplus" or softplus.inputs[0] is not node.inputs[1]:
            continue
        if above is not None and above.op_type == "Greater" and above.inputs[0] is node.inputs[1]:
            ir.convenience.replace_all_uses_with(
                node.outputs[0], softplus.outputs[0], replace_graph_outputs=True
            )
            graph.remove(node, safe=True)
            graph.remove(above, safe=True)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a protocol buffer."""
    proto: onnx.ModelProto = ir.to_proto(model)
    return proto


def _state_axes(model: ir.Model, program: Program) -> None:
    """Write the program's axis names into the graph, and refuse an axis that tracing has fixed."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        axes = (program.input_axes | program.output_axes)[str(value.name)]
        for index, axis in enumerate(axes):
            traced = value.shape[index] if value.shape is not None else None
            if isinstance(axis, str) and isinstance(traced, int):
                raise ValueError(
                    f"program {program.name}: {value.name} has its axis {axis} fixed at {traced}"
                )
        value.shape = ir.Shape(axes)


def _forget_tracing(model: ir.Model) -> None:
    """Drop the tracer's notes: stack traces name files of the exporting machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _add_memory_function(model: ir.Model) -> None:
    nodes = [
        node for node in model.graph if (node.domain, node.op_type) == (memory_op.DOMAIN, memory_op.NAME)
    ]
    tiles = {node.attributes["tile"].as_int() for node in nodes}
    if len(tiles) > 1:
        raise ValueError(f"memory nodes with different tiles {sorted(tiles)}; one body serves them all")
    log_momentum = memory_op.INPUTS.index("log_momentum")
    momentum = not all(_is_shut(node.inputs[log_momentum]) for node in nodes)
    for tile in tiles:
        function = ir.serde.deserialize_function(neural_memory_function(tile, momentum))
        model.functions[function.identifier()] = function
        model.opset_imports[memory_op.DOMAIN] = memory_op.VERSION


def _is_shut(log_gate: ir.Value | None) -> bool:
    """Whether a gate's logs are ``-inf`` throughout, whatever the model is given."""
    node = log_gate.producer() if log_gate is not None else None
    if node is not None and node.op_type == "Expand":
        log_gate = node.inputs[0]
    constant = log_gate.const_value if log_gate is not None else None
    return constant is not None and bool(np.isneginf(constant.numpy()).all())


def _add_sinkhorn_function(model: ir.Model) -> None:
    everywhere = [*model.graph.all_nodes()]
    for function in model.functions.values():
        everywhere += function.all_nodes()
    nodes = [node for node in everywhere if (node.domain, node.op_type) == (memory_op.DOMAIN, sinkhorn.NAME)]
    forms = {(node.attributes["size"].as_int(), node.attributes["iterations"].as_int()) for node in nodes}
    if len(forms) > 1:
        raise ValueError(f"Sinkhorn nodes of different forms {sorted(forms)}; one body serves them all")
    for form in forms:
        function = ir.serde.deserialize_function(sinkhorn.sinkhorn_function(*form))
        model.functions[function.identifier()] = function
        model.opset_imports[memory_op.DOMAIN] = memory_op.VERSION

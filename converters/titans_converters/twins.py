"""Gradient graphs for PyTorch's formats: the twins of those in ONNX.

The counterpart of what :mod:`titans_converters.gradients` does to ONNX graphs, with the same interface: names
and their order are the twin's. What memories are taught is read off the traced model; autograd does the rest.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from titans_converters.exported import export, operator_of
from titans_converters.gradients import TAUGHT
from titans_converters.program import Axes, Program, RecurrenceProgram

_GATES = ("log_retention", "step", "log_momentum")
"""In the order in which a revealed output has them."""


@dataclass(frozen=True)
class GradientTwin:
    """A gradient graph that is to be written in one of PyTorch's formats.

    Attributes:
        name: ``gradient.prediction`` or ``gradient.association``.
        model: the program ``model``.
        input_axes: as the ONNX graph has them: what it does not need is not among them.
        output_axes: likewise.
    """

    name: str
    model: Program
    input_axes: dict[str, Axes]
    output_axes: dict[str, Axes]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names."""
        return tuple(self.input_axes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names."""
        return tuple(self.output_axes)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of an input or output."""
        if name == "target_ids":
            return torch.int64
        return self.model.dtype(name) if name in self.model.inputs else torch.float32

    @property
    def memories(self) -> tuple[str, ...]:
        """What the gradients are with respect to."""
        return tuple(name.removeprefix("grad.") for name in self.outputs if name.startswith("grad."))


def gradient_twin(model: Program, name: str, graph: ir.Model) -> GradientTwin:
    """The twin of an ONNX gradient graph."""

    def axes(values: Sequence[ir.Value]) -> dict[str, Axes]:
        return {
            str(value.name): tuple(
                axis if isinstance(axis, int) else str(axis.value) for axis in value.shape or ()
            )
            for value in values
        }

    return GradientTwin(name, model, axes(graph.graph.inputs), axes(graph.graph.outputs))


@dataclass(frozen=True)
class Taught:
    """One layer's memory, and where in the outputs of :func:`revealing` its lessons begin.

    Attributes:
        name: what the names of its weights begin with.
        memories: its weights, the first layer's first.
        start: index of the key; the value and the gates follow.
        gates: names of the gates.
    """

    name: str
    memories: tuple[str, ...]
    start: int
    gates: tuple[str, ...]

    @property
    def deep(self) -> bool:
        """Whether the memory is an MLP."""
        return self.memories[0].endswith(".0")


def revealing(
    program: Program, memories: Sequence[str], recurrences: Mapping[str, RecurrenceProgram]
) -> tuple[fx.GraphModule, list[Taught]]:
    """The traced model, with its first output and then key, value and gates of every layer's memory.

    An operator of ours that derives these within itself has one more result than without.
    """
    traced = export(program).module()
    nodes = list(traced.graph.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    pasts = dict(zip(places, program.inputs, strict=True))
    (output,) = (node for node in nodes if node.op == "output")
    results, layers = [output.args[0][0]], []
    with traced.graph.inserting_before(output):
        for node in nodes:
            name = operator_of(node)
            inputs = node.args[0] if name is not None else ()
            given = [pasts.get(argument, "") for argument in inputs]
            own = tuple(memory for memory in memories if f"past.{memory}" in given)
            if name is None or not own:
                continue
            lessons = dict(_given(name, inputs, given))
            if recurrences[name].revealed is not None:
                lessons = dict(_revealed(traced.graph, node, recurrences[name], given))
            if lessons:
                gates = tuple(gate for gate in _GATES if gate in lessons)
                layers.append(Taught(own[0].removesuffix(".0"), own, len(results), gates))
                results += [lessons[key] for key in ("key", "value", *gates)]
    output.args = (tuple(results),)
    traced.recompile()
    return traced, layers


def _given(name: str, inputs: Sequence[fx.Node], names: Sequence[str]) -> Iterator[tuple[str, fx.Node]]:
    """Of an operator that is given what its memory is taught."""
    for key, node, known in zip(TAUGHT.get(name, ()), inputs, names, strict=False):
        if not known.startswith("past.") or key == "position":  # without momentum the state follows
            yield key, node


def _revealed(
    graph: fx.Graph, node: fx.Node, recurrence: RecurrenceProgram, names: Sequence[str]
) -> Iterator[tuple[str, fx.Node]]:
    """Of an operator that derives it: ``[key | value | log retention | step | log momentum]``."""
    place = list(recurrence.one.output_axes).index(str(recurrence.revealed))
    lessons = graph.call_function(operator.getitem, (node, place))
    *_, columns = recurrence.one.output_axes[str(recurrence.revealed)]
    momentum = any(name.startswith("past.") and ".momentum" in name for name in names)
    gates = _GATES if momentum else _GATES[:2]
    width = (int(columns) - len(gates)) // 2
    aten = torch.ops.aten
    for index, key in enumerate(("key", "value")):
        start = index * width
        yield key, graph.call_function(aten.slice.Tensor, (lessons, 3, start, start + width))
    for index, gate in enumerate(gates):
        yield gate, graph.call_function(aten.select.int, (lessons, 3, 2 * width + index))


def description(program: Program | GradientTwin) -> str:
    """Names, dtypes and axes of inputs and outputs in order, as a bundle's manifest gives them."""

    def tensors(axes: Mapping[str, Sequence[int | str]]) -> list[dict[str, Any]]:
        return [
            {"name": name, "dtype": str(program.dtype(name)).removeprefix("torch."), "shape": list(shape)}
            for name, shape in axes.items()
        ]

    content = {
        "name": program.name,
        "inputs": tensors(program.input_axes),
        "outputs": tensors(program.output_axes),
    }
    return json.dumps(content, indent=1)

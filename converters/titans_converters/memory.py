"""A memory that you wrote: its weights, its answer, its loss → the graph that edits it.

Anything with :class:`Memory`'s three members is traced and differentiated; nothing else need be known
of it. The graph has the interface of every gradient graph: inputs ``past.<weight>``, here with ``key`` and
``value`` in place of tokens; outputs ``loss (B,)`` and ``grad.<weight>``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Protocol

import onnx
import torch
from torch import Tensor, nn

from titans_converters.as_autograd import as_autograd
from titans_converters.differentiation import gradient
from titans_converters.gradient_check import check_gradient
from titans_converters.onnx.trace import to_proto, trace
from titans_converters.program import Axes, Program

# Example sizes for tracing: unlike each other and unlike any fixed size of a sensible memory.
_BATCH, _TOKENS = 11, 37


class Memory(Protocol):
    """A memory as a pure function of its weights."""

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each weight of one stream, by name; the first axis of a weight is its input's."""
        ...

    def forward(self, weights: Mapping[str, Tensor], query: Tensor) -> Tensor:
        """Its answers: ``(B, T, D)`` → ``(B, T, D)``. Weights have a batch axis in front."""
        ...

    def loss(self, weights: Mapping[str, Tensor], key: Tensor, value: Tensor) -> Tensor:
        """What editing lowers, ``(B,)``, from keys and values ``(B, T, D)``."""
        ...


def memory_gradient(memory: Memory, width: int, name: str = "gradient.memory") -> onnx.ModelProto:
    """Trace a memory's loss, and differentiate it by all of its weights.

    Args:
        memory: the memory.
        width: ``D`` of keys and values.
        name: of the graph.

    Raises:
        ValueError: an operator of the loss has no derivative here, or no form in ONNX, or computes in half
            precision; the message names it. Or the loss is not one number a stream, or its gradient is not
            what autograd gives.
    """
    program = _program(memory, name, width, ("key", "value"), {"loss": ("batch",)})
    noted = dataclasses.replace(program, module=as_autograd(program.module, program))
    proto = _with_inputs(gradient(_traced(memory, noted), list(memory.parameters), name), program)
    check_gradient(proto, program)
    return proto


def memory_answer(memory: Memory, width: int, name: str = "memory") -> onnx.ModelProto:
    """The graph of a memory's answers: inputs ``past.<weight>`` and ``query``, output ``answer``.

    Raises:
        ValueError: the answers are not of the queries' shape, or an operator has no form in ONNX; the message
            names it.
    """
    answer: dict[str, Axes] = {"answer": ("batch", "tokens", width)}
    program = _program(memory, name, width, ("query",), answer)
    return _with_inputs(_traced(memory, program), program)


def _traced(memory: Memory, program: Program) -> onnx.ModelProto:
    """The graph of a memory's loss or answers.

    Raises:
        ValueError: something in them has no form in ONNX; the message names it.
    """
    try:
        return to_proto(trace(program))
    except RuntimeError as error:  # the exporter's own, and those of the passes that it runs
        found = re.search(r"target=torch\.ops\.([\w.]+)", str(error))
        reason = f"operator {found[1]} has no form in ONNX here" if found else f"no trace: {_root(error)}"
        raise ValueError(f"{_method(memory, program)}: {reason}") from error


def _root(error: BaseException) -> str:
    """First line of what an error began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0][:200]


def _method(memory: Memory, program: Program) -> str:
    return f"{type(memory).__name__}.{'loss' if 'loss' in program.output_axes else 'forward'}"


def _program(
    memory: Memory, name: str, width: int, tokens: tuple[str, ...], outputs: dict[str, Axes]
) -> Program:
    axes: dict[str, Axes] = {
        f"past.{weight}": ("batch", *shape) for weight, shape in memory.parameters.items()
    }
    axes |= dict.fromkeys(tokens, ("batch", "tokens", width))
    sizes = {"batch": _BATCH, "tokens": _TOKENS}
    inputs = {
        own: torch.zeros([sizes[a] if isinstance(a, str) else a for a in shape])
        for own, shape in axes.items()
    }
    call = _Call(memory, "loss" in outputs)
    for output, shape in outputs.items():
        with torch.no_grad():
            _check(memory, output, call(*inputs.values())[0], shape)
    return Program(name, call, inputs, axes, outputs)


def _check(memory: Memory, output: str, found: object, axes: Axes) -> None:
    """Whether a memory keeps to :class:`Memory`.

    Raises:
        ValueError: it gives something else.
    """
    method = f"{type(memory).__name__}.{'loss' if output == 'loss' else 'forward'}"
    fix = "sum over tokens and features, not over streams" if output == "loss" else "as queries are"
    if not isinstance(found, Tensor):
        raise ValueError(f"{method} gives {type(found).__name__}: it must give one tensor")
    sizes = {"batch": _BATCH, "tokens": _TOKENS}
    expected = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
    if found.shape != expected:
        raise ValueError(
            f"{method} gives shape {tuple(found.shape)} for {_BATCH} streams of {_TOKENS} tokens: "
            f"it must be {expected}; {fix}"
        )
    if found.dtype != torch.float32:
        raise ValueError(f"{method} gives {found.dtype} from float32: it must stay float32")


def _with_inputs(proto: onnx.ModelProto, program: Program) -> onnx.ModelProto:
    """The graph with every input that is documented, those that nothing depends on included."""
    known = {info.name: info for info in proto.graph.input}
    inputs = [
        known.get(name) or onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes)
        for name, axes in program.input_axes.items()
    ]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    return proto


class _Call(nn.Module):
    """A memory's answer or loss with its weights as a flat list of tensors."""

    def __init__(self, memory: Memory, loss: bool) -> None:
        super().__init__()
        self.memory, self.of_loss = memory, loss
        self.names = list(memory.parameters)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(self.names, inputs, strict=False))
        tokens = inputs[len(self.names) :]
        found = self.memory.loss(weights, *tokens) if self.of_loss else self.memory.forward(weights, *tokens)
        return (found,)

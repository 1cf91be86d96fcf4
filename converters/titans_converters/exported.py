"""A program as ``torch.export`` traces it: what the converters to TorchScript and AOTInductor begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from titans_converters import memory_op
from titans_converters.program import Axes, Program
from titans_runtime.quiet import quiet

CHECKS: Final = (  # the tracer's, of its own assumptions
    torch.ops.aten._assert_scalar.default,  # noqa: SLF001 - an operator's name
    torch.ops.aten._assert_tensor_metadata.default,  # noqa: SLF001
)
_OPERATOR = "onnx_symbolic::_symbolic_multi_out"


def export(program: Program) -> torch.export.ExportedProgram:
    """Trace ``program`` with free axes.

    Raises:
        ValueError: a free axis was fixed by the module's code; the message names the output.
    """
    with quiet(), torch.no_grad():
        exported = torch.export.export(
            program.module,
            tuple(program.inputs.values()),
            dynamic_shapes=dynamic_shapes(program),
            # What holds for every size, but beyond the tracer's algebra, is asserted instead of refused.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    _check_axes(program, exported)
    return exported


def written_out(
    module: nn.Module, inputs: Sequence[Tensor], axes: Sequence[Axes]
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A module in PyTorch's smallest operators, with what autograd does in it, for any size of free axes.

    ``torch.export`` keeps products of matrices whole, and does not see what autograd makes of them.

    Args:
        module: takes and gives tensors.
        inputs: examples. A free axis has the same size everywhere, unlike all other sizes.
        axes: of the inputs; a string names a free axis.

    Returns:
        The graph, and stand-ins for the inputs, which have sizes and no data.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    stand_ins: list[Tensor] = [
        mode.from_tensor(
            tensor.contiguous(),  # an example may repeat one row
            source=ConstantSource(f"input_{index}"),
            symbolic_context=StatelessSymbolicContext(
                # DUCK: one symbol for one size
                dynamic_sizes=[DimDynamic.DUCK if isinstance(n, str) else DimDynamic.STATIC for n in shape]
            ),
        )
        for index, (tensor, shape) in enumerate(zip(inputs, axes, strict=True))
    ]
    with mode:
        graph: fx.GraphModule = make_fx(module, _allow_non_fake_inputs=True)(*stand_ins)
    for part in graph.modules():
        if isinstance(part, fx.GraphModule):
            without_checks(part)
    return graph, stand_ins


def dynamic_shapes(program: Program, least_tokens: int = 1) -> Any:  # noqa: ANN401 - nested as the inputs are
    """The program's free axes, as ``torch.export`` asks for them."""
    axes = {
        name: torch.export.Dim(name, min=least_tokens if name == "tokens" else 1)
        for shape in program.input_axes.values()
        for name in shape
        if isinstance(name, str)
    }
    shapes = tuple(
        {index: axes[axis] for index, axis in enumerate(shape) if isinstance(axis, str)}
        for shape in program.input_axes.values()
    )
    return (shapes,) if _is_variadic(program) else shapes


def _is_variadic(program: Program) -> bool:
    """Whether ``forward`` takes ``*tensors``: then the shapes are nested once more."""
    return program.module.forward.__code__.co_argcount == 1


def without_checks(traced: fx.GraphModule) -> fx.GraphModule:
    """Take out what the tracer asserts of its own assumptions. Changes ``traced``."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module" or node.target in CHECKS:
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def operator_of(node: fx.Node) -> str | None:
    """Name of our operator that the node stands for, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001
        return None
    if node.target.name() != _OPERATOR or node.kwargs.get("domain") != memory_op.DOMAIN:
        return None
    return str(node.args[1])


def attributes_of(node: fx.Node) -> dict[str, int]:
    """Whole-number attributes of our operator that the node stands for."""
    kwargs: dict[str, Any] = node.kwargs
    places = zip(kwargs["attr_keys"], kwargs["attr_types"], kwargs["attr_pos"], strict=True)
    return {key: kwargs["attr_ints"][start] for key, kind, (start, _) in places if kind == "i"}


def _check_axes(program: Program, exported: torch.export.ExportedProgram) -> None:
    """Refuse an axis that tracing has fixed."""
    (output,) = [node for node in exported.graph.nodes if node.op == "output"]
    for (name, axes), node in zip(program.output_axes.items(), output.args[0], strict=True):
        for axis, size in zip(axes, node.meta["val"].shape, strict=True):
            if isinstance(axis, str) and isinstance(size, int):
                raise ValueError(f"program {program.name}: {name} has its axis {axis} fixed at {size}")

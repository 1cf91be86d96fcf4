"""A memory's code, traced so that the graph keeps what autograd knows of it.

A graph says what is computed. It does not say where autograd stops, and the exporter joins operators
whose gradients differ where two values are equal. Both are noted by operators of ours that give what they
are given, which :func:`titans_converters.differentiation.gradient` reads and takes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from titans_converters.exported import dynamic_shapes
from titans_converters.memory_op import DOMAIN, VERSION
from titans_converters.program import Program
from titans_runtime.quiet import quiet

DETACHED = "Detached"
"""Name of the operator whose result autograd takes for a constant."""

APART = "Apart"
"""Name of the operator that keeps the exporter from joining those before it and after it."""

_aten = torch.ops.aten
_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_STOPS = (_aten.detach.default, _aten.detach_.default)


def as_autograd(module: nn.Module, program: Program) -> nn.Module:
    """The module with its notes of what autograd does, or itself where it cannot be traced alone.

    Args:
        module: of the program.
        program: whose inputs the module is traced for.

    Raises:
        ValueError: the module takes a tensor from autograd by its ``data``, or changes one in place where
            autograd does not look.
    """
    with _Watched(), torch.no_grad():
        module(*program.inputs.values())
    try:
        with quiet(), torch.enable_grad():
            exported = torch.export.export(
                module, tuple(program.inputs.values()), dynamic_shapes=dynamic_shapes(program)
            )
    except Exception:  # noqa: BLE001 - torch raises anything; the exporter tries other ways, then says why not
        return module
    traced = exported.module(check_guards=False)
    _check_in_place(traced, recording=True)
    return _Noted(traced)


class _Watched(TorchFunctionMode):
    """Code in which nothing reads ``Tensor.data``, of which a trace has no trace."""

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func == _DATA:
            raise ValueError("gradient: Tensor.data is not traced; write detach() in its place")
        return func(*args, **(kwargs or {}))


def _check_in_place(traced: fx.GraphModule, recording: bool) -> None:
    """Refuse a change of what autograd has a record of, and would not see.

    Raises:
        ValueError: there is one; the message names the operator.
    """
    for node in traced.graph.nodes:
        if node.target is _GRAD_MODE:
            looks, inner, *_ = node.args
            _check_in_place(getattr(traced, inner.target), looks)
        elif not recording and _changes_in_place(node.target) and node.target not in _STOPS:
            raise ValueError(
                f"gradient: {node.target} changes a tensor in place under torch.no_grad(), which the graph "
                "cannot tell; write it as an operator that gives a new tensor"
            )


class _Noted(nn.Module):
    """A traced module, run operator by operator."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, *inputs: Tensor) -> Any:  # noqa: ANN401 - as the module gives
        return _Interpreter(self.traced, recording=True).run(*inputs)


class _Interpreter(fx.Interpreter):
    """Runs a graph, and notes what a graph forgets."""

    def __init__(self, traced: fx.GraphModule, recording: bool) -> None:
        """``recording``: whether autograd looks."""
        super().__init__(traced)
        self._recording = recording

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """The operator's results, noted."""
        if target is _GRAD_MODE:
            recording, traced, *inputs = args
            return _Interpreter(traced, recording).run(*inputs)
        rewritten = _REWRITTEN.get(target)
        if rewritten is None:
            result = super().call_function(target, args, kwargs)
        else:
            result = rewritten(target, _by_name(target, args, kwargs))
        if target in _STOPS or not self._recording:
            return _noted(DETACHED, result)
        return _noted(APART, result) if target in _APART else result


def _changes_in_place(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable  # noqa: SLF001


def _noted(operator: str, result: Any) -> Any:  # noqa: ANN401 - a tensor, or several
    def note(value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{operator}", [value], dtype=value.dtype, shape=value.shape, version=VERSION
        )

    return pytree.tree_map(note, result)


def _by_name(
    target: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """An operator's arguments, defaults included."""
    arguments = target._schema.arguments  # noqa: SLF001
    given = dict(zip((one.name for one in arguments), args, strict=False)) | kwargs
    return {one.name: given.get(one.name, one.default_value) for one in arguments}


# --- operators that the exporter takes for others, whose gradients differ where two values are equal

Arguments = dict[str, Any]


def _clamp(target: Callable[..., Any], given: Arguments) -> Any:  # noqa: ANN401 - a tensor
    """Its ends as floats: whole numbers would make a maximum of it."""
    x, *ends = given.values()
    if x.is_floating_point():
        ends = [None if end is None else float(end) for end in ends]
    return target(x, *ends)


def _clamp_by_tensors(_target: object, given: Arguments) -> Tensor:
    """At an end the input has all of the gradient; of a maximum it would have half."""
    x, least, most = given["self"], given.get("min"), given.get("max")
    x = x if least is None else torch.where(x < least, least, x)
    return x if most is None else torch.where(x > most, most, x)


def _strictly_within(_target: object, given: Arguments) -> Tensor:
    """``hardtanh`` and ``relu6``: no gradient at an end, where a clamp has one."""
    x, least, most = given["self"], float(given.get("min_val", 0)), float(given.get("max_val", 6))
    return torch.where((x > least) & (x < most), x, _noted(DETACHED, x.clamp(least, most)))


def _selected(target: Callable[..., Any], given: Arguments) -> tuple[Tensor, Tensor]:
    """An extreme with its place: the gradient goes to that place alone, not to all that equal it."""
    x, axis, kept = given.values()
    axis %= x.dim()  # ONNX's evaluator takes no negative one
    _, places = target(x, axis, True)
    values = x.gather(axis, places)
    return (values, places) if kept else (values.squeeze(axis), places.squeeze(axis))


_CLAMPS = (_aten.clamp.default, _aten.clamp_min.default, _aten.clamp_max.default)
_CLAMPS_BY_TENSORS = (_aten.clamp.Tensor, _aten.clamp_min.Tensor, _aten.clamp_max.Tensor)
_REWRITTEN: dict[Any, Callable[[Any, Arguments], Any]] = {
    **dict.fromkeys(_CLAMPS, _clamp),
    **dict.fromkeys(_CLAMPS_BY_TENSORS, _clamp_by_tensors),
    **dict.fromkeys((_aten.relu6.default, _aten.hardtanh.default), _strictly_within),
    **dict.fromkeys((_aten.max.dim, _aten.min.dim), _selected),
}
_EXTREMES = (_aten.maximum.default, _aten.minimum.default, _aten.max.other, _aten.min.other)
_APART = frozenset((*_CLAMPS, *_EXTREMES, _aten.relu.default))

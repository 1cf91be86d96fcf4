"""The memory operator as a TensorRT plugin, described in Python, run without it.

The signature is that of ``memory_op.py``. TensorRT asks for shapes (:func:`describe`), for types and tactics
(:func:`tune`) and for the kernel with its launch (:func:`implement`); the engine keeps PTX and launch
parameters as formulas of the shapes, so that it needs no Python when it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

from titans_converters import memory_op
from titans_converters.tensorrt.aot import BLOCKS, KernelSizes, blocks_for, compile_kernel

PLUGIN_ID: Final = f"{memory_op.DOMAIN}::{memory_op.NAME}"
_ATTRIBUTE_TYPES: Final = {name: type(value) for name, value in memory_op.node_attributes(1).items()}
_COUNT = len(memory_op.INPUTS)
_QUERY, _VALUE = (memory_op.INPUTS.index(name) for name in ("query", "value"))
_MEMORY, _MOMENTUM = (memory_op.INPUTS.index(name) for name in ("past_memory", "past_momentum"))


def register_plugin(trt: Any) -> None:  # noqa: ANN401 - a module
    """Register the operator with the TensorRT of this process, once.

    Args:
        trt: the module ``tensorrt``; its ``tensorrt.plugin`` must be imported.
    """
    plugin: Any = trt.plugin
    if hasattr(plugin.op, memory_op.DOMAIN) and hasattr(plugin.op.titans, memory_op.NAME):
        return
    tensor = plugin.TensorDesc
    outputs = _tuple_of(*[tensor] * len(memory_op.OUTPUTS))
    launch = _tuple_of(str, str, plugin.KernelLaunchParams, plugin.SymExprs)

    def describe(*arguments: Any, **_: Any) -> tuple[Any, ...]:  # noqa: ANN401 - TensorDesc
        return arguments[_VALUE].like(), arguments[_MEMORY].like(), arguments[_MOMENTUM].like()

    def tune(*arguments: Any) -> list[Any]:  # noqa: ANN401 - AutoTuneCombination
        width = _constant(arguments[_MEMORY], 3)
        tactics = [BLOCKS.index(block) + 1 for block in blocks_for(width)]
        types = ", ".join(["FP32"] * (_COUNT + len(memory_op.OUTPUTS)))
        return [plugin.AutoTuneCombination(types, "LINEAR", tactics)]

    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:  # noqa: ANN401 - TensorDesc
        *_, tactic = arguments
        query, memory = arguments[_QUERY].shape_expr, arguments[_MEMORY]
        heads, key_dim, value_dim = (_constant(memory, axis) for axis in (1, 2, 3))
        sizes = KernelSizes(heads, key_dim, value_dim, BLOCKS[tactic - 1])
        kernel = compile_kernel(sizes)
        launched = plugin.KernelLaunchParams()
        launched.grid_x = query[0] * heads
        launched.grid_y = sizes.column_blocks
        launched.block_x = kernel.threads
        launched.shared_mem = kernel.shared_bytes
        return kernel.name, kernel.ptx, launched, plugin.SymExprs.from_tuple([query[2]])

    # All attributes everywhere: TensorRT hands `implement` every one, whether it declares them or not.
    parameters = dict.fromkeys(memory_op.INPUTS, tensor) | _ATTRIBUTE_TYPES
    tuned = parameters | {"outputs": outputs}
    plugin.register(PLUGIN_ID)(_signed(describe, parameters, outputs))
    plugin.autotune(PLUGIN_ID)(_signed(tune, tuned, list[plugin.AutoTuneCombination]))
    plugin.aot_impl(PLUGIN_ID)(_signed(implement, tuned | {"tactic": int}, launch))


def _signed(function: Callable[..., Any], parameters: dict[str, Any], returns: Any) -> Callable[..., Any]:  # noqa: ANN401
    """A function with the signature that TensorRT will read: from the contract, not written a second time."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=type_) for name, type_ in parameters.items()],
        return_annotation=returns,
    )
    return function


def _tuple_of(*types: Any) -> Any:  # noqa: ANN401 - an annotation, made where its types are known
    return tuple[types]  # type: ignore[valid-type]


def _constant(tensor: Any, axis: int) -> int:  # noqa: ANN401 - TensorDesc
    """A size that the graph fixes: heads and widths of the memory."""
    size = tensor.shape_expr[axis]
    if not size.is_constant:
        raise ValueError(f"{PLUGIN_ID}: axis {axis} of past_memory is free; heads and widths must be fixed")
    return int(size.constant_value())

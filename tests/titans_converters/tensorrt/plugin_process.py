"""What TensorRT's own plugin module makes of ours: runs where its bindings can be imported; prints JSON."""

from __future__ import annotations

import json

import numpy as np
import tensorrt as trt
import tensorrt.plugin as trtp
from tensorrt.plugin._lib import QDP_REGISTRY
from tensorrt.plugin._tensor import ShapeExprs, SymIntExpr

from titans_converters import memory_op
from titans_converters.tensorrt.aot import BLOCKS
from titans_converters.tensorrt.plugin import PLUGIN_ID, register_plugin

HEADS, WIDTH = 2, 16
SHAPES = [
    *[("B", HEADS, "T", WIDTH)] * 3,
    *[("B", HEADS, "T")] * 3,
    ("B",),
    *[("B", HEADS, WIDTH, WIDTH)] * 2,
]


class Size(trt.IDimensionExpr):  # type: ignore[misc]
    """A size of the builder, as a formula. Only a builder can construct one: so none is constructed."""

    value: int | str

    @classmethod
    def of(cls, value: int | str) -> Size:
        size = cls.__new__(cls)
        size.value = value
        return size

    def is_constant(self) -> bool:
        return isinstance(self.value, int)

    def get_constant_value(self) -> int | str:
        return self.value


class Expressions(trt.IExprBuilder):  # type: ignore[misc]
    """Stands for the builder's own, which only a builder can make."""

    def constant(self, value: int) -> Size:
        return Size.of(value)

    def operation(self, operation: trt.DimensionOperation, first: Size, second: Size) -> Size:
        if operation == trt.DimensionOperation.SUM and second.value == 0:  # how a size is copied
            return first
        assert operation == trt.DimensionOperation.PROD
        return Size.of(f"{first.value} * {second.value}")


def described(shape: tuple[int | str, ...]) -> trtp.TensorDesc:
    exprs = ShapeExprs(len(shape))
    for axis, size in enumerate(shape):
        exprs[axis] = trtp.ShapeExpr(1)
        exprs[axis]._int_expr = Size.of(size)
    tensor = trtp.TensorDesc()
    tensor.dtype, tensor.shape_expr = trt.float32, exprs
    return tensor


def sizes(tensor: trtp.TensorDesc) -> list[int | str]:
    return [expr._expr.value for expr in tensor.shape_expr]


def main() -> None:
    register_plugin(trt)
    register_plugin(trt)  # once more does no harm
    registered = QDP_REGISTRY[PLUGIN_ID]
    creator = trt.get_plugin_registry().get_creator(memory_op.NAME, str(memory_op.VERSION), memory_op.DOMAIN)
    values = memory_op.node_attributes(32)
    arrays = {name: np.array([value]) for name, value in values.items() if isinstance(value, int)}
    fields = [
        trt.PluginField(name, arrays[name], trt.PluginFieldType.INT64)
        if name in arrays
        else trt.PluginField(name, str(value).encode(), trt.PluginFieldType.CHAR)
        for name, value in values.items()
    ]
    plugin = creator.create_plugin(
        memory_op.NAME,
        memory_op.DOMAIN,
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    ranks = [len(shape) for shape in SHAPES]
    types = plugin.get_output_data_types([trt.float32] * len(SHAPES), ranks)

    SymIntExpr._exprBuilder = Expressions()
    inputs = [described(shape) for shape in SHAPES]
    outputs = registered.register_func(*inputs, **values)
    in_call = [*inputs, *values.values(), outputs]
    combinations = [one for found in registered.autotune_func(*in_call) for one in found._get_combinations()]
    name, ptx, launch, extra = registered.aot_impl_func(*in_call, 1)
    launched = {
        axis: getattr(launch, axis)._expr.value for axis in ("grid_x", "grid_y", "block_x", "shared_mem")
    }
    print(
        json.dumps(
            {
                "inputs": registered.input_tensor_names,
                "attributes": list(registered.input_attrs),
                "fields": [field.name for field in creator.field_names],
                "plugin": type(plugin).__name__,
                "plugin_attributes": plugin.attrs,
                "output_types": [type_.name for type_ in types],
                "output_shapes": [sizes(tensor) for tensor in outputs],
                "tactics": [[BLOCKS[tactic - 1] for tactic in one.tactics] for one in combinations],
                "types": [[type_.name for type_ in one.types] for one in combinations],
                "layouts": [[layout.name for layout in one.layouts] for one in combinations],
                "kernel": name,
                "entry": f".entry {name}(" in ptx,
                "launch": launched,
                "extra": [[type(one).__name__, one._expr.value] for one in extra],
                "extra_is_integer": all(isinstance(one, trtp.SymInt32) for one in extra),
            }
        )
    )


if __name__ == "__main__":
    main()

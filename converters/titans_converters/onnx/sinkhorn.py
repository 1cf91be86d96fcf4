"""Sinkhorn's iteration as an ONNX function: a matrix made doubly stochastic, a little one for every token.

Written out in a traced model it would be a hundred nodes wherever it stands, and sums over a few numbers
are slow there. Here a matrix is a row of ``n²`` numbers, and sums over its rows and columns, each number
beside the sum that it belongs to, are products with matrices of zeros and ones.
"""

from __future__ import annotations

import onnx
import onnx.parser
import torch
from torch import Tensor

from titans_converters import memory_op
from titans_converters.onnx.function import OPSET

NAME = "Sinkhorn"


def sinkhorn_node(logits: Tensor, iterations: int) -> Tensor:
    """Stands for the iteration while a model is traced: leaves one ``titans::Sinkhorn`` node.

    Args:
        logits: ``(…, n, n)``, ``n`` fixed.
        iterations: each divides the columns, then the rows, by their sums.
    """
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{memory_op.DOMAIN}::{NAME}",
        (logits,),
        {"size": int(logits.shape[-1]), "iterations": iterations},
        dtypes=(logits.dtype,),
        shapes=(logits.shape,),
        version=memory_op.VERSION,
    )
    return outputs[0]


def doubly_stochastic(logits: Tensor, iterations: int) -> Tensor:
    """What the node stands for, for targets whose functions are not ONNX's."""
    kernel = torch.exp(logits - logits.amax(-2, keepdim=True))
    for _ in range(iterations):
        kernel = kernel / kernel.sum(-2, keepdim=True)
        kernel = kernel / kernel.sum(-1, keepdim=True)
    return kernel


def sinkhorn_function(size: int, iterations: int) -> onnx.FunctionProto:
    """The body, for matrices ``(size, size)``."""
    count = size * size
    by_column = [float(i % size == j % size) for i in range(count) for j in range(count)]
    by_row = [float(i // size == j // size) for i in range(count) for j in range(count)]
    lines = [
        "powers = Softmax<axis = -2>(logits)",  # and the columns divided once
        "shape = Shape(logits)",
        f"flat = Constant<value_ints = [-1, {count}]>()",
        f"square = Constant<value_ints = [{count}, {count}]>()",
        f"by_column_1 = Constant<value_floats = {by_column}>()",
        f"by_row_1 = Constant<value_floats = {by_row}>()",
        "by_column = Reshape(by_column_1, square)",
        "by_row = Reshape(by_row_1, square)",
        "kernel = Reshape(powers, flat)",
    ]
    scaled = "kernel"
    for i in range(iterations):
        lines.append(f"row_sums_{i} = MatMul({scaled}, by_row)")
        if i < iterations - 1:
            lines += [
                f"by_rows_{i} = Div(kernel, row_sums_{i})",
                f"column_sums_{i} = MatMul(by_rows_{i}, by_column)",
                f"by_columns_{i} = Div(kernel, column_sums_{i})",
            ]
            scaled = f"by_columns_{i}"
    lines += [f"result = Div({scaled}, row_sums_{iterations - 1})", "matrix = Reshape(result, shape)"]
    body = "\n".join(f"    {line}" for line in lines)
    function: onnx.FunctionProto = onnx.parser.parse_function(
        f'<domain: "{memory_op.DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{NAME} <size, iterations> (logits) => (matrix) {{\n{body}\n}}"
    )
    return function

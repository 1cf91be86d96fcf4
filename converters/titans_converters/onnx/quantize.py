"""Weight-only quantisation: products with a matrix become ``com.microsoft::MatMulNBits``.

Matrices are quantised along their input axis in blocks, each with a scale of its own, by ONNX Runtime's
quantiser. Weights are rounded before a model is traced, so that its goldens are those of what a bundle
holds, and found again in the graph by the content of their rows, whatever a trace has transposed or joined.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

CONTRIB = "com.microsoft"
BITS = {"int8": 8, "int4": 4}
BLOCK = 32
"""Weights of a scale: see the sweep in ``benchmarks/NOTES.md``."""
INTEGER_PRODUCTS, FLOAT_PRODUCTS = 4, 0
"""Accuracy levels of ONNX Runtime. With integers activations are quantised, too, block by block. In float32
it unpacks an int8 matrix before every product: exact, and 20 times slower than with float32 weights."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Row:
    """One output's weights: ``(blocks, bytes)`` packed and ``(blocks,)`` scales."""

    packed: Array
    scales: Array


class QuantisedRows:
    """Rows of matrices that were quantised, by the content that they have when unpacked again."""

    def __init__(self, weights: str) -> None:
        """``weights``: ``int8`` or ``int4``."""
        self.bits = BITS[weights]
        self._rows: dict[bytes, _Row] = {}

    def round(self, weight: Array) -> Array:
        """Quantise ``weight (N, K)``, and return what its codes and scales stand for."""
        library = _library()
        config = library.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=self.bits)
        columns = np.ascontiguousarray(weight.T)
        packed, scales, _ = library.DefaultWeightOnlyQuantizer(config).qbits_block_quant(columns)
        unpacked = self._unpack(packed, scales)[:, : weight.shape[1]]
        rounded: Array = np.ascontiguousarray(unpacked, np.float32)
        for row, codes, scale in zip(rounded, packed, scales, strict=True):
            self._rows[_digest(row)] = _Row(codes, scale)
        return rounded

    def replace_products(self, graph: onnx.GraphProto, level: int = INTEGER_PRODUCTS) -> int:
        """Put ``MatMulNBits`` in the place of every product with rounded weights; their number."""
        matrices = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
        replaced: set[str] = set()
        for node in graph.node:
            if node.op_type != "MatMul" or node.domain or node.input[1] not in matrices:
                continue
            name = node.input[1]
            weight = onnx.numpy_helper.to_array(matrices[name])
            rows = self._find(weight)
            if rows is None:
                continue
            if name not in replaced:
                packed, scales = (np.stack(parts) for parts in zip(*rows, strict=True))
                graph.initializer.append(onnx.numpy_helper.from_array(packed, f"{name}.codes"))
                graph.initializer.append(onnx.numpy_helper.from_array(scales, f"{name}.scales"))
                replaced.add(name)
            inputs, outputs = weight.shape
            node.CopyFrom(self._product(node, inputs, outputs, level))
        kept = [tensor for tensor in graph.initializer if tensor.name not in replaced]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        return len(replaced)

    def _find(self, weight: Array) -> list[tuple[Array, Array]] | None:
        rows = [self._rows.get(_digest(row)) for row in np.ascontiguousarray(weight.T)]
        found = [(row.packed, row.scales) for row in rows if row is not None]
        return found if len(found) == len(rows) else None

    def _product(self, node: onnx.NodeProto, inputs: int, outputs: int, level: int) -> onnx.NodeProto:
        name = node.input[1]
        return onnx.helper.make_node(
            "MatMulNBits",
            [node.input[0], f"{name}.codes", f"{name}.scales"],
            list(node.output),
            name=node.name,
            domain=CONTRIB,
            K=inputs,
            N=outputs,
            bits=self.bits,
            block_size=BLOCK,
            accuracy_level=level,
        )

    def _unpack(self, packed: Array, scales: Array) -> Array:
        """``(N, blocks, bytes)`` and ``(N, blocks)`` → ``(N, K)``; the lower half of a byte comes first."""
        codes = packed
        if self.bits == 4:
            codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
        values = (codes.astype(np.float32) - 2 ** (self.bits - 1)) * scales[..., None]
        unpacked: Array = values.reshape(len(packed), -1)
        return unpacked


def _library() -> ModuleType:
    """ONNX Runtime's quantiser, which lets the whole process log when it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    module: ModuleType = matmul_nbits_quantizer
    return module


def _digest(row: Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(row, np.float32).tobytes()).digest()

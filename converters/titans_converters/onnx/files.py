"""ONNX models to files that share one weights file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from titans_converters.onnx.quantize import CONTRIB, INTEGER_PRODUCTS, QuantisedRows
from titans_runtime.bundle import WEIGHTS_NAME
from titans_runtime.files import write_atomically

_INLINE_BYTES = 1024  # smaller tensors are scalars and shapes, which graph optimizers must see
_ALIGNMENT = 4096  # a page: lets a runtime map the file


def write_models(
    models: Mapping[str, ir.Model],
    folder: Path,
    weights_dtype: str = "float32",
    quantised: QuantisedRows | None = None,
    level: int = INTEGER_PRODUCTS,
) -> list[str]:
    """Write ``<name>.onnx`` for every model and one ``weights.bin`` for all of them.

    Equal tensors are stored once, whichever graphs they belong to.

    Args:
        models: by graph name.
        folder: where to write.
        weights_dtype: ``float16`` stores every matrix whose values float16 holds exactly as such, behind
            a cast to float32 that a runtime folds when it loads the graph; ``float32`` stores as is.
        quantised: matrices that ``model`` has as codes and scales, and multiplies with as such. Gradients
            multiply with their transposes, too, and have them in float32.
        level: what ``quantised`` products are computed in.

    Returns:
        Names of the files written.
    """
    weights = _Weights()
    protos = {f"{name}.onnx": ir.to_proto(model) for name, model in models.items()}
    for file, proto in protos.items():
        if weights_dtype == "float16":
            _store_halves(proto.graph)
        if file == "model.onnx" and quantised is not None and quantised.replace_products(proto.graph, level):
            proto.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
        _externalise(proto, weights)
    write_atomically(folder / WEIGHTS_NAME, bytes(weights.content))
    for file, proto in protos.items():
        write_atomically(folder / file, proto.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(folder / file))
    return [WEIGHTS_NAME, *protos]


class _Weights:
    """The growing weights file, and where each tensor stands in it."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._offsets: dict[bytes, int] = {}

    def add(self, data: bytes) -> int:
        digest = hashlib.sha256(data).digest()
        if digest not in self._offsets:
            self.content += bytes(-len(self.content) % _ALIGNMENT)
            self._offsets[digest] = len(self.content)
            self.content += data
        return self._offsets[digest]


def _store_halves(graph: onnx.GraphProto) -> None:
    """Replace matrices by their halves and a cast, where no digit is lost."""
    casts = []
    for initializer in graph.initializer:
        if initializer.data_type != onnx.TensorProto.FLOAT or len(initializer.dims) < 2:
            continue
        array = onnx.numpy_helper.to_array(initializer)
        half = array.astype(np.float16)
        if array.nbytes < _INLINE_BYTES or not np.array_equal(half.astype(np.float32), array):
            continue
        name = initializer.name
        initializer.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _externalise(proto: onnx.ModelProto, weights: _Weights) -> None:
    for initializer in proto.graph.initializer:
        data = onnx.numpy_helper.to_array(initializer).tobytes()
        if len(data) < _INLINE_BYTES:
            continue
        offset = weights.add(data)
        initializer.ClearField("raw_data")
        initializer.ClearField("float_data")
        initializer.ClearField("int64_data")
        initializer.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS_NAME), ("offset", str(offset)), ("length", str(len(data)))):
            initializer.external_data.add(key=key, value=value)

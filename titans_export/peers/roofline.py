"""``roofline``: what the machine itself would need, as a backend that computes no model.

Decoding cannot be faster than reading once what a token must touch: its time is that of one sweep over as
many bytes. A prefill cannot be faster than its products with the weights: its time is that of these alone, in
the fastest library at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from titans_export.training.checkpoint import TENSORS_FILE, read_tensors
from titans_runtime.backends import DTYPES, Array, Arrays
from titans_runtime.bench.peers import Job
from titans_runtime.bundle import WEIGHTS_NAME, open_bundle
from titans_runtime.forward import SEGMENT
from titans_runtime.manifest import Manifest


class RooflineRunner:
    """Sweeps over memory, and products of the weights' shapes."""

    is_model = False

    def __init__(self, manifest: Manifest, shapes: list[tuple[int, int]], threads: int) -> None:
        """Allocate what is swept over, and build the products."""
        import onnxruntime

        self._ort = onnxruntime
        self._manifest, self._shapes, self._threads = manifest, shapes, threads
        self.versions: Mapping[str, str] = {"onnxruntime": onnxruntime.__version__}
        self._pool = ThreadPoolExecutor(threads)
        self._session = self._products()
        self._inputs: Arrays = {}
        self._parts: list[Array] = []

    def start(self, batch: int, edit: float) -> None:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        del edit
        count = moved_bytes(self._manifest, batch) // 8
        if count != sum(len(part) for part in self._parts):
            whole = np.ones(count, np.int64)
            self._parts = np.array_split(whole, self._threads)

    def append(self, ids: Array) -> Array:
        """See :class:`titans_runtime.bench.peers.Runner`; what it returns means nothing."""
        if ids.shape[1] == 1:  # of NumPy's reductions this one reads fastest
            list(self._pool.map(np.bitwise_or.reduce, self._parts))
            return np.zeros((*ids.shape, 1), np.float32)
        for start in range(0, ids.shape[1], SEGMENT):
            rows = ids.shape[0] * min(SEGMENT, ids.shape[1] - start)
            self._session.run(None, self._rows(rows))
        return np.zeros((*ids.shape, 1), np.float32)

    def close(self) -> None:
        """Let go of memory and threads."""
        self._pool.shutdown()
        self._parts, self._inputs = [], {}
        del self._session

    def _rows(self, rows: int) -> Arrays:
        if any(len(array) != rows for array in self._inputs.values()) or not self._inputs:
            widths = {shape[0] for shape in self._shapes}
            self._inputs = {f"x{width}": np.ones((rows, width), np.float32) for width in widths}
        return self._inputs

    def _products(self) -> Any:  # noqa: ANN401 - an onnxruntime.InferenceSession
        """One product a weight, and of each result one row, so that nothing but products takes time."""
        import onnx
        from onnx import TensorProto, helper

        nodes, weights, outputs = [], [], []
        random = np.random.default_rng(0)
        for index, shape in enumerate(self._shapes):
            array = random.standard_normal(shape, np.float32)
            weights.append(onnx.numpy_helper.from_array(array, f"w{index}"))
            nodes.append(helper.make_node("MatMul", [f"x{shape[0]}", f"w{index}"], [f"y{index}"]))
            nodes.append(helper.make_node("Slice", [f"y{index}", "zero", "one"], [f"s{index}"]))
            outputs.append(helper.make_tensor_value_info(f"s{index}", TensorProto.FLOAT, None))
        weights += [
            onnx.numpy_helper.from_array(np.array([i]), name) for i, name in enumerate(("zero", "one"))
        ]
        inputs = [
            helper.make_tensor_value_info(f"x{width}", TensorProto.FLOAT, ["rows", width])
            for width in sorted({shape[0] for shape in self._shapes})
        ]
        graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        # Or it might see that only a row is asked for.
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return self._ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def moved_bytes(manifest: Manifest, batch: int) -> int:
    """Bytes that decoding one token of ``batch`` streams must move.

    Every weight is read once, of the embedding a row a stream. State that changes is read and written; of
    the readout memory, the rows that a key picks are read.
    """
    width, vocab = int(manifest.model["d_model"]), manifest.vocab_size
    weights = manifest.files[WEIGHTS_NAME].size - 4 * vocab * width + 4 * batch * width
    outputs = {tensor.name: tensor for tensor in manifest.graphs["model"].outputs}
    state = 0
    for entry in manifest.state:
        size = np.dtype(DTYPES[entry.dtype]).itemsize * math.prod(entry.row_shape)
        state += 2 * size if f"present.{entry.name}" in outputs else 0
    keys = [int(outputs[name].shape[-1]) for name in ("readout_key", "readout_rows") if name in outputs]
    return weights + batch * (state + 4 * vocab * sum(keys))


def product_shapes(checkpoint: Path) -> list[tuple[int, int]]:
    """Rows and columns of every matrix that a token is multiplied by."""
    tensors = read_tensors(checkpoint / TENSORS_FILE)
    return [
        (tensor.shape[1], tensor.shape[0])
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and not name.startswith("embedding")
    ]


def load(job: Job) -> RooflineRunner:
    """For the bundle's bytes and the checkpoint's products."""
    return RooflineRunner(
        open_bundle(job.bundle).manifest, product_shapes(job.needed_checkpoint()), job.threads
    )

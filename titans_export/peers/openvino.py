"""``openvino-torch``: OpenVINO's own conversion of the PyTorch model, one graph for each number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from titans_export.peers.eager import TorchRunner, open_model
from titans_export.peers.flat import ByShape, FlatModel, Tensors
from titans_runtime.bench.openvino import compile_model
from titans_runtime.bench.peers import Job
from titans_runtime.optional import optional_import
from titans_runtime.quiet import quiet


def load(job: Job) -> TorchRunner:
    """Trace the model for each shape, convert it, compile it for the CPU in float32.

    Raises:
        EnvironmentProblem: OpenVINO is missing.
    """
    openvino = optional_import("openvino", "openvino")
    model = open_model(job)
    flat = FlatModel(model).eval()

    def make(arguments: Tensors) -> Callable[..., Tensors]:
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(flat, arguments, check_trace=False)
            converted = openvino.convert_model(traced, example_input=arguments)
        for port, argument in zip(converted.inputs, arguments, strict=True):
            port.get_node().set_partial_shape(openvino.PartialShape(list(argument.shape)))
        converted.validate_nodes_and_infer_types()
        return _caller(compile_model(openvino, converted, job.threads))

    return TorchRunner(
        model, flat.step(ByShape(make)), {"openvino": openvino.get_version().partition("-")[0]}
    )


def _caller(compiled: Any) -> Callable[..., Tensors]:  # noqa: ANN401 - an openvino.CompiledModel
    # Two, in turn: what one has put out is what the other takes in, without a copy.
    requests = [compiled.create_infer_request() for _ in range(2)]

    def call(*tensors: torch.Tensor) -> Tensors:
        requests.reverse()
        arrays = [tensor.numpy() for tensor in tensors]
        results = requests[0].infer(arrays, share_inputs=True, share_outputs=True)
        logits, *present = (torch.from_numpy(results[index]) for index in range(len(compiled.outputs)))
        return logits.clone(), *present  # the next call but one writes there

    return call

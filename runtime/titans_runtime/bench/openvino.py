"""The bundle's own ONNX files in OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from titans_runtime.backends import Array, Arrays
from titans_runtime.backends.lengths import cut
from titans_runtime.bench.peers import Job
from titans_runtime.bundle import WEIGHTS_NAME, initial_state, open_bundle
from titans_runtime.errors import EnvironmentProblem
from titans_runtime.optional import optional_import

_UNUSED = (
    "readout_key",
    "readout_rows",
)  # what only an open editor reads; ONNX Runtime does not compute it either


class OpenVinoRunner:
    """Models with named inputs and outputs, the state among them, on the CPU in float32."""

    is_model = True

    def __init__(self, models: Mapping[int, Any], initial: Arrays, layers: int, threads: int) -> None:
        """Take the models; they are compiled for a batch when streams begin.

        Args:
            models: an ``openvino.Model`` with the tensor names of a bundle's graph for every number of
                tokens that there is a graph for, or one for any number, under 0.
            initial: the state before the first token, one row.
            layers: width of ``edit``.
            threads: for one stream.
        """
        self._openvino = optional_import("openvino", "openvino")
        self._models, self._threads = dict(models), threads
        for model in self._models.values():
            for result in model.get_results():
                if result.get_output_tensor(0).any_name in _UNUSED:
                    model.remove_result(result)
        self.versions: Mapping[str, str] = {"openvino": self._openvino.get_version().partition("-")[0]}
        self._initial, self._layers = initial, layers
        self._requests: dict[tuple[int, int], list[Any]] = {}
        self._batch = 0
        self._feeds: Arrays = {}

    def start(self, batch: int, edit: float) -> None:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        self._batch = batch
        self._feeds = {
            f"past.{name}": np.repeat(array, batch, axis=0) for name, array in self._initial.items()
        } | {"edit": np.full((batch, self._layers), edit, np.float32)}
        for length in self._models:
            if (batch, length) not in self._requests:
                self._requests[batch, length] = self._compiled(batch, length)

    def append(self, ids: Array) -> Array:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        tokens = ids.shape[1]
        if 0 in self._models:
            return self._run(ids, 0)
        logits, start = [], 0
        for length in cut(tokens, self._models):
            logits.append(self._run(np.ascontiguousarray(ids[:, start : start + length]), length))
            start += length
        return logits[0] if len(logits) == 1 else np.concatenate(logits, axis=1)

    def close(self) -> None:
        """Let go of the compiled models."""
        self._requests.clear()
        self._feeds.clear()

    def _compiled(self, batch: int, length: int) -> list[Any]:
        """Two requests, in turn: what one has put out is what the other takes in, without a copy."""
        model = self._models[length].clone()
        if length:
            shapes = {port.any_name: [batch, *list(port.get_partial_shape())[1:]] for port in model.inputs}
            model.reshape(shapes)
        compiled = compile_model(self._openvino, model, self._threads)
        return [compiled.create_infer_request() for _ in range(2)]

    def _run(self, ids: Array, length: int) -> Array:
        requests = self._requests[self._batch, length]
        requests.reverse()
        given = self._feeds | {"input_ids": ids}
        taken = {port.any_name for port in requests[0].model_inputs}
        result = requests[0].infer(
            {name: array for name, array in given.items() if name in taken},
            share_inputs=True,
            share_outputs=True,
        )
        logits: Array | None = None
        for port, array in result.items():
            name = port.any_name
            if name == "logits":
                logits = array.copy()  # the next call but one writes there
            else:
                self._feeds[name.replace("present.", "past.", 1)] = array
        assert logits is not None
        return logits


def compile_model(openvino: Any, model: Any, threads: int) -> Any:  # noqa: ANN401 - a module, and its classes
    """For one stream on the CPU, in float32."""
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 otherwise, where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(model, "CPU", settings)


def load(job: Job) -> OpenVinoRunner:
    """Let OpenVINO read the bundle's ``model.onnx``, or what an unrolled bundle has, once verified.

    Raises:
        EnvironmentProblem: OpenVINO is missing, or does not take the graph.
    """
    job.refuse_editor()
    openvino = optional_import("openvino", "openvino")
    bundle = open_bundle(job.bundle)
    spec = bundle.manifest.graphs["model"]
    files = {0: spec.file} if spec.takes_any_length() else spec.files_by_length()
    for name in (*files.values(), WEIGHTS_NAME):
        if name in bundle.manifest.files:
            bundle.read(name)
    models = {}
    for length, file in files.items():
        try:
            models[length] = openvino.Core().read_model(bundle.folder / file)
        except RuntimeError as error:
            reason = " ".join(str(error).partition("Summary:")[2].split()) or str(error)
            raise EnvironmentProblem(f"does not take the bundle's {file} ({reason})") from None
    return OpenVinoRunner(models, initial_state(bundle), bundle.manifest.edit_layers, job.threads)

"""The bundle's own ONNX file in OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from titans_runtime.backends import Array, Arrays
from titans_runtime.bench.peers import Job
from titans_runtime.bundle import WEIGHTS_NAME, initial_state, open_bundle
from titans_runtime.errors import EnvironmentProblem
from titans_runtime.optional import optional_import

_UNUSED = (
    "readout_key",
    "readout_rows",
)  # what only an open editor reads; ONNX Runtime does not compute it either


class OpenVinoRunner:
    """A model with named inputs and outputs, the state among them, on the CPU in float32."""

    is_model = True

    def __init__(self, model: Any, initial: Arrays, layers: int, threads: int) -> None:  # noqa: ANN401
        """Compile.

        Args:
            model: an ``openvino.Model`` with the tensor names of a bundle's graph.
            initial: the state before the first token, one row.
            layers: width of ``edit``.
            threads: for one stream.
        """
        openvino = optional_import("openvino", "openvino")
        for result in model.get_results():
            if result.get_output_tensor(0).any_name in _UNUSED:
                model.remove_result(result)
        compiled = compile_model(openvino, model, threads)
        # Two, in turn: what one has put out is what the other takes in, without a copy.
        self._requests = [compiled.create_infer_request() for _ in range(2)]
        self.versions: Mapping[str, str] = {"openvino": openvino.get_version().partition("-")[0]}
        self._taken = {name for port in compiled.inputs for name in port.get_names()}
        self._initial, self._layers = initial, layers
        self._feeds: Arrays = {}

    def start(self, batch: int, edit: float) -> None:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        self._feeds = {
            f"past.{name}": np.repeat(array, batch, axis=0) for name, array in self._initial.items()
        } | {"edit": np.full((batch, self._layers), edit, np.float32)}
        self._feeds = {name: array for name, array in self._feeds.items() if name in self._taken}

    def append(self, ids: Array) -> Array:
        """See :class:`titans_runtime.bench.peers.Runner`."""
        self._requests.reverse()
        result = self._requests[0].infer(
            self._feeds | {"input_ids": ids}, share_inputs=True, share_outputs=True
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

    def close(self) -> None:
        """Let go of the compiled model."""
        self._requests.clear()
        self._feeds.clear()


def compile_model(openvino: Any, model: Any, threads: int) -> Any:  # noqa: ANN401 - a module, and its classes
    """For one stream on the CPU, in float32."""
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 otherwise, where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(model, "CPU", settings)


def load(job: Job) -> OpenVinoRunner:
    """Let OpenVINO read the bundle's ``model.onnx``, whose files are verified first.

    Raises:
        EnvironmentProblem: OpenVINO is missing, or does not take the graph.
    """
    job.refuse_editor()
    openvino = optional_import("openvino", "openvino")
    bundle = open_bundle(job.bundle)
    file = bundle.manifest.graphs["model"].file
    for name in (file, WEIGHTS_NAME):
        if name in bundle.manifest.files:
            bundle.read(name)
    try:
        model = openvino.Core().read_model(bundle.folder / file)
    except RuntimeError as error:
        reason = " ".join(str(error).partition("Summary:")[2].split()) or str(error)
        raise EnvironmentProblem(f"does not take the bundle's {file} ({reason})") from None
    initial = initial_state(bundle)
    return OpenVinoRunner(model, initial, bundle.manifest.edit_layers, job.threads)

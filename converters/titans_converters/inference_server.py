"""A model repository for the Triton Inference Server, from a bundle's manifest.

The server keeps the state of every stream itself: its sequence batcher takes what a call returns as
``present.x`` and gives it to the same stream's next call as ``past.x`` (implicit state management). The first
call of a stream gets the initial values that the manifest states. Editing by the fused rule is in the graph,
with strength ``edit`` from the request; the open editor needs this project's runtime and is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from titans_runtime.bundle import WEIGHTS_NAME, Bundle, initial_state
from titans_runtime.errors import UsageError
from titans_runtime.files import folder_beside, replace_folder, write_atomically
from titans_runtime.manifest import StateSpec, TensorSpec

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}
_IDLE_MICROSECONDS = 60_000_000
_INITIAL_FOLDER = "initial_state"


def write_repository(bundle: Bundle, folder: Path, max_batch: int = 8, max_streams: int = 64) -> Path:
    """Write ``folder/<name of the bundle>``, ready for ``tritonserver --model-repository``.

    Args:
        bundle: opened bundle.
        folder: the repository. A model of this name in it is replaced; others are left alone.
        max_batch: streams that the server may put into one call.
        max_streams: streams that it keeps at the same time.

    Returns:
        The model's folder.

    Raises:
        BundleError: a file of the bundle is missing or was altered.
        UsageError: the place is taken by something that is no model of a repository, or the bundle takes
            given numbers of tokens only.
        EnvironmentProblem: the folder cannot be written.
    """
    if not bundle.manifest.graphs["model"].takes_any_length():
        raise UsageError(
            f"{bundle.folder}: is unrolled for given numbers of tokens; export it with --scan plugin"
        )
    name = bundle.folder.resolve().name
    target = folder / name
    if target.exists() and not (target / "config.pbtxt").is_file():
        raise UsageError(
            f"--triton-repository {folder}: {target} is no model of a repository; remove it first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with folder_beside(target) as work:
        version, initial = work / "1", work / _INITIAL_FOLDER
        version.mkdir()
        graph = onnx.load_from_string(bundle.read(bundle.manifest.graphs["model"].file))
        _hand_through(graph, _fixed(bundle))
        _give_axes(graph, [entry.name for entry in bundle.manifest.state if not entry.row_shape])
        write_atomically(version / "model.onnx", graph.SerializeToString(deterministic=True))
        if WEIGHTS_NAME in bundle.manifest.files:
            write_atomically(version / WEIGHTS_NAME, bundle.read(WEIGHTS_NAME))
        state = initial_state(bundle)
        for entry in bundle.manifest.state:
            if entry.initial != 0:
                initial.mkdir(exist_ok=True)
                write_atomically(initial / entry.name, state[entry.name].tobytes())
        config = model_config(bundle, name, max_batch, max_streams)
        write_atomically(work / "config.pbtxt", config.encode())
        replace_folder(target, work)
    return target


def model_config(bundle: Bundle, name: str, max_batch: int, max_streams: int) -> str:
    """``config.pbtxt``: protocol buffer text of the server's ``inference.ModelConfig``."""
    spec = bundle.manifest.graphs["model"]
    inputs = [tensor for tensor in spec.inputs if not tensor.name.startswith("past.")]
    outputs = [tensor for tensor in spec.outputs if not tensor.name.startswith("present.")]
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch}",
        *(line for tensor in inputs for line in _block("input", _tensor(tensor))),
        *(line for tensor in outputs for line in _block("output", _tensor(tensor))),
        "sequence_batching {",
        f"  max_sequence_idle_microseconds: {_IDLE_MICROSECONDS}",
        f"  oldest {{ max_candidate_sequences: {max_streams} }}",
        *(f"  {line}" for entry in bundle.manifest.state for line in _block("state", _state(entry))),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _fixed(bundle: Bundle) -> list[str]:
    """State that the graph reads and does not return."""
    returned = {tensor.name for tensor in bundle.manifest.graphs["model"].outputs}
    return [entry.name for entry in bundle.manifest.state if f"present.{entry.name}" not in returned]


def _hand_through(graph: onnx.ModelProto, names: Sequence[str]) -> None:
    """Return these entries as they came: to the server a state is an input and an output."""
    inputs = {value.name: value for value in graph.graph.input}
    for name in names:
        past, present = f"past.{name}", f"present.{name}"
        graph.graph.node.append(onnx.helper.make_node("Identity", [past], [present]))
        output = graph.graph.output.add()
        output.CopyFrom(inputs[past])
        output.name = present


def _give_axes(graph: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give state of one number a stream an axis: to the server a tensor has one beside the batch."""
    axis = "state.axis"
    before = [onnx.helper.make_node("Constant", [], [axis], value_ints=[1])]
    after = []
    values = {value.name: value for value in (*graph.graph.input, *graph.graph.output)}
    for past, present in ((f"past.{name}", f"present.{name}") for name in names):
        for name in (past, present):
            values[name].type.tensor_type.shape.dim.add().dim_value = 1
            for node in graph.graph.node:
                for tensors in (node.input, node.output):
                    for index, tensor in enumerate(tensors):
                        tensors[index] = f"{name}.number" if tensor == name else tensor
        before.append(onnx.helper.make_node("Squeeze", [past, axis], [f"{past}.number"]))
        after.append(onnx.helper.make_node("Unsqueeze", [f"{present}.number", axis], [present]))
    if names:
        nodes = [*before, *graph.graph.node, *after]
        del graph.graph.node[:]
        graph.graph.node.extend(nodes)


def _tensor(tensor: TensorSpec) -> Iterator[str]:
    yield f'name: "{tensor.name}"'
    yield f"data_type: {_TYPES[tensor.dtype]}"
    yield f"dims: {_dims(tensor.shape[1:])}"


def _state(entry: StateSpec) -> Iterator[str]:
    typed = [f"data_type: {_TYPES[entry.dtype]}", f"dims: {_dims(entry.shape[1:]) or [1]}"]
    data = "zero_data: true" if entry.initial == 0 else f'data_file: "{entry.name}"'
    yield f'input_name: "past.{entry.name}"'
    yield f'output_name: "present.{entry.name}"'
    yield from typed
    yield from _block("initial_state", [f'name: "{entry.name}"', *typed, data])


def _block(name: str, lines: Iterator[str] | list[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]


def _dims(axes: Sequence[int | str]) -> list[int]:
    """Without the batch, which the server adds; -1 where an axis is free."""
    return [axis if isinstance(axis, int) else -1 for axis in axes]

"""A bundle to a TensorRT engine: strongly typed, a profile each for decode and prefill, and no layer lost.

The parser takes a node for its function body where it finds no plugin, and says nothing. So the network is
counted before it is built: a memory layer that should be a plugin and is not stops the build.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import onnx

from titans_converters import memory_op
from titans_converters.tensorrt.check import FUNCTION, PLUGIN, Report, check
from titans_converters.tensorrt.prepare import prepare
from titans_runtime.backends.cuda import Cuda
from titans_runtime.bundle import WEIGHTS_NAME, Bundle
from titans_runtime.engines import Engine, Target, find_engine, store_engine
from titans_runtime.errors import CheckFailed, EnvironmentProblem, UsageError
from titans_runtime.forward import SEGMENT
from titans_runtime.optional import optional_import

if TYPE_CHECKING:
    import tensorrt as trt

    from titans_runtime.manifest import GraphSpec

_USUAL_BATCH = 1
_LARGEST_FILE = 2**31 - 1  # of a protocol buffer, weights included


def build_engine(
    bundle: Bundle,
    max_batch: int = 8,
    tf32: bool = False,
    rebuild: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Engine:
    """The engine of a bundle for this machine's GPU: from the cache, or built and put there.

    Args:
        bundle: opened bundle.
        max_batch: streams that one call may take.
        tf32: whether products may be rounded to TF32: faster, and about 1e-3 off the goldens.
        rebuild: build even where the cache has it.
        report: receives one line per step.

    Raises:
        EnvironmentProblem: TensorRT, its Python bindings for CUDA, Triton or a GPU is missing.
        CheckFailed: TensorRT does not take the graph, or a memory layer did not become a plugin.
        UsageError: ``max_batch`` is not 1 or more.
    """
    if max_batch < 1:
        raise UsageError(f"--max-batch {max_batch}: must be 1 or more")
    cuda, version = require_tensorrt()
    target = Target(bundle.manifest.identity, cuda.name, cuda.capability, version, max_batch, SEGMENT, tf32)
    found = None if rebuild else find_engine(target)
    if found is not None:
        report(f"{found.path}: built before")
        return found
    model = load_model(bundle)
    expected = check(model)
    expected.raise_if_failed()
    report(f"building for {target.gpu}, TensorRT {target.tensorrt}; this takes minutes")
    content, plugins = _build(prepare(model), bundle.manifest.graphs["model"], target, expected)
    bodies = sum(fate.becomes == FUNCTION for fate in expected.fates)
    return store_engine(target, content, plugins, bodies)


def require_tensorrt() -> tuple[Cuda, str]:
    """The GPU, and TensorRT's version.

    Raises:
        EnvironmentProblem: one is missing; the message says what to install.
    """
    tensorrt: Any = optional_import("tensorrt", "tensorrt")
    version: str = tensorrt.__version__
    return Cuda(), version


def load_model(bundle: Bundle, weights: bool = True) -> onnx.ModelProto:
    """A bundle's model, from verified bytes.

    Args:
        bundle: opened bundle.
        weights: whether to put them into the model; a check needs none.

    Raises:
        BundleError: a file is missing or was altered.
        UsageError: the model is larger than one protocol buffer, or takes given numbers of tokens only.
    """
    spec = bundle.manifest.graphs["model"]
    if not spec.takes_any_length():
        raise UsageError(
            f"{bundle.folder}: is unrolled for given numbers of tokens; export it with --scan plugin"
        )
    model = onnx.load_from_string(bundle.read(spec.file))
    if not weights:
        return model
    content = b""
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        content = content or bundle.read(WEIGHTS_NAME)
        where = {entry.key: entry.value for entry in tensor.external_data}
        start = int(where["offset"])
        tensor.raw_data = content[start : start + int(where["length"])]
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    if model.ByteSize() > _LARGEST_FILE:
        raise UsageError(f"{bundle.folder}: the model has {model.ByteSize()} bytes; {_LARGEST_FILE} at most")
    return model


def _build(model: onnx.ModelProto, spec: GraphSpec, target: Target, expected: Report) -> tuple[bytes, int]:
    """The serialized engine, and how many of its layers are plugins."""
    import tensorrt as trt
    import tensorrt.plugin

    from titans_converters.tensorrt.plugin import register_plugin

    register_plugin(trt)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    # Strongly typed: what the graph says, not what is fastest. Plugins ahead of time: no Python there.
    network = builder.create_network(
        1 << int(flags.STRONGLY_TYPED) | 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    )
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise CheckFailed(f"TensorRT's parser refuses the graph: {errors}")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    plugins = check_plugins(
        [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3], expected
    )
    config = builder.create_builder_config()
    if not target.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    for batch, tokens in profiles(target):
        profile = builder.create_optimization_profile()
        for tensor in spec.inputs:
            sizes = (trt.Dims(_shape(tensor.shape, b, t)) for b, t in zip(batch, tokens, strict=True))
            profile.set_shape(tensor.name, *sizes)
        if config.add_optimization_profile(profile) < 0:
            raise CheckFailed("TensorRT refuses an optimization profile; was the manifest altered?")
    monitor = _progress(trt)
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EnvironmentProblem("TensorRT built no engine; what it reports stands above")
    return bytes(cast(Any, engine)), plugins  # a buffer, whatever its stub says


def profiles(target: Target) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Least, usual and largest batch and tokens: of decode, then of prefill."""
    batch = (1, _USUAL_BATCH, target.max_batch)
    return [(batch, (1, 1, 1)), (batch, (1, target.max_tokens, target.max_tokens))]


def check_plugins(found: list[str], expected: Report) -> int:
    """How many plugins the network holds, which must be as many as the check foresaw.

    Raises:
        CheckFailed: a memory layer is not a plugin; the message names those that should be.
    """
    wanted = [fate.node for fate in expected.fates if fate.becomes == PLUGIN]
    if len(found) != len(wanted):
        raise CheckFailed(
            f"{len(found)} of {len(wanted)} memory layers became a plugin: {', '.join(found) or 'none'}; "
            f"expected {', '.join(wanted)}. Is {memory_op.DOMAIN}::{memory_op.NAME} registered?"
        )
    return len(found)


def _shape(axes: tuple[int | str, ...], batch: int, tokens: int) -> list[int]:
    free = {"batch": batch, "tokens": tokens}
    return [free[axis] if isinstance(axis, str) else axis for axis in axes]


def _progress(trt: Any) -> trt.IProgressMonitor:  # noqa: ANN401 - a module
    """Bars on a terminal, one for every phase that TensorRT reports; Ctrl-C ends the build."""
    bars: dict[str, Any] = {}
    shown = sys.stderr.isatty()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if shown and parent is None:
                tqdm = optional_import("tqdm", "progress")
                bars[name] = tqdm.tqdm(total=steps, desc=name, unit="step", leave=False)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                if name in bars:
                    bars[name].update(max(0, step + 1 - bars[name].n))
            except KeyboardInterrupt:  # an exception would end the process within TensorRT
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, name: str) -> None:
            if name in bars:
                bars.pop(name).close()

    return Monitor()


__all__ = ["build_engine", "check_plugins", "load_model", "profiles", "require_tensorrt"]

"""A bundle's model in a TensorRT engine; its state stays on the GPU, in the session's two alternating sets.

The gradient graphs run in ONNX Runtime, on the CPU: the editor works there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from titans_runtime.backends import Array, Call, Graph, Residence
from titans_runtime.backends.cuda import Cuda, Memory
from titans_runtime.backends.mirror import Mirrors, is_state, whole
from titans_runtime.backends.onnxruntime import OnnxRuntimeBackend
from titans_runtime.backends.placement import Placement
from titans_runtime.bundle import Bundle
from titans_runtime.engines import DECODE, PREFILL, Engine, cache_folder, engines_of
from titans_runtime.errors import BundleError, EnvironmentProblem, UsageError
from titans_runtime.optional import optional_import

if TYPE_CHECKING:
    import tensorrt as trt

    from titans_runtime.manifest import Manifest


class TensorRTBackend:
    """Runs a bundle's model in the engine that was built for it and for this GPU."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Find the GPU and the engine, and load it.

        Args:
            bundle: opened bundle.
            threads: of the gradient graphs.

        Raises:
            EnvironmentProblem: TensorRT, a GPU or an engine is missing; the message says what to do.
            DataError: the engine is damaged.
        """
        tensorrt: Any = optional_import("tensorrt", "tensorrt")
        self._bundle, self._threads = bundle, threads
        self._cuda = Cuda()
        version: str = tensorrt.__version__
        found = engines_of(bundle.manifest.identity, self._cuda.name, version)
        if not found:
            raise EnvironmentProblem(
                f"no engine of this bundle for {self._cuda.name} and TensorRT {version} in {cache_folder()}; "
                f"build one: titans engine {bundle.folder}"
            )
        self.engine = found[0]
        self._mirrors = Mirrors(self._cuda)
        tokens = bundle.manifest.graphs["model"].inputs[0].name
        self._model = TensorRTGraph(self.engine, self._cuda, self._mirrors, tokens)
        self._model.check_interface(bundle)
        self._host: OnnxRuntimeBackend | None = None
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of its graphs."""
        return self._bundle.manifest

    @property
    def residence(self) -> Residence:
        """Where bound arrays are."""
        return self._mirrors

    @property
    def placements(self) -> dict[str, Placement | None]:
        """What the engine is made of, and where the gradient graphs run."""
        made = {"memory layers as plugins": self.engine.plugins, "as function bodies": self.engine.bodies}
        return {"model": {"TensorRT": made}} | ({} if self._host is None else self._host.placements)

    def graph(self, name: str) -> Graph:
        """The graph of that name.

        Raises:
            BundleError: the bundle has no such graph, or it is damaged.
        """
        if name == "model":
            return self._model
        with self._lock:
            if self._host is None:
                self._host = OnnxRuntimeBackend(self._bundle, threads=self._threads, first=name)
        return self._host.graph(name)


class TensorRTGraph:
    """A loaded engine. Calls on it take turns: they share the stream and the scratch memory."""

    def __init__(self, engine: Engine, cuda: Cuda, mirrors: Mirrors, tokens: str) -> None:
        """Load the engine.

        Args:
            engine: as it was found.
            cuda: the GPU that it was built for.
            mirrors: the arrays that have twins there.
            tokens: name of the input whose first axes are batch and tokens.

        Raises:
            DataError: the engine is damaged.
            EnvironmentProblem: TensorRT cannot load it.
        """
        import tensorrt as trt

        self.description, self.cuda, self.mirrors, self.tokens = engine, cuda, mirrors, tokens
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        # Plugins are machine code and formulas in the engine; nothing of theirs is imported here.
        loaded = self._runtime.deserialize_cuda_engine(engine.read())
        if loaded is None:
            raise EnvironmentProblem(f"{engine.path}: TensorRT cannot load it; build it again")
        self.engine: trt.ICudaEngine = loaded
        self._scratch = Memory(cuda, self.engine.device_memory_size_v2)
        self.lock = threading.Lock()

    def check_interface(self, bundle: Bundle) -> None:
        """Compare the engine's tensors with the manifest's.

        Raises:
            BundleError: they are not the same.
        """
        import tensorrt as trt

        spec = bundle.manifest.graphs["model"]
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        found = {name: np.dtype(trt.nptype(self.engine.get_tensor_dtype(name))).name for name in names}
        stated = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
        if found != stated:
            different = ", ".join(sorted(name for name, _ in found.items() ^ stated.items()))
            raise BundleError(f"{self.description.path}: {different} differ from titans.json; build it again")

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`titans_runtime.backends.Graph.bind`.

        Raises:
            UsageError: more streams or tokens than the engine was built for.
        """
        batch, tokens = inputs[self.tokens].shape[:2]
        target = self.description.target
        if batch > target.max_batch or tokens > target.max_tokens:
            raise UsageError(
                f"{batch} streams of {tokens} tokens; the engine takes {target.max_batch} of "
                f"{target.max_tokens}; build another with titans engine --max-batch {batch}"
            )
        return TensorRTCall(self, inputs, outputs, DECODE if tokens == 1 else PREFILL)

    def context(self, profile: int) -> trt.IExecutionContext:
        """A context of its own for a call, in the scratch memory of all.

        Raises:
            EnvironmentProblem: TensorRT cannot make it.
        """
        import tensorrt as trt

        context = self.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
            raise EnvironmentProblem("TensorRT cannot make an execution context; is the GPU's memory full?")
        context.set_device_memory(self._scratch.address, self.engine.device_memory_size_v2)
        return context


class TensorRTCall:
    """The engine with every tensor at a fixed address. Decoding is recorded as a CUDA graph.

    State stays where the last call wrote it. Tokens, edit strengths and results are copied, and so are views
    of larger arrays.
    """

    def __init__(
        self, graph: TensorRTGraph, inputs: Mapping[str, Array], outputs: Mapping[str, Array], profile: int
    ) -> None:
        """Set shapes and addresses."""
        self._graph = graph
        mirrors, cuda = graph.mirrors, graph.cuda
        self._past = [mirrors.of(a) for name, a in inputs.items() if _stays(name, a)]
        self._present = [mirrors.of(a) for name, a in outputs.items() if _stays(name, a)]
        self._given = [(cuda.allocate(a), a) for name, a in inputs.items() if not _stays(name, a)]
        self._results = [(cuda.allocate(a), a) for name, a in outputs.items() if not _stays(name, a)]
        with graph.lock:
            self._context = graph.context(profile)
            given, results = iter(self._given), iter(self._results)
            for name, array in inputs.items():
                twin = mirrors.of(array).twin if _stays(name, array) else next(given)[0]
                self._place(name, twin.address, array)
            for name, array in outputs.items():
                twin = mirrors.of(array).twin if _stays(name, array) else next(results)[0]
                self._place(name, twin.address)
            self._unwanted = self._place_unwanted(outputs, inputs[graph.tokens].shape)
        # Loops and conditions, which function bodies become, cannot be recorded.
        self._records = profile == DECODE and not graph.description.bodies
        self._runs = 0
        self._launch: Callable[[], None] = self._enqueue

    def run(self) -> None:
        """Copy what is new on the host, run, and copy the results; the state stays."""
        graph = self._graph
        with graph.lock:
            for mirror in self._past:
                mirror.to_device()
            for twin, array in self._given:
                graph.mirrors.fetch((array,))
                graph.cuda.upload(twin, array)
            # The first run lets TensorRT allocate what it does on its own, which cannot be recorded.
            if self._records and self._runs == 1:
                self._launch = graph.cuda.record(self._enqueue)
            self._runs += 1
            self._launch()
            for mirror in self._present:
                mirror.written_by_device()
            for twin, array in self._results:
                graph.mirrors.fetch((array,))
                graph.cuda.download(twin, array)
                graph.mirrors.changed((array,))
            graph.cuda.synchronise()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._graph.cuda.stream):
            raise EnvironmentProblem("TensorRT could not run the engine; build it again with titans engine")

    def _place(self, name: str, address: int, given: Array | None = None) -> None:
        placed = self._context.set_tensor_address(name, address)
        if given is not None:
            placed = placed and self._context.set_input_shape(name, given.shape)
        if not placed:
            raise BundleError(f"{self._graph.description.path}: does not take {name}; build it again")

    def _place_unwanted(self, outputs: Mapping[str, Array], shape: tuple[int, ...]) -> list[Memory]:
        """Room for outputs that the caller has no use for; an engine writes all of its own."""
        import tensorrt as trt

        engine, rooms = self._graph.engine, []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) != trt.TensorIOMode.OUTPUT or name in outputs:
                continue
            # Free axes are the batch, then the tokens.
            stated = engine.get_tensor_shape(name)
            sizes = [shape[axis] if stated[axis] < 0 else stated[axis] for axis in range(len(stated))]
            itemsize = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).itemsize
            rooms.append(Memory(self._graph.cuda, int(np.prod(sizes)) * itemsize))
            self._place(name, rooms[-1].address)
        return rooms


def _stays(name: str, array: Array) -> bool:
    return is_state(name) and whole(array) is array

"""The little of CUDA that running an engine takes: memory, one stream, and recorded work."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from titans_runtime.backends import Array
from titans_runtime.errors import EnvironmentProblem
from titans_runtime.optional import optional_import


class Memory:
    """Bytes on the device, freed with this object."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        """Allocate ``size`` bytes, 256-aligned as ``cudaMalloc`` gives them."""
        self.address = int(cuda.call("cudaMalloc", max(size, 1)))
        weakref.finalize(self, cuda.call, "cudaFree", self.address)


class Cuda:
    """The first GPU and one stream on it: a :class:`titans_runtime.backends.mirror.Device`.

    All work of a backend goes through the one stream, so that it needs no other order.
    """

    def __init__(self) -> None:
        """Find the GPU.

        Raises:
            EnvironmentProblem: CUDA's Python bindings, its driver or a GPU is missing.
        """
        self._runtime: Any = optional_import("cuda.bindings.runtime", "tensorrt")
        count = self.call("cudaGetDeviceCount")
        if not count:
            raise EnvironmentProblem("no NVIDIA GPU is here; run where there is one")
        properties = self.call("cudaGetDeviceProperties", 0)
        self.name = properties.name.decode().rstrip("\0")
        self.capability = f"{properties.major}.{properties.minor}"
        self.stream = int(self.call("cudaStreamCreate"))

    def call(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401 - as many kinds as calls
        """A function of the CUDA runtime.

        Raises:
            EnvironmentProblem: it reports an error; the message names both.
        """
        error, *results = getattr(self._runtime, name)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            reason = getattr(error, "name", error)
            raise EnvironmentProblem(f"CUDA: {name} reports {reason}; is a driver for this GPU installed?")
        return results[0] if results else None

    def allocate(self, like: Array) -> Memory:
        """See :class:`titans_runtime.backends.mirror.Device`."""
        return Memory(self, like.nbytes)

    def upload(self, twin: Memory, array: Array) -> None:
        """See :class:`titans_runtime.backends.mirror.Device`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", twin.address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, twin: Memory, array: Array) -> None:
        """See :class:`titans_runtime.backends.mirror.Device`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, twin.address, array.nbytes, kind, self.stream)
        self.synchronise()

    def synchronise(self) -> None:
        """Wait for the stream."""
        self.call("cudaStreamSynchronize", self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what ``work`` puts on the stream as a CUDA graph, without running it; returns its launch."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        finally:
            graph = self.call("cudaStreamEndCapture", self.stream)
        recorded = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)

        def launch() -> None:
            self.call("cudaGraphLaunch", recorded, self.stream)

        weakref.finalize(launch, self.call, "cudaGraphExecDestroy", recorded)
        return launch

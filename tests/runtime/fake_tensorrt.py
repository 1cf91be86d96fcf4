"""Stand-ins for CUDA and TensorRT with the calls that the backend makes, over memory of the host.

An engine's work is done by ONNX Runtime on the bytes at the addresses that it was given, so wrong addresses,
shapes or copies give wrong numbers. They stand for the interface, not for NVIDIA's code: that the real module
has these calls is what the suite ``tensorrt-cpu`` checks.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

Recorded = list[Callable[[], None]]

VERSION = "11.9.9"
GPU = "Stand-in GPU"


class Error(enum.Enum):
    cudaSuccess = 0
    cudaErrorNoDevice = 100


class Cuda(ModuleType):
    """``cuda.bindings.runtime``."""

    cudaError_t = Error
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, devices: int = 1) -> None:
        super().__init__("cuda.bindings.runtime")
        self.devices = devices
        self.memory: dict[int, np.ndarray] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0

    def cudaGetDeviceCount(self) -> tuple[Error, int]:
        return (Error.cudaSuccess if self.devices else Error.cudaErrorNoDevice), self.devices

    def cudaGetDeviceProperties(self, device: int) -> tuple[Error, Any]:
        return Error.cudaSuccess, SimpleNamespace(name=GPU.encode(), major=9, minor=0)

    def cudaStreamCreate(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 77

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Error, int]:
        assert self.recording is None, "memory is allocated while work is recorded"
        room = np.full(size, 0xAB, np.uint8)
        self.memory[room.ctypes.data] = room
        return Error.cudaSuccess, room.ctypes.data

    def cudaFree(self, address: int) -> tuple[Error]:
        del self.memory[address]
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Error]:
        assert self.recording is None, "a pageable copy is recorded"
        on_device = target if kind == 1 else source
        assert self.memory[on_device].nbytes >= size
        ctypes.memmove(target, source, size)
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Error]:
        self.recording = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:
        recorded, self.recording = self.recording, None
        return Error.cudaSuccess, recorded

    def cudaGraphInstantiate(self, graph: Recorded, flags: int) -> tuple[Error, Recorded]:
        assert graph, "nothing was recorded"
        return Error.cudaSuccess, graph

    def cudaGraphDestroy(self, graph: Recorded) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: Recorded) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graph: Recorded, stream: int) -> tuple[Error]:
        self.launches += 1
        for work in graph:
            work()
        return (Error.cudaSuccess,)

    def put(self, work: Callable[[], None]) -> None:
        """On the stream."""
        if self.recording is not None:
            self.recording.append(work)
        else:
            work()


def tensorrt(cuda: Cuda, graph: Path, max_tokens: int = 512) -> ModuleType:  # noqa: C901 - a module
    """``tensorrt``, whose every engine runs ``graph``."""
    module = ModuleType("tensorrt")
    module.__version__ = VERSION  # type: ignore[attr-defined]
    module.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})  # type: ignore[attr-defined]
    module.TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")  # type: ignore[attr-defined]
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)  # type: ignore[attr-defined]
    module.nptype = lambda dtype: dtype  # type: ignore[attr-defined]

    class Engine:
        device_memory_size_v2 = 64

        def __init__(self) -> None:
            self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
            self.inputs = {one.name: one for one in self.session.get_inputs()}
            self.tensors = self.inputs | {one.name: one for one in self.session.get_outputs()}
            self.num_io_tensors = len(self.tensors)

        def get_tensor_name(self, index: int) -> str:
            return list(self.tensors)[index]

        def get_tensor_dtype(self, name: str) -> type:
            return {"tensor(float)": np.float32, "tensor(int64)": np.int64}[self.tensors[name].type]

        def get_tensor_mode(self, name: str) -> enum.Enum:
            return module.TensorIOMode.INPUT if name in self.inputs else module.TensorIOMode.OUTPUT

        def get_tensor_shape(self, name: str) -> list[int]:
            return [axis if isinstance(axis, int) else -1 for axis in self.tensors[name].shape]

        def create_execution_context(self, strategy: int) -> Context:
            assert strategy == module.ExecutionContextAllocationStrategy.USER_MANAGED
            return Context(self)

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.profile = engine, -1
            self.scratch = 0
            self.addresses: dict[str, int] = {}
            self.shapes: dict[str, tuple[int, ...]] = {}

        def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
            self.profile = profile
            return stream == 77

        def set_device_memory(self, address: int, size: int) -> None:
            assert cuda.memory[address].nbytes >= size
            self.scratch = address

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return address in cuda.memory

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shapes[name] = shape
            tokens = shape[1] if name == "input_ids" else 1
            return tokens == 1 if self.profile == 0 else tokens <= max_tokens

        def execute_async_v3(self, stream: int) -> bool:
            assert self.scratch
            assert self.addresses.keys() == self.engine.tensors.keys()
            cuda.put(self._run)
            return True

        def _run(self) -> None:
            feeds = {name: self._at(name, self.shapes[name]).copy() for name in self.engine.inputs}
            names = [name for name in self.engine.tensors if name not in feeds]
            for name, result in zip(names, self.engine.session.run(names, feeds), strict=True):
                self._at(name, result.shape)[:] = result

        def _at(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
            dtype = np.dtype(self.engine.get_tensor_dtype(name))
            size = int(np.prod(shape)) * dtype.itemsize
            return cuda.memory[self.addresses[name]][:size].view(dtype).reshape(shape)

    class Runtime:
        def __init__(self, logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            return Engine() if content == b"engine" else None

    module.Runtime = Runtime  # type: ignore[attr-defined]
    return module

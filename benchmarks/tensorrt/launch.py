"""Launches a plugin's PTX as TensorRT would: with its grid, its threads, and its arguments in its order."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from titans_converters.tensorrt.aot import CompiledKernel


class Launcher:
    """A compiled kernel, loaded by the CUDA driver."""

    def __init__(self, kernel: CompiledKernel) -> None:
        """Load the PTX into the current context, which PyTorch has made."""
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._kernel = kernel
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), kernel.ptx.encode())
        name = kernel.name.encode()
        self._call("cuModuleGetFunction", ctypes.byref(self._function), self._module, name)

    def __call__(
        self, inputs: Sequence[int], tokens: int, outputs: Sequence[int], batch: int, stream: int
    ) -> None:
        """Put one launch on a stream.

        Args:
            inputs: addresses, in the operator's order.
            tokens: ``T``.
            outputs: addresses, in the operator's order.
            batch: ``B``.
            stream: handle.
        """
        values, pointers = arguments(inputs, tokens, outputs)
        x, y = self._kernel.sizes.grid(batch)
        block, shared = self._kernel.threads, self._kernel.shared_bytes
        grid = (x, y, 1, block, 1, 1, shared)
        self._call("cuLaunchKernel", self._function, *grid, ctypes.c_void_p(stream), pointers, None)
        del values  # alive until the driver has copied them

    def _call(self, name: str, *given: Any) -> None:  # noqa: ANN401 - as many kinds as calls
        code = getattr(self._driver, name)(*given)
        if code:
            raise RuntimeError(f"{name} reports error {code}")


def arguments(inputs: Sequence[int], tokens: int, outputs: Sequence[int]) -> tuple[list[Any], Any]:
    """What ``cuLaunchKernel`` takes: the values, which must stay alive, and an array of pointers to them."""
    values: list[Any] = [
        *(ctypes.c_uint64(address) for address in inputs),
        ctypes.c_int32(tokens),
        *(ctypes.c_uint64(address) for address in outputs),
    ]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    return values, pointers

"""The Triton kernel on a CPU, in a process of its own: Triton decides as it is imported to interpret."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from titans_converters.tensorrt.aot import KernelSizes

Arrays = dict[str, npt.NDArray[Any]]
RunKernel = Callable[[Arrays, int], list[npt.NDArray[Any]]]


@contextlib.contextmanager
def interpreter() -> Iterator[RunKernel]:
    """A function that runs the kernel on named inputs, with blocks of so many columns."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_interpret) as pool:
        yield lambda inputs, block: pool.submit(_run, inputs, block).result()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _run(inputs: Arrays, block: int) -> list[npt.NDArray[Any]]:
    import torch

    from titans_converters.tensorrt.kernel import neural_memory_kernel

    torch.set_num_threads(1)
    batch, heads, tokens, key_dim = inputs["query"].shape
    value_dim = inputs["value"].shape[-1]
    sizes = KernelSizes(heads, key_dim, value_dim, block)
    shapes = [(batch, heads, tokens, value_dim), *[(batch, heads, key_dim, value_dim)] * 2]
    outputs = [torch.full(shape, float("nan")) for shape in shapes]
    given = [torch.from_numpy(array) for array in inputs.values()]
    neural_memory_kernel[sizes.grid(batch)](*given, tokens, *outputs, **sizes.constants)
    return [np.asarray(output) for output in outputs]

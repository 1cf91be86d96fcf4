"""What the kernel's benchmark does around the GPU."""

from __future__ import annotations

import ctypes

import torch

from benchmarks.tensorrt.launch import arguments
from benchmarks.tensorrt.run import bytes_moved, make_inputs, worst_error
from titans_converters import memory_op
from titans_export.memory import neural_memory, token_loop


def test_arguments_are_pointers_to_the_values_in_the_ptx_order() -> None:
    values, pointers = arguments(range(100, 109), 7, range(200, 203))
    kinds = [ctypes.c_uint64] * 9 + [ctypes.c_int32] + [ctypes.c_uint64] * 3
    read = [kind.from_address(pointer).value for kind, pointer in zip(kinds, pointers, strict=True)]
    assert read == [*range(100, 109), 7, *range(200, 203)]
    assert len(values) == len(memory_op.INPUTS) + 1 + len(memory_op.OUTPUTS)


def test_bytes_are_those_of_every_input_and_output_once() -> None:
    inputs = make_inputs(2, 3, 5, 16, "cpu")
    outputs = neural_memory(*inputs)
    assert bytes_moved(2, 3, 5, 16) == sum(tensor.nbytes for tensor in (*inputs, *outputs))


def test_errors_are_relative_to_the_token_loop() -> None:
    inputs = make_inputs(1, 2, 40, 16, "cpu")
    expected = token_loop(*(tensor.double() for tensor in inputs))
    results = neural_memory(*inputs)
    assert worst_error(results, expected) < 1e-4
    assert worst_error((results[0] * 1.01, *results[1:]), expected) > 1e-3
    assert all(torch.isfinite(tensor).all() for tensor in results)

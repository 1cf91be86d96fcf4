"""PTX compiled without a GPU: the signature that TensorRT will launch, and machine code from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import titans_runtime as tr
from titans_converters import memory_op
from titans_converters.tensorrt import aot
from titans_converters.tensorrt.aot import KernelSizes, assemble, blocks_for, compile_kernel

SIZES = KernelSizes(heads=2, key_dim=16, value_dim=16, block=16)
POINTERS_IN, POINTERS_OUT = [".u64"] * len(memory_op.INPUTS), [".u64"] * len(memory_op.OUTPUTS)


def test_parameters_are_inputs_then_tokens_then_outputs() -> None:
    assert aot.parameter_types(compile_kernel(SIZES).ptx) == [*POINTERS_IN, ".u32", *POINTERS_OUT]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_assembles_for_every_generation(capability: int) -> None:
    assert assemble(compile_kernel(SIZES).ptx, capability).startswith(b"\x7fELF")


def test_the_assembler_is_not_indifferent() -> None:
    broken = compile_kernel(SIZES).ptx.replace("neural_memory_kernel_param_12]", "no_such_parameter]")
    with pytest.raises(tr.EnvironmentProblem, match="no_such_parameter"):
        assemble(broken, 90)


def test_launch_parameters_are_those_of_the_ptx() -> None:
    kernel = compile_kernel(SIZES)
    assert f".entry {kernel.name}(" in kernel.ptx
    assert re.search(rf"\.reqntid {kernel.threads}\b", kernel.ptx)
    assert 0 < kernel.shared_bytes <= 48 * 1024


def test_it_runs_from_compute_capability_80_on_and_names_no_file() -> None:
    ptx = compile_kernel(SIZES).ptx
    assert re.search(r"^\.target sm_80$", ptx, re.MULTILINE)
    assert str(Path(aot.__file__).parent) not in ptx


def test_a_hidden_parameter_that_is_used_is_refused() -> None:
    ptx = compile_kernel(SIZES).ptx
    last = "neural_memory_kernel_param_12"
    with_hidden = ptx.replace(f" {last}\n)", f" {last},\n\t.param .u64 .ptr .global .align 1 hidden_13\n)")
    assert aot.without_hidden_parameters(with_hidden) == ptx
    used = with_hidden.replace(f"[{last}]", "[hidden_13]")
    with pytest.raises(tr.EnvironmentProblem, match="uses the hidden parameter hidden_13"):
        aot.without_hidden_parameters(used)


def test_another_signature_is_refused() -> None:
    with pytest.raises(tr.EnvironmentProblem, match="not "):
        aot.without_hidden_parameters(compile_kernel(SIZES).ptx.replace(".param .u32", ".param .u64"))


def test_the_grid_has_a_program_for_every_row_head_and_block() -> None:
    assert KernelSizes(8, 64, 64, 64).grid(batch=3) == (24, 1)
    assert KernelSizes(8, 64, 40, 16).grid(batch=1) == (8, 3)


@pytest.mark.parametrize(
    ("value_dim", "blocks"), [(1, (16,)), (16, (16,)), (33, (16, 32, 64)), (64, (16, 32, 64))]
)
def test_blocks_for_a_width(value_dim: int, blocks: tuple[int, ...]) -> None:
    assert blocks_for(value_dim) == blocks


@pytest.mark.parametrize("sizes", [(1, 129, 16, 16), (0, 16, 16, 16), (1, 16, 0, 16), (1, 16, 16, 8)])
def test_sizes_that_do_not_fit_a_chip_are_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(tr.UsageError, match="kernel:"):
        KernelSizes(*sizes)


def test_interpreting_and_compiling_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(tr.EnvironmentProblem, match="TRITON_INTERPRET"):
        compile_kernel(KernelSizes(1, 16, 16, 16))

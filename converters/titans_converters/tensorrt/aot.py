"""The kernel compiled ahead of time: PTX whose signature is the one that TensorRT will launch.

Needs no GPU. One PTX for compute capability 8.0 serves every later GPU: the driver translates it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from titans_converters import memory_op
from titans_runtime.errors import EnvironmentProblem, UsageError

COMPUTE_CAPABILITY: Final = 80
"""PTX for 9.0 would be ``sm_90a``, which runs nowhere else."""

BLOCKS: Final = (16, 32, 64)
"""Columns of the memory that one program may take: the tactics of the plugin."""

_TILE = 16
# With 16 tokens and 256 threads everything stays in registers (8 bytes of spills for 64 x 16); with 32 and
# 128, which suits the ONNX body on a CPU, 29 KB spilled.
_WARPS = 8
_WARP = 32
_LARGEST_WIDTH = 128
_SHARED_LIMIT = 48 * 1024  # more needs an attribute on the function, which a plugin cannot set
_POINTER, _INTEGER = ".u64", ".u32"
_SIGNATURE = [*[_POINTER] * len(memory_op.INPUTS), _INTEGER, *[_POINTER] * len(memory_op.OUTPUTS)]
_ENTRY = re.compile(r"\.entry (?P<name>\w+)\(\n(?P<parameters>[^)]*)\)")
_PARAMETER = re.compile(r"^\s*\.param (?P<type>\.\w+) .*?(?P<name>\w+),?$", re.MULTILINE)


@dataclass(frozen=True)
class KernelSizes:
    """What the kernel is compiled for.

    Attributes:
        heads: ``H``.
        key_dim: ``Dk``, 1 to 128.
        value_dim: ``Dv``.
        block: columns of the memory for each program, one of :data:`BLOCKS`.
    """

    heads: int
    key_dim: int
    value_dim: int
    block: int

    def __post_init__(self) -> None:
        """Refuse what the kernel cannot take.

        Raises:
            UsageError: a size out of range.
        """
        if self.block not in BLOCKS:
            raise UsageError(f"kernel: block is {self.block}; it must be one of {BLOCKS}")
        if not 1 <= self.key_dim <= _LARGEST_WIDTH or self.value_dim < 1 or self.heads < 1:
            raise UsageError(
                f"kernel: {self.heads} heads of {self.key_dim} x {self.value_dim}; a memory on the chip has "
                f"keys of 1 to {_LARGEST_WIDTH}"
            )

    def grid(self, batch: int) -> tuple[int, int]:
        """Programs: one a batch row and head, times the cuts of its columns."""
        return batch * self.heads, self.column_blocks

    @property
    def column_blocks(self) -> int:
        """Programs that share a head."""
        return -(-self.value_dim // self.block)

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time parameters."""
        return {
            "H": self.heads,
            "DK": self.key_dim,
            "DV": self.value_dim,
            "TILE": _TILE,
            "BLOCK_K": max(16, 1 << (self.key_dim - 1).bit_length()),
            "BLOCK_V": self.block,
        }


@dataclass(frozen=True)
class CompiledKernel:
    """PTX and how to launch it: nine pointers in, ``T`` as a 32-bit integer, three pointers out."""

    name: str
    ptx: str
    threads: int
    shared_bytes: int
    sizes: KernelSizes


def blocks_for(value_dim: int) -> tuple[int, ...]:
    """The blocks that make sense for a value width: none much wider than it."""
    return tuple(block for block in BLOCKS if block == BLOCKS[0] or block < 2 * value_dim)


@functools.cache
def compile_kernel(sizes: KernelSizes) -> CompiledKernel:
    """Compile for ``sizes`` and check that the result is what a plugin may launch.

    Raises:
        EnvironmentProblem: Triton is missing, or emits another signature than the operator's.
    """
    triton = _import_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from titans_converters.tensorrt.kernel import neural_memory_kernel as kernel

    names, constants = list(kernel.arg_names), sizes.constants
    signature = {name: "constexpr" if name in constants else "*fp32" for name in names} | {"T": "i32"}
    # TensorRT aligns tensors to 256 bytes; told so, the compiler loads four numbers at once.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] == "*fp32"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it names files of the building machine
        compiled = triton.compile(
            source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, _WARP), options={"num_warps": _WARPS}
        )
    if compiled.metadata.shared > _SHARED_LIMIT:
        raise EnvironmentProblem(
            f"Triton {triton.__version__}: the kernel needs {compiled.metadata.shared} bytes of shared "
            f"memory, a plugin has {_SHARED_LIMIT}; use triton 3.6"
        )
    ptx = without_hidden_parameters(compiled.asm["ptx"])
    return CompiledKernel(compiled.metadata.name, ptx, _WARPS * _WARP, compiled.metadata.shared, sizes)


def without_hidden_parameters(ptx: str) -> str:
    """PTX with the operator's parameters alone.

    Triton appends pointers to scratch memory, which TensorRT would not pass. The kernel uses none, so they
    can go.

    Raises:
        EnvironmentProblem: the parameters before them are not the operator's, or the code uses a hidden one.
    """
    entry = _ENTRY.search(ptx)
    found = [] if entry is None else list(_PARAMETER.finditer(entry["parameters"]))
    types = [parameter["type"] for parameter in found]
    count = len(_SIGNATURE)
    if entry is None or types[:count] != _SIGNATURE:
        raise EnvironmentProblem(f"Triton emitted parameters {types}, not {_SIGNATURE}; use triton 3.6")
    body = ptx[entry.end() :]
    for hidden in found[count:]:
        if re.search(rf"\b{hidden['name']}\b", body):
            raise EnvironmentProblem(
                f"Triton's kernel uses the hidden parameter {hidden['name']}; use triton 3.6"
            )
    kept = entry["parameters"][: found[count - 1].end()].rstrip(",")
    return f"{ptx[: entry.start('parameters')]}{kept}\n{ptx[entry.end('parameters') :]}"


def parameter_types(ptx: str) -> list[str]:
    """Types of the entry's parameters, in order."""
    entry = _ENTRY.search(ptx)
    return [] if entry is None else [found["type"] for found in _PARAMETER.finditer(entry["parameters"])]


def assemble(ptx: str, capability: int) -> bytes:
    """Machine code of one GPU generation, by the assembler that comes with Triton.

    Args:
        ptx: of :func:`compile_kernel`.
        capability: 80, 90, 100.

    Raises:
        EnvironmentProblem: it does not assemble; the message is the assembler's.
    """
    triton = _import_triton()
    nvidia = triton.knobs.nvidia
    tool = (nvidia.ptxas if capability < 100 else nvidia.ptxas_blackwell).path
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="ascii")
        command = [tool, f"-arch=sm_{capability}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EnvironmentProblem(f"ptxas for sm_{capability}: {' '.join(done.stderr.split())}")
        return target.read_bytes()


def to_dict(kernel: CompiledKernel) -> dict[str, Any]:
    """The kernel as plain JSON types, for a launcher that has no Triton."""
    return dataclasses.asdict(kernel)


def _import_triton() -> Any:  # noqa: ANN401 - a module
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise EnvironmentProblem("TRITON_INTERPRET is set, so nothing can be compiled; unset it")
    try:
        import triton
    except ImportError:
        raise EnvironmentProblem(
            "triton is not installed; pip install 'titans-converters[tensorrt]'"
        ) from None
    return triton

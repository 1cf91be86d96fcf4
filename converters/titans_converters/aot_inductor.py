"""A program to an AOTInductor package: code for this kind of processor, any batch, any number of tokens.

A package holds up to two compiled models: ``model``, and where a program advances a stream ``one_token``
beside it, which knows that there is one: decoding is where a loop's bookkeeping would cost most.
"""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from titans_converters.exported import export, written_out
from titans_converters.gradient_loops import both_ways
from titans_converters.gradient_module import Gradient
from titans_converters.loops import OneToken, forwards, without_operators
from titans_converters.program import Axes, Program, RecurrenceProgram
from titans_converters.twins import GradientTwin, description, revealing
from titans_runtime.errors import EnvironmentProblem
from titans_runtime.files import write_atomically
from titans_runtime.progress import progress_bar
from titans_runtime.quiet import quiet

FOLDER: Final = "aoti"
GRAPH_KEY: Final = "graph.json"
"""In a compiled model's metadata: names, dtypes and axes of inputs and outputs, in order."""

ANY: Final = "model"
"""Name of the compiled model for any number of tokens: what is loaded unless another is asked for."""

ONE: Final = "one_token"

_OPTIONS: Final[dict[str, Any]] = {
    "aot_inductor.package": True,
    "aot_inductor.enable_line_tables": False,  # they name files of this machine
    "cpp.dynamic_threads": True,  # or the number of threads here would be compiled in
}
_LEVELS: Final = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
"""What the compiler may use, by PyTorch's name: a level that others have too, not all that is known here."""
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the earliest time that an archive can name


def write_aot_inductor(
    programs: Sequence[Program | GradientTwin], recurrences: Sequence[RecurrenceProgram], folder: Path
) -> dict[str, str]:
    """Write ``aoti/<name>.pt2`` for every program; it takes a C++ compiler, and a minute for each.

    Args:
        programs: what to convert.
        recurrences: what their nodes of ours stand for.
        folder: of the bundle.

    Returns:
        File names by program.

    Raises:
        EnvironmentProblem: there is no C++ compiler.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    files = {}
    for program in progress_bar(programs, "compiling", "graph"):
        files[program.name] = f"{FOLDER}/{program.name}.pt2"
        write_atomically(folder / files[program.name], package(program, recurrences))
    return files


def package(program: Program | GradientTwin, recurrences: Sequence[RecurrenceProgram] = ()) -> bytes:
    """The program as the content of a file that ``torch._inductor.aoti_load_package`` takes.

    Raises:
        ValueError: a node of ours has no recurrence.
        EnvironmentProblem: there is no C++ compiler.
    """
    from torch._inductor.package.package import package_aoti

    check_compiler()
    notes = {"aot_inductor.metadata": {GRAPH_KEY: description(program)}}
    with tempfile.TemporaryDirectory() as folder, quiet(), torch.no_grad():
        files: dict[str, Any] = {}
        for name, graph, inputs in _models(program, recurrences):
            options = _OPTIONS | notes | _level() | {"aot_inductor.output_path": str(Path(folder) / name)}
            files[name] = _compile(graph, inputs, options)
        path = Path(folder) / f"{program.name}.pt2"
        package_aoti(str(path), files)
        return _without_sources(path.read_bytes(), (Path(folder), Path(torch.__file__).parent))


def check_compiler() -> None:
    """See that there is a C++ compiler.

    Raises:
        EnvironmentProblem: there is none; the message says what to do.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise EnvironmentProblem(
            "--format aoti needs a C++ compiler, and none was found; install g++, or name one in CXX"
        ) from None


def _compile(graph: fx.GraphModule, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> Any:  # noqa: ANN401
    """Files that make up a compiled model."""
    from torch._inductor.exc import CppCompileError

    try:
        return torch._inductor.aot_compile(  # noqa: SLF001 - where PyTorch documents it
            graph, inputs, options=options
        )
    except CppCompileError as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0]).strip()[:300]
        raise EnvironmentProblem(f"--format aoti: the C++ compiler failed ({reason})") from None


def _level() -> dict[str, str]:
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability())
    return {"cpp.march": level} if level else {}


def _models(
    program: Program | GradientTwin, recurrences: Sequence[RecurrenceProgram]
) -> Iterator[tuple[str, fx.GraphModule, tuple[Tensor, ...]]]:
    """What a package holds: names, graphs and stand-ins for their inputs."""
    if isinstance(program, GradientTwin):
        known = {one.name: one for one in recurrences}
        traced, layers = revealing(program.model, program.memories, known)
        model = without_operators(traced, recurrences, both_ways)
        module: nn.Module = _Listed(Gradient(program, _Unlisted(model), layers))
        inputs = _examples(program)
        yield ANY, *_flat(module, inputs, list(program.input_axes.values()))
        return
    inputs, axes = list(program.inputs.values()), list(program.input_axes.values())
    yield ANY, *_flat(without_operators(export(program).module(), recurrences, forwards), inputs, axes)
    if any(recurrence.apart for recurrence in recurrences) or not _streams(program):
        return
    single = [_first_token(x, shape) for x, shape in zip(inputs, axes, strict=True)]
    axes = [tuple(1 if axis == "tokens" else axis for axis in shape) for shape in axes]
    yield ONE, *_flat(without_operators(export(program).module(), recurrences, OneToken), single, axes)


def _streams(program: Program) -> bool:
    """Whether it takes a stream from one state to the next."""
    return any(name.startswith("present.") for name in program.output_axes)


def _flat(
    module: nn.Module, inputs: Sequence[Tensor], axes: Sequence[Axes]
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The module as a graph, which says of itself that it takes tensors and gives a tuple of them."""
    graph, stand_ins = written_out(_Contiguous(module), inputs, axes)
    (output,) = graph.graph.find_nodes(op="output")
    output.args = (tuple(output.args[0]),)
    graph.recompile()
    given, results = tuple(range(len(stand_ins))), tuple(range(len(output.args[0])))
    graph._in_spec = pytree.tree_structure((given, {}))  # noqa: SLF001 - read by the compiler
    graph._out_spec = pytree.tree_structure(results)  # noqa: SLF001
    return graph, tuple(stand_ins)


def _examples(twin: GradientTwin) -> list[Tensor]:
    """Zeros, in the sizes with which the model is traced."""
    sizes: dict[int | str, int] = {}
    for name, axes in twin.model.input_axes.items():
        sizes |= dict(zip(axes, twin.model.inputs[name].shape, strict=True))
    return [
        torch.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in axes], dtype=twin.dtype(name))
        for name, axes in twin.input_axes.items()
    ]


def _first_token(tensor: Tensor, axes: Axes) -> Tensor:
    return tensor.narrow(axes.index("tokens"), 0, 1) if "tokens" in axes else tensor


class _Contiguous(nn.Module):
    """Results that may be given to the next call as they are: compiled code does not look at strides."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(result.contiguous() for result in self.module(*inputs))


class _Listed(nn.Module):
    """A module of lists as one of tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.module(list(inputs)))


class _Unlisted(nn.Module):
    """The converse."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return list(self.module(*inputs))


def _without_sources(content: bytes, folders: Sequence[Path]) -> bytes:
    """The archive without the C++ that was compiled, and without the names of ``folders`` in what it became.

    Messages of PyTorch's own checks name its headers.
    """
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for record in old.namelist():
            if record.endswith((".cpp", ".kernel_metadata.json")):
                continue
            kept = old.read(record)
            for name in (os.fsencode(folder) for folder in folders):
                kept = kept.replace(name, b".".ljust(len(name), b"/"))  # of the same length: offsets stay
            new.writestr(zipfile.ZipInfo(record, _EPOCH), kept)
    return result.getvalue()

"""A program to TorchScript, for any batch and any number of tokens.

``torch.jit.trace`` would bake the number of tokens into its loops, and ``torch.jit.script`` does not know
enough Python for a model. So the graph that ``torch.export`` has traced, with its sizes as formulas, is
written as a script; and an operator of ours becomes a call of a scripted loop over traced parts, as in the
ONNX graph.
"""

from __future__ import annotations

import io
import json
import operator
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from titans_converters.exported import attributes_of, export, operator_of
from titans_converters.program import Program, RecurrenceProgram
from titans_runtime.files import write_atomically
from titans_runtime.quiet import quiet

FOLDER: Final = "torchscript"
GRAPH_FILE: Final = "graph.json"
"""In the archive: names, dtypes and axes of inputs and outputs, in order."""

_CHECKS: Final = (  # the tracer's, of its own assumptions
    torch.ops.aten._assert_scalar.default,  # noqa: SLF001 - an operator's name
    torch.ops.aten._assert_tensor_metadata.default,  # noqa: SLF001
)
_SPELLINGS: Final[dict[object, Any]] = {  # of what TorchScript knows by another name
    torch.ops.aten.sym_size.int: torch.ops.aten.size,
    torch.sym_max: max,
    torch.sym_min: min,
}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that an archive can name


def write_torchscript(
    programs: Sequence[Program], recurrences: Sequence[RecurrenceProgram], folder: Path
) -> dict[str, str]:
    """Write ``torchscript/<name>.pt`` for every program.

    Args:
        programs: what to convert.
        recurrences: what their nodes of ours stand for.
        folder: of the bundle.

    Returns:
        File names by program.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    files = {}
    for program in programs:
        files[program.name] = f"{FOLDER}/{program.name}.pt"
        write_atomically(folder / files[program.name], archive(program, recurrences))
    return files


def archive(program: Program, recurrences: Sequence[RecurrenceProgram] = ()) -> bytes:
    """The program as the content of a file that ``torch.jit.load`` takes."""
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(
            convert(program, recurrences), buffer, _extra_files={GRAPH_FILE: _description(program)}
        )
    return _without_sources(buffer.getvalue(), program.name)


def convert(program: Program, recurrences: Sequence[RecurrenceProgram] = ()) -> torch.jit.ScriptModule:
    """The program as a script module whose ``forward`` takes and gives tensors in the program's order.

    Args:
        program: what to convert.
        recurrences: what its nodes of ours stand for.

    Raises:
        ValueError: a free axis was fixed by the module's code, or a node of ours has no recurrence.
    """
    with quiet(), torch.no_grad():
        script: torch.jit.ScriptModule = torch.jit.script(_as_script(program, recurrences).eval())
    return script


def _as_script(
    program: Program, recurrences: Sequence[RecurrenceProgram] = (), listed: bool = False
) -> fx.GraphModule:
    """The traced graph in words that TorchScript knows.

    ``listed``: tensors come and go as one list, for parts of a recurrence.
    """
    traced = export(program).module()
    root, graph = nn.Module(), fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    loops = {recurrence.name: recurrence for recurrence in recurrences}
    given = _placeholders(program, graph, listed)
    for node in traced.graph.nodes:
        name = operator_of(node)
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            if node.users:
                values[node] = _constant(root, graph, node.target, _attribute(traced, node.target))
        elif node.op == "call_module" or node.target in _CHECKS:
            continue
        elif name == "Sinkhorn":
            values[node] = _sinkhorn(root, graph, node, values)
        elif name is not None:
            if name not in loops:
                raise ValueError(f"program {program.name}: no recurrence for the operator {name}")
            if not hasattr(root, name):
                root.add_module(name, _Loop(loops[name]))
            values[node] = graph.create_node("call_module", name, ([values[x] for x in node.args[0]],))
        elif node.op == "output":
            results = [values[x] for x in node.args[0]]
            graph.output(results if listed else tuple(results))
        else:
            values[node] = _call(graph, node, values)
    module = fx.GraphModule(root, graph, class_name=program.name.replace(".", "_"))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _placeholders(program: Program, graph: fx.Graph, listed: bool) -> Any:  # noqa: ANN401 - an iterator of nodes
    if not listed:
        return iter([graph.placeholder(name.replace(".", "_")) for name in program.inputs])
    inputs = graph.placeholder("inputs", type_expr=list[Tensor])
    return iter([graph.call_function(operator.getitem, (inputs, i)) for i in range(len(program.inputs))])


def _attribute(module: nn.Module, path: str) -> Tensor:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    tensor: Tensor = value.detach()
    return tensor


def _constant(root: nn.Module, graph: fx.Graph, path: str, value: Tensor) -> fx.Node:
    name = path.replace(".", "_")
    if not hasattr(root, name):
        root.register_buffer(name, value)
    return graph.create_node("get_attr", name)


def _call(graph: fx.Graph, node: fx.Node, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A call of a PyTorch operator or of Python arithmetic on sizes.

    TorchScript finds an operator's overload by itself.
    """
    copy = graph.node_copy(node, lambda argument: values[argument])
    if node.target in _SPELLINGS:
        copy.target = _SPELLINGS[node.target]
    elif isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001
        copy.target = node.target.overloadpacket
    return copy


def _sinkhorn(root: nn.Module, graph: fx.Graph, node: fx.Node, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A call of the iteration that a node of ours stands for."""
    name = f"Sinkhorn_{node.name}"
    root.add_module(name, _Sinkhorn(attributes_of(node)["iterations"]))
    inputs: Any = node.args[0]
    return graph.create_node("call_module", name, (values[inputs[0]],))


class _Sinkhorn(nn.Module):
    """Matrices made doubly stochastic; see :mod:`titans_converters.onnx.sinkhorn`."""

    def __init__(self, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations

    def forward(self, logits: Tensor) -> list[Tensor]:
        kernel = torch.exp(logits - logits.amax(-2, keepdim=True))
        for _ in range(self.iterations):
            kernel = kernel / kernel.sum(-2, keepdim=True)
            kernel = kernel / kernel.sum(-1, keepdim=True)
        return [kernel]


class _Loop(nn.Module):
    """A recurrence: one token, or a loop over tiles. Names of tensors have become places in lists."""

    def __init__(self, recurrence: RecurrenceProgram) -> None:
        super().__init__()
        inputs, tiles = list(recurrence.one.inputs), list(recurrence.tiles.output_axes)
        self.one = _as_script(recurrence.one, listed=True)
        self.tiles = _as_script(recurrence.tiles, listed=True)
        self.step = _as_script(recurrence.step, listed=True)
        self.rows = _as_script(recurrence.rows, listed=True)
        self.tile = recurrence.tile
        self.apart = torch.jit.Attribute(list(recurrence.apart), list[int])
        self.position = inputs.index("position") if recurrence.apart else -1
        self.live = tiles.index("live")
        self.counted = inputs.index(recurrence.tokens[0])
        self.carry = [inputs.index(name) for name in recurrence.carry]
        self.tile_inputs = [inputs.index(name) for name in recurrence.tiles.inputs]
        self.step_inputs = [
            _place(name, tiles, list(recurrence.carry), inputs) for name in recurrence.step.inputs
        ]
        results, streamed = list(recurrence.step.output_axes), list(recurrence.rows.output_axes)
        self.streamed = [results.index(name) for name in streamed]
        self.carried = [i for i in range(len(results)) if i not in self.streamed]
        self.put_out = [i for i, name in enumerate(recurrence.one.output_axes) if name != recurrence.revealed]
        self.row_inputs = [
            _place(name, [f"tiles.{name}" for name in streamed], inputs) for name in recurrence.rows.inputs
        ]

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        if inputs[self.counted].size(2) == 1 and not self.is_apart(inputs):
            single: list[Tensor] = self.one(inputs)
            return [single[i] for i in self.put_out]
        tiles: list[Tensor] = self.tiles([inputs[i] for i in self.tile_inputs])
        carry = [inputs[i] for i in self.carry]
        steps: list[list[Tensor]] = []
        for n in range(tiles[0].size(0)):
            if not bool(tiles[self.live][n].any()):  # the last tile is there for rows that begin late
                break
            known = [tile[n] for tile in tiles] + carry + inputs
            results: list[Tensor] = self.step([known[i] for i in self.step_inputs])
            steps.append(results)
            carry = [results[i] for i in self.carried]
        known = [torch.stack([step[i] for step in steps]) for i in self.streamed] + inputs
        rows: list[Tensor] = self.rows([known[i] for i in self.row_inputs])
        return rows[:1] + carry  # the read comes first; what is revealed is for gradients alone

    def is_apart(self, inputs: list[Tensor]) -> bool:
        """Whether a row's token stands at a place that only a tile takes."""
        for place in self.apart:  # noqa: SIM110 - TorchScript has no generators
            if bool((inputs[self.position] % self.tile == place).any()):
                return True
        return False


def _place(name: str, *lists: list[str]) -> int:
    """Where ``name`` first stands in the lists, one after the other."""
    return [known for names in lists for known in names].index(name)


def _description(program: Program) -> str:
    """Names, dtypes and axes of inputs and outputs in order, as a bundle's manifest gives them."""

    def tensors(axes: Mapping[str, Sequence[int | str]]) -> list[dict[str, Any]]:
        return [
            {"name": name, "dtype": str(program.dtype(name)).removeprefix("torch."), "shape": list(shape)}
            for name, shape in axes.items()
        ]

    content = {
        "name": program.name,
        "inputs": tensors(program.input_axes),
        "outputs": tensors(program.output_axes),
    }
    return json.dumps(content, indent=1)


def _without_sources(content: bytes, name: str) -> bytes:
    """The archive without its notes on source files: they name files of the exporting machine."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for record in old.namelist():
            if not record.endswith(".debug_pkl"):
                _, _, path = record.partition("/")
                new.writestr(zipfile.ZipInfo(f"{name}/{path}", _EPOCH), old.read(record))
    return result.getvalue()

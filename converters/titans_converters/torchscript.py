"""A program to TorchScript, for any batch and any number of tokens.

``torch.jit.trace`` would bake the number of tokens into its loops, and ``torch.jit.script`` does not know
enough Python for a model. So the graph that ``torch.export`` has traced, with its sizes as formulas, is
written as a script; and an operator of ours becomes a call of a scripted loop over traced parts, as in the
ONNX graph.
"""

from __future__ import annotations

import io
import operator
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from titans_converters.exported import CHECKS, attributes_of, export, operator_of
from titans_converters.gradient_module import Gradient
from titans_converters.onnx.sinkhorn import doubly_stochastic
from titans_converters.program import LoopProgram, Program, RecurrenceProgram
from titans_converters.recurrence import LoopPlaces, Places
from titans_converters.twins import GradientTwin, description, revealing
from titans_runtime.files import write_atomically
from titans_runtime.quiet import quiet

FOLDER: Final = "torchscript"
GRAPH_FILE: Final = "graph.json"
"""In the archive: names, dtypes and axes of inputs and outputs, in order."""

_SPELLINGS: Final[dict[object, Any]] = {  # of what TorchScript knows by another name
    torch.ops.aten.sym_size.int: torch.ops.aten.size,
    torch.sym_max: max,
    torch.sym_min: min,
}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that an archive can name


def write_torchscript(
    programs: Sequence[Program | GradientTwin], recurrences: Sequence[RecurrenceProgram], folder: Path
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


def archive(program: Program | GradientTwin, recurrences: Sequence[RecurrenceProgram] = ()) -> bytes:
    """The program as the content of a file that ``torch.jit.load`` takes."""
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(convert(program, recurrences), buffer, _extra_files={GRAPH_FILE: description(program)})
    return _without_sources(buffer.getvalue(), program.name)


def convert(
    program: Program | GradientTwin, recurrences: Sequence[RecurrenceProgram] = ()
) -> torch.jit.ScriptModule:
    """The program as a script module whose ``forward`` takes and gives tensors in the program's order.

    The gradient of a model is taken by the script itself, which runs the model and then autograd: not in
    inference mode, in which PyTorch keeps nothing that gradients need.

    Args:
        program: what to convert.
        recurrences: what its nodes of ours stand for.

    Raises:
        ValueError: a free axis was fixed by the module's code, or a node of ours has no recurrence.
    """
    with quiet(), torch.no_grad():
        if isinstance(program, GradientTwin):
            module = _gradient_script(program, recurrences)
        else:
            module = _as_script(program, recurrences)
        script: torch.jit.ScriptModule = torch.jit.script(module.eval())
    return script


def _gradient_script(twin: GradientTwin, recurrences: Sequence[RecurrenceProgram]) -> fx.GraphModule:
    """A graph with the twin's inputs and outputs, around a module that takes and gives lists."""
    traced, layers = revealing(twin.model, twin.memories, {one.name: one for one in recurrences})
    model = _as_script(twin.model, recurrences, listed=True, revealing=traced)
    root, graph = nn.Module(), fx.Graph()
    root.add_module("gradient", Gradient(twin, model, layers))
    inputs = list(_placeholders(twin.inputs, graph, listed=False))
    results = graph.create_node("call_module", "gradient", (inputs,))
    graph.output(tuple(graph.call_function(operator.getitem, (results, i)) for i in range(len(twin.outputs))))
    return fx.GraphModule(root, graph, class_name=twin.name.replace(".", "_"))


def _as_script(
    program: Program,
    recurrences: Sequence[RecurrenceProgram | LoopProgram] = (),
    listed: bool = False,
    revealing: fx.GraphModule | None = None,
) -> fx.GraphModule:
    """The traced graph in words that TorchScript knows.

    ``listed``: tensors come and go as one list, for parts of a recurrence. ``revealing``: the traced graph,
    where its recurrences reveal what memories are taught.
    """
    traced = revealing or export(program).module()
    root, graph = nn.Module(), fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    loops = {recurrence.name: recurrence for recurrence in recurrences}
    given = _placeholders(program.inputs, graph, listed)
    for node in traced.graph.nodes:
        name = operator_of(node)
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            if node.users:
                values[node] = _constant(root, graph, node.target, _attribute(traced, node.target))
        elif node.op == "call_module" or node.target in CHECKS:
            continue
        elif name == "Sinkhorn":
            values[node] = _sinkhorn(root, graph, node, values)
        elif name is not None:
            if name not in loops:
                raise ValueError(f"program {program.name}: no recurrence for the operator {name}")
            if not hasattr(root, name):
                root.add_module(name, _loop(loops[name], revealing is not None))
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


def _placeholders(names: Collection[str], graph: fx.Graph, listed: bool) -> Iterator[fx.Node]:
    if not listed:
        return iter([graph.placeholder(name.replace(".", "_")) for name in names])
    inputs = graph.placeholder("inputs", type_expr=list[Tensor])
    return iter([graph.call_function(operator.getitem, (inputs, i)) for i in range(len(names))])


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
        return [doubly_stochastic(logits, self.iterations)]


def _loop(program: RecurrenceProgram | LoopProgram, reveal: bool) -> nn.Module:
    """What stands for an operator."""
    if isinstance(program, LoopProgram):
        return _TileLoop(program)
    return _Together(program) if program.together else _Loop(program, reveal)


class _TileLoop(LoopPlaces):
    """A loop over tiles."""

    def __init__(self, loop: LoopProgram) -> None:
        super().__init__(loop)
        self.step = _as_script(loop.step, listed=True)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        known = [tensor for tensor in inputs]  # noqa: C416 - TorchScript has no list()
        steps: list[list[Tensor]] = []
        for n in range(inputs[self.tiles[0]].size(0)):
            for i in self.tiles:
                known[i] = inputs[i][n]
            results: list[Tensor] = self.step(known)
            steps.append(results)
            for place, i in enumerate(self.carry):
                known[i] = results[place]
        carry = [known[i] for i in self.carry]
        return carry + [torch.stack([step[i] for step in steps]) for i in self.streamed]


class _Loop(Places):
    """A recurrence: one token, or a loop over tiles."""

    def __init__(self, recurrence: RecurrenceProgram, reveal: bool = False) -> None:
        super().__init__(recurrence, reveal)
        self.one = _as_script(recurrence.one, listed=True)
        self.tiles = _as_script(recurrence.tiles, listed=True)
        self.step = _as_script(recurrence.step, listed=True)
        self.rows = _as_script(recurrence.rows, listed=True)

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
        return rows[:1] + carry + rows[1:] if self.reveal else rows[:1] + carry

    def is_apart(self, inputs: list[Tensor]) -> bool:
        """Whether a row's token stands at a place that only a tile takes."""
        for place in self.apart:  # noqa: SIM110 - TorchScript has no generators
            if bool((inputs[self.position] % self.tile == place).any()):
                return True
        return False


class _Together(Places):
    """A recurrence that takes all tiles at once: one token, or all of them."""

    def __init__(self, recurrence: RecurrenceProgram) -> None:
        super().__init__(recurrence)
        self.one = _as_script(recurrence.one, listed=True)
        self.tiles = _as_script(recurrence.tiles, listed=True)
        self.step = _as_script(recurrence.step, recurrence.loops, listed=True)
        self.rows = _as_script(recurrence.rows, listed=True)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        if inputs[self.counted].size(2) == 1 and not self.is_apart(inputs):
            single: list[Tensor] = self.one(inputs)
            return single
        tiles: list[Tensor] = self.tiles([inputs[i] for i in self.tile_inputs])
        count = int(
            tiles[self.live].flatten(1).any(1).sum()
        )  # the last tile is there for rows that begin late
        known = [tile[:count] for tile in tiles] + [inputs[i] for i in self.carry] + inputs
        results: list[Tensor] = self.step([known[i] for i in self.step_inputs])
        known = [results[i] for i in self.streamed] + inputs
        rows: list[Tensor] = self.rows([known[i] for i in self.row_inputs])
        return rows + [results[i] for i in self.carried]

    def is_apart(self, inputs: list[Tensor]) -> bool:
        """See :class:`_Loop`."""
        for place in self.apart:  # noqa: SIM110 - TorchScript has no generators
            if bool((inputs[self.position] % self.tile == place).any()):
                return True
        return False


def _without_sources(content: bytes, name: str) -> bytes:
    """The archive without its notes on source files: they name files of the exporting machine."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for record in old.namelist():
            if not record.endswith(".debug_pkl"):
                _, _, path = record.partition("/")
                new.writestr(zipfile.ZipInfo(f"{name}/{path}", _EPOCH), old.read(record))
    return result.getvalue()

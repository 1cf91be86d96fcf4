"""Recurrences as loops that ``torch.export`` keeps and Inductor compiles, whatever the number of tiles.

A loop is PyTorch's ``while_loop`` over traced parts, as in the ONNX graph: its counter is a tensor, a tile is
taken by it and a result put in its place. PyTorch's ``scan`` would say the same, but Inductor does not take
one whose length is a formula.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.while_loop import while_loop_op

from titans_converters.exported import attributes_of, export, operator_of, without_checks
from titans_converters.onnx.sinkhorn import doubly_stochastic
from titans_converters.program import LoopProgram, Program, RecurrenceProgram
from titans_converters.recurrence import LoopPlaces, Places

Body = Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""A tile's tensors, what is carried, what all tiles share → what is carried on, what the tile puts out."""


_Operator = TypeVar("_Operator", RecurrenceProgram, LoopProgram)


def without_operators(
    traced: fx.GraphModule,
    programs: Sequence[_Operator],
    module: Callable[[_Operator], nn.Module],
) -> fx.GraphModule:
    """The traced graph, with modules in place of operators of ours. Changes ``traced``.

    Args:
        traced: the graph.
        programs: what its operators stand for.
        module: makes an operator's module, :func:`forwards` or another.

    Raises:
        ValueError: a node of ours has no program.
    """
    known = {program.name: program for program in programs}
    for node in without_checks(traced).graph.nodes:
        name = operator_of(node)
        if name is None:
            continue
        if name == "Sinkhorn":
            name = f"Sinkhorn_{node.name}"
            traced.add_module(name, _Sinkhorn(attributes_of(node)["iterations"]))
        elif name not in known:
            raise ValueError(f"no program for the operator {name}")
        elif not hasattr(traced, name):
            traced.add_module(name, module(known[name]))
        with traced.graph.inserting_before(node):
            call = traced.graph.call_module(name, (list(node.args[0]),))
        node.replace_all_uses_with(call)
        traced.graph.erase_node(node)
    traced.graph.set_codegen(
        fx.graph.CodeGen()
    )  # outputs may have been added: a tuple of tensors, as it stands
    traced.recompile()
    return traced


class _Sinkhorn(nn.Module):
    """See :mod:`titans_converters.onnx.sinkhorn`."""

    def __init__(self, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [doubly_stochastic(inputs[0], self.iterations)]


class Steps(nn.Module):
    """A step for every tile: what a recurrence's loop and a loop within one have in common."""

    carry: list[int]
    carried: list[int]
    streamed: list[int]
    step_inputs: list[int]

    def prepare(self, step: Program, tiles: Sequence[str], carry: Sequence[str]) -> None:
        """Trace the step; ``tiles`` and ``carry``: names of what it is given anew for every tile."""
        self.step, constants = _without_constants(_part(step))
        for index, constant in enumerate(constants):
            self.register_buffer(f"constant_{index}", constant)
        lead = len(tiles) + len(carry)
        self.shared = sorted({i - lead for i in self.step_inputs if i >= lead})
        self.order = [i if i < lead else lead + self.shared.index(i - lead) for i in self.step_inputs]
        self.order += range(lead + len(self.shared), lead + len(self.shared) + len(constants))
        self.results = [
            ([axis for axis in axes if isinstance(axis, int)], step.dtype(name))
            for name, axes in step.output_axes.items()
        ]

    def over(
        self, count: Tensor, tiles: list[Tensor], inputs: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """All tiles, with whatever else the step takes from ``inputs``."""
        carry = [inputs[i] for i in self.carry]
        shared = [*(inputs[i] for i in self.shared), *self.buffers(recurse=False)]
        return self.advance(count, tiles, carry, shared)

    def advance(
        self, count: Tensor, tiles: list[Tensor], carry: list[Tensor], shared: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The state after ``count`` tiles, and what every tile puts out, tiles first."""
        return over_tiles(count, tiles, carry, shared, self.rooms(tiles, carry), self.one_tile)

    def one_tile(
        self, tile: list[Tensor], carry: list[Tensor], shared: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The state after a tile, and what it puts out."""
        known = [*tile, *carry, *shared]
        results = self.step(*(known[i] for i in self.order))
        return [results[i] for i in self.carried], [results[i] for i in self.streamed]

    def rooms(self, tiles: list[Tensor], carry: list[Tensor]) -> list[Tensor]:
        """Zeros for what every tile puts out."""
        number, batch = tiles[0].size(0), carry[0].size(0)
        kinds = (self.results[i] for i in self.streamed)
        return [torch.zeros([number, batch, *sizes], dtype=dtype) for sizes, dtype in kinds]


class Loop(Places, Steps):
    """A recurrence for any number of tokens: a loop over tiles."""

    def __init__(self, recurrence: RecurrenceProgram, reveal: bool = False) -> None:
        """``reveal``: see :class:`titans_converters.recurrence.Places`."""
        super().__init__(recurrence, reveal)
        self.tiles, self.rows = _part(recurrence.tiles), _part(recurrence.rows)
        self.prepare(recurrence.step, list(recurrence.tiles.output_axes), recurrence.carry)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Inputs of the recurrence, in order → the read, the state, and what is revealed."""
        tiles = list(self.tiles(*(inputs[i] for i in self.tile_inputs)))
        # The last tile is there for rows that begin late.
        count = tiles[self.live].flatten(1).any(1).sum()
        carry, streamed = self.over(count, tiles, inputs)
        known = [*streamed, *inputs]
        rows = self.rows(*(known[i] for i in self.row_inputs))
        return [rows[0], *carry, *(rows[1:] if self.reveal else ())]


class TileLoop(LoopPlaces, Steps):
    """A loop over tiles, within a recurrence that takes all of them at once."""

    def __init__(self, loop: LoopProgram) -> None:
        """Trace its step."""
        super().__init__(loop)
        self.prepare(loop.step, loop.tiles, loop.carry)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Inputs of the loop, in order → the state and what tiles put out."""
        tiles = [inputs[i] for i in self.tiles]
        count = torch.ones([tiles[0].size(0)], dtype=torch.int64).sum()
        carry, streamed = self.over(count, tiles, inputs)
        return [*carry, *streamed]


class Together(Places):
    """A recurrence for any number of tokens: all tiles at once, an empty one at the end included."""

    def __init__(
        self, recurrence: RecurrenceProgram, loop: Callable[[LoopProgram], nn.Module] = TileLoop
    ) -> None:
        """``loop``: makes the module of a loop within."""
        super().__init__(recurrence)
        self.tiles, self.rows = _part(recurrence.tiles), _part(recurrence.rows)
        self.step = without_operators(export(recurrence.step).module(), recurrence.loops, loop)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """See :meth:`Loop.forward`."""
        tiles = list(self.tiles(*(inputs[i] for i in self.tile_inputs)))
        known = [*tiles, *(inputs[i] for i in self.carry), *inputs]
        results = self.step(*(known[i] for i in self.step_inputs))
        known = [*(results[i] for i in self.streamed), *inputs]
        (read,) = self.rows(*(known[i] for i in self.row_inputs))
        return [read, *(results[i] for i in self.carried)]


class OneToken(Places):
    """A recurrence for one token."""

    def __init__(self, recurrence: RecurrenceProgram) -> None:
        """Trace it."""
        super().__init__(recurrence)
        self.one = _part(recurrence.one)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """See :meth:`Loop.forward`."""
        results = self.one(*inputs)
        return [results[i] for i in self.put_out]


def forwards(recurrence: RecurrenceProgram) -> nn.Module:
    """A recurrence's module for any number of tokens."""
    return Together(recurrence) if recurrence.together else Loop(recurrence)


def _without_constants(part: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """The part with its constants as inputs after its own, and the constants: a loop's body has none."""
    constants: list[Tensor] = []
    graph = part.graph
    last = graph.find_nodes(op="placeholder")[-1]
    for node in graph.find_nodes(op="get_attr"):
        constants.append(operator.attrgetter(str(node.target))(part).detach())
        with graph.inserting_after(last):
            last = graph.placeholder(f"constant_{len(constants) - 1}")
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    for target in (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.detach_.default):  # of a constant
        for node in graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return fx.GraphModule(part, graph), constants  # the traced module itself checks what it is given


def over_tiles(
    count: Tensor,
    tiles: list[Tensor],
    carry: list[Tensor],
    shared: list[Tensor],
    rooms: list[Tensor],
    body: Body,
    backwards: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run ``body`` for every tile.

    Args:
        count: scalar int64, how many tiles.
        tiles: tensors with one element a tile, tiles first.
        carry: what goes from tile to tile.
        shared: what is the same for all.
        rooms: zeros, where what a tile puts out goes, tiles first.
        body: what happens.
        backwards: from the last tile to the first.

    Returns:
        What is carried at the end, and the filled rooms.
    """
    carried, kept, kinds = len(carry), len(carry) + len(rooms), len(tiles)

    def goes_on(done: Tensor, *others: Tensor) -> Tensor:
        return done < others[kept]

    def advance(done: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        count, *given = others[kept:]
        index = (count - 1 - done if backwards else done).reshape(1)
        tile = [x.index_select(0, index).squeeze(0) for x in given[:kinds]]
        new, results = body(tile, list(others[:carried]), given[kinds:])
        filled = (
            room.index_copy(0, index, result[None])
            for room, result in zip(others[carried:kept], results, strict=True)
        )
        return (done + 1, *(_copy(x) for x in new), *filled)

    start = (torch.zeros((), dtype=torch.int64), *(_copy(x) for x in carry), *rooms)
    # The operator itself and not its public face, which calls the compiler for Python to find what is shared.
    loop: Callable[..., Sequence[Tensor]] = while_loop_op
    _, *end = loop(goes_on, advance, start, (count, *_apart(tiles), *shared))
    return end[:carried], end[carried:]


def _apart(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tensors, copied where they share memory with an earlier one: the compiler refuses such a loop."""
    seen: set[int] = set()
    for x in tensors:
        memory: int = x.untyped_storage()._cdata  # noqa: SLF001 - what tells one storage from another
        yield _copy(x) if memory in seen else x
        seen.add(memory)


def _copy(x: Tensor) -> Tensor:
    """A loop carries what is laid out alike at every turn, and nothing that shares its memory."""
    return x.clone(memory_format=torch.contiguous_format)


def _part(program: Program) -> fx.GraphModule:
    """A part of a recurrence as it was traced."""
    return without_operators(export(program).module(), (), forwards)

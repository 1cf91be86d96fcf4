"""Recurrences as loops that ``torch.export`` keeps and Inductor compiles, whatever the number of tiles.

A loop is PyTorch's ``while_loop`` over traced parts, as in the ONNX graph: its counter is a tensor, a tile is
taken by it and a result put in its place. PyTorch's ``scan`` would say the same, but Inductor does not take
one whose length is a formula.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.while_loop import while_loop_op

from titans_converters.exported import attributes_of, export, operator_of, without_checks, written_out
from titans_converters.onnx.sinkhorn import doubly_stochastic
from titans_converters.program import Program, RecurrenceProgram
from titans_converters.recurrence import Places

Body = Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""A tile's tensors, what is carried, what all tiles share → what is carried on, what the tile puts out."""


def without_operators(
    traced: fx.GraphModule,
    recurrences: Sequence[RecurrenceProgram],
    loop: Callable[[RecurrenceProgram], nn.Module],
) -> fx.GraphModule:
    """The traced graph, with modules in place of operators of ours. Changes ``traced``.

    ``loop``: makes a recurrence's module, :class:`Loop` or another.

    Raises:
        ValueError: a node of ours has no recurrence.
    """
    known = {recurrence.name: recurrence for recurrence in recurrences}
    for node in without_checks(traced).graph.nodes:
        name = operator_of(node)
        if name is None:
            continue
        if name == "Sinkhorn":
            name = f"Sinkhorn_{node.name}"
            traced.add_module(name, _Sinkhorn(attributes_of(node)["iterations"]))
        elif name not in known:
            raise ValueError(f"no recurrence for the operator {name}")
        elif not hasattr(traced, name):
            traced.add_module(name, loop(known[name]))
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


class Loop(Places):
    """A recurrence for any number of tokens: a loop over tiles."""

    def __init__(self, recurrence: RecurrenceProgram, reveal: bool = False) -> None:
        """``reveal``: see :class:`titans_converters.recurrence.Places`."""
        super().__init__(recurrence, reveal)
        self.tiles = _part(recurrence.tiles)
        self.step, constants = _without_constants(_part(recurrence.step))
        for index, constant in enumerate(constants):
            self.register_buffer(f"constant_{index}", constant)
        self.rows = _part(recurrence.rows)
        lead = len(recurrence.tiles.output_axes) + len(self.carry)
        self.shared = sorted({i - lead for i in self.step_inputs if i >= lead})
        self.order = [i if i < lead else lead + self.shared.index(i - lead) for i in self.step_inputs]
        self.order += range(lead + len(self.shared), lead + len(self.shared) + len(constants))
        self.results = [
            ([axis for axis in axes if isinstance(axis, int)], recurrence.step.dtype(name))
            for name, axes in recurrence.step.output_axes.items()
        ]

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Inputs of the recurrence, in order → the read, the state, and what is revealed."""
        tiles = list(self.tiles(*(inputs[i] for i in self.tile_inputs)))
        # The last tile is there for rows that begin late.
        count = tiles[self.live].flatten(1).any(1).sum()
        carry = [inputs[i] for i in self.carry]
        shared = [*(inputs[i] for i in self.shared), *self.buffers(recurse=False)]
        carry, streamed = self.advance(count, tiles, carry, shared)
        known = [*streamed, *inputs]
        rows = self.rows(*(known[i] for i in self.row_inputs))
        return [rows[0], *carry, *(rows[1:] if self.reveal else ())]

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


class GradientLoop(Loop):
    """The same, through which autograd goes; reveals what memories are taught."""

    def __init__(self, recurrence: RecurrenceProgram) -> None:
        """Trace the derivative of a tile, too."""
        super().__init__(recurrence, reveal=True)
        moving = {*recurrence.tiles.output_axes, *recurrence.carry}
        names = [
            name for name, x in recurrence.step.inputs.items() if name in moving and x.is_floating_point()
        ]
        constants = list(self.buffers(recurse=False))
        self.derivative = _derivative(recurrence.step, self.step, names, constants)
        tiles = list(recurrence.tiles.output_axes)
        self.to_tiles = [(names.index(name), tiles.index(name)) for name in names if name in tiles]
        self.to_carry = [
            (names.index(name), place) for place, name in enumerate(recurrence.carry) if name in names
        ]

    def advance(
        self, count: Tensor, tiles: list[Tensor], carry: list[Tensor], shared: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See :meth:`Loop.advance`."""
        apply: Callable[..., Sequence[Tensor]] = _Differentiable.apply
        results = apply(self, count, len(tiles), len(carry), *tiles, *carry, *shared)
        return list(results[: len(carry)]), list(results[len(carry) :])

    def advance_noting(
        self, count: Tensor, tiles: list[Tensor], carry: list[Tensor], shared: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """With the state before every tile, tiles first, at the end."""

        def body(
            tile: list[Tensor], carry: list[Tensor], shared: list[Tensor]
        ) -> tuple[list[Tensor], list[Tensor]]:
            carried, streamed = self.one_tile(tile, carry, shared)
            return carried, [*streamed, *carry]

        rooms = self.rooms(tiles, carry)
        befores = [x.new_zeros([tiles[0].size(0), *x.shape]) for x in carry]
        last, filled = over_tiles(count, tiles, carry, shared, [*rooms, *befores], body)
        return last, filled[: len(rooms)], filled[len(rooms) :]

    def back(
        self,
        count: Tensor,
        tiles: list[Tensor],
        befores: list[Tensor],
        shared: list[Tensor],
        gradients: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients with respect to what has one of the tiles, and of the state before the first.

        ``gradients``: with respect to what :meth:`advance` gives, the state first.
        """
        carried, kinds = len(befores), len(tiles)
        streamed, moving = gradients[carried:], [place for _, place in self.to_carry]

        def body(
            tile: list[Tensor], carry: list[Tensor], shared: list[Tensor]
        ) -> tuple[list[Tensor], list[Tensor]]:
            known = [*tile[: kinds + carried], *shared]
            of_results = dict(zip((self.carried[place] for place in moving), carry, strict=True))
            of_results |= dict(zip(self.streamed, tile[kinds + carried :], strict=True))
            found = self.derivative(
                *(known[i] for i in self.order), *(of_results[i] for i in sorted(of_results))
            )
            return [found[i] for i, _ in self.to_carry], [found[i] for i, _ in self.to_tiles]

        rooms = [tiles[place].new_zeros(tiles[place].shape) for _, place in self.to_tiles]
        every = [*tiles, *befores, *streamed]
        last = [gradients[place] for place in moving]
        first, filled = over_tiles(count, every, last, shared, rooms, body, backwards=True)
        return filled, first


class _Differentiable(torch.autograd.Function):
    """A loop over tiles whose backward pass is a loop over tiles, from the last to the first."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        loop: GradientLoop,
        count: Tensor,
        kinds: int,
        carried: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """``tensors``: ``kinds`` tensors of tiles, ``carried`` ones of state, what tiles share."""
        tiles, carry = list(tensors[:kinds]), list(tensors[kinds : kinds + carried])
        shared = list(tensors[kinds + carried :])
        last, streamed, befores = loop.advance_noting(count, tiles, carry, shared)
        ctx.loop, ctx.sizes = loop, (kinds, carried)
        ctx.save_for_backward(count, *tiles, *befores, *shared)
        return (*last, *streamed)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's
        *gradients: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Nothing for what tiles share: weights of the model, which are not learnt here."""
        kinds, carried = ctx.sizes
        count, *saved = ctx.saved_tensors
        tiles, befores = saved[:kinds], saved[kinds : kinds + carried]
        shared = saved[kinds + carried :]
        of_tiles, of_carry = ctx.loop.back(count, tiles, befores, shared, list(gradients))
        found: list[Tensor | None] = [None] * (kinds + carried + len(shared))
        for (_, place), gradient in zip(ctx.loop.to_tiles, of_tiles, strict=True):
            found[place] = gradient
        for (_, place), gradient in zip(ctx.loop.to_carry, of_carry, strict=True):
            found[kinds + place] = gradient
        return (None, None, None, None, *found)


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


def _derivative(
    step: Program, module: nn.Module, names: Sequence[str], constants: Sequence[Tensor]
) -> fx.GraphModule:
    """Inputs of a step, constants, gradients with respect to results → those with respect to ``names``."""
    of_results = {
        f"grad.{name}": axes for name, axes in step.output_axes.items() if step.dtype(name).is_floating_point
    }
    batch = step.inputs[names[0]].size(0)
    gradients = [
        torch.zeros([batch if isinstance(axis, str) else axis for axis in axes])
        for axes in of_results.values()
    ]
    places = [list(step.inputs).index(name) for name in names]
    derivative, _ = written_out(
        _Derivative(module, places, len(step.inputs) + len(constants)),
        [*step.inputs.values(), *constants, *gradients],
        [*step.input_axes.values(), *(tuple(x.shape) for x in constants), *of_results.values()],
    )
    return derivative


class _Derivative(nn.Module):
    """Gradients by autograd."""

    def __init__(self, step: nn.Module, places: Sequence[int], count: int) -> None:
        super().__init__()
        self.step, self.places, self.count = step, places, count

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(tensors[: self.count])
        with torch.enable_grad():
            for place in self.places:
                given[place] = given[place].detach().requires_grad_()
            results = [result for result in self.step(*given) if result.is_floating_point()]
            pairs = [
                (result, gradient)
                for result, gradient in zip(results, tensors[self.count :], strict=True)
                if result.requires_grad
            ]
            leaves = [given[place] for place in self.places]
            moved, gradients = zip(*pairs, strict=True)
            found: Sequence[Tensor | None] = torch.autograd.grad(moved, leaves, gradients, allow_unused=True)
        return tuple(
            torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, leaves, strict=True)
        )


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
    _, *end = loop(goes_on, advance, start, (count, *tiles, *shared))
    return end[:carried], end[carried:]


def _copy(x: Tensor) -> Tensor:
    """A loop carries what is laid out alike at every turn, and nothing that shares its memory."""
    return x.clone(memory_format=torch.contiguous_format)


def _part(program: Program) -> fx.GraphModule:
    """A part of a recurrence as it was traced."""
    return without_operators(export(program).module(), (), nn.Module)

"""Loops over tiles through which autograd goes: the way back is a loop from the last tile to the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from titans_converters.exported import written_out
from titans_converters.loops import Loop, Steps, TileLoop, Together, over_tiles
from titans_converters.program import Program, RecurrenceProgram


class _GradientSteps(Steps):
    """Steps through which autograd goes."""

    def prepare(self, step: Program, tiles: Sequence[str], carry: Sequence[str]) -> None:
        """Trace the derivative of a step, too."""
        super().prepare(step, tiles, carry)
        moving = {*tiles, *carry}
        names = [name for name, x in step.inputs.items() if name in moving and x.is_floating_point()]
        constants = list(self.buffers(recurse=False))
        self.derivative = _derivative(step, self.step, names, constants)
        self.to_tiles = [(names.index(name), list(tiles).index(name)) for name in names if name in tiles]
        self.to_carry = [(names.index(name), place) for place, name in enumerate(carry) if name in names]

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


class GradientLoop(_GradientSteps, Loop):
    """A recurrence through which autograd goes; reveals what memories are taught."""

    def __init__(self, recurrence: RecurrenceProgram) -> None:
        """Trace the derivative of a tile, too."""
        super().__init__(recurrence, reveal=True)


class GradientTileLoop(_GradientSteps, TileLoop):
    """A loop within a recurrence, through which autograd goes."""


def both_ways(recurrence: RecurrenceProgram) -> nn.Module:
    """The same, through which autograd goes."""
    return Together(recurrence, GradientTileLoop) if recurrence.together else GradientLoop(recurrence)


class _Differentiable(torch.autograd.Function):
    """A loop over tiles whose backward pass is a loop over tiles, from the last to the first."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        loop: _GradientSteps,
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


def _derivative(
    step: Program, module: nn.Module, names: Sequence[str], constants: Sequence[Tensor]
) -> fx.GraphModule:
    """Inputs of a step, constants, gradients with respect to results → those with respect to ``names``."""
    of_results = {name: axes for name, axes in step.output_axes.items() if step.dtype(name).is_floating_point}
    batch = step.inputs[names[0]].size(0)
    gradients = [
        torch.zeros([batch if isinstance(axis, str) else axis for axis in axes], dtype=step.dtype(name))
        for name, axes in of_results.items()
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

"""What goes on from tile to tile where a recurrence takes all of its tiles at once.

Most of what a model does to a tile does not ask for the state: that is done for all tiles together, in large
products. What does ask for it is a loop, as small as it can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class LoopCore(Protocol):
    """One kind of loop, with nothing in it but sizes.

    Attributes:
        name: of the operator that stands for it in an exported graph.
        results: sizes of what a tile puts out, without axes of tiles and batch.
    """

    @property
    def name(self) -> str:
        """Of the operator."""
        ...

    @property
    def results(self) -> list[tuple[int, ...]]:
        """Sizes of what a tile puts out."""
        ...

    def step(self, tile: Tensors, carry: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
        """One tile.

        Args:
            tile: ``(B, …)`` each.
            carry: the state, ``(B, …)`` each.
            shared: what does not change from tile to tile: edit strength first, then weights.

        Returns:
            The state after the tile, and what the tile puts out.
        """
        ...


Loop = Callable[[LoopCore, Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
"""Anything with the contract of :func:`run_loop`."""


def run_loop(core: LoopCore, tiles: Tensors, carry: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
    """Every tile in turn.

    Args:
        core: what happens.
        tiles: ``(N, B, …)`` each.
        carry: the state before the first.
        shared: see :meth:`LoopCore.step`.

    Returns:
        The state after the last tile, and what the tiles put out, ``(N, B, …)`` each.
    """
    outputs: list[Tensors] = []
    for tile in zip(
        *(x.unbind(0) for x in tiles), strict=True
    ):  # a slice's gradient is as large as its source
        carry, results = core.step(tile, carry, shared)
        outputs.append(results)
    return carry, tuple(torch.stack(found) for found in zip(*outputs, strict=True))


def carried_on(new: Tensor, there: Tensor, start: Tensor, parts: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """What a tile leaves behind where it has a token, and otherwise what was left behind before.

    All tiles but the first and the last two are whole. What a tile without a token would be given is some
    tile's, no matter which: nobody looks at it.

    Args:
        new: ``(N, B, …)``.
        there: bool, as many axes.
        start: ``(B, …)``, before the first tile.
        parts: of which a tile consists; where there are several, ``N`` counts these, and a stream begins and
            ends in any of them.

    Returns:
        Before each tile, after each tile, and after the last, which holds for empty ones, too.
    """
    first = torch.where(there[:parts], new[:parts], start[None])
    after = torch.cat([first, new[parts:]])
    before = torch.cat([start[None], after[:-1]])
    count = 2 * parts + 1
    ends = (torch.arange(count, device=new.device) + (new.shape[0] - count)).clamp(min=0)
    last, *others = after[ends].unbind(0)
    for is_there, other in zip(there[ends].unbind(0)[1:], others, strict=True):
        last = torch.where(is_there, other, last)
    return before, after, last

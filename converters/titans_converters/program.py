"""A program: a module with named inputs, outputs and free axes. Every converter takes one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Axes = tuple[int | str, ...]
"""Sizes of a tensor's axes; a string names a free axis."""


@dataclass(frozen=True)
class Program:
    """A module whose ``forward`` takes tensors in the order of ``inputs`` and returns a tuple of tensors.

    Attributes:
        name: graph name in the bundle, ``model`` or ``gradient.<objective>``.
        module: in evaluation mode, without hidden state.
        inputs: example tensors by name. The sizes of free axes must differ from each other and from
            every fixed size, or tracing may take one for the other.
        input_axes: axes by input name.
        output_axes: axes by output name, in the order of ``forward``'s results.
        output_dtypes: of outputs that are not float32.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    input_axes: dict[str, Axes]
    output_axes: dict[str, Axes]
    output_dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that examples and axes belong together."""
        if list(self.inputs) != list(self.input_axes):
            raise ValueError(f"program {self.name}: inputs and input_axes name different tensors")
        for name, tensor in self.inputs.items():
            if tensor.dim() != len(self.input_axes[name]):
                raise ValueError(f"program {self.name}: {name} has {tensor.dim()} axes in its example")

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of an input, or of an output."""
        if name in self.inputs:
            return self.inputs[name].dtype
        return self.output_dtypes.get(name, torch.float32)


@dataclass(frozen=True)
class LoopProgram:
    """A loop over tiles, within a recurrence that takes all of its tiles at once.

    Attributes:
        name: of the operator.
        tiles: names of the inputs with an axis of tiles, first; a step is given one element of each.
        carry: names of the inputs that are state, in the order in which they come out.
        step: one tile: its tensors, state and all other inputs → state, and what the tile puts out.
    """

    name: str
    tiles: tuple[str, ...]
    carry: tuple[str, ...]
    step: Program


@dataclass(frozen=True)
class RecurrenceProgram:
    """A recurrence that advances tile by tile, as the parts between which a graph's loop stands.

    Attributes:
        name: of the operator.
        tile: tokens of a tile.
        tokens: names of the inputs that have an axis of tokens; the first one's third axis counts them.
        carry: names of the inputs that are state, in the order in which they come out.
        output: name of the output that has an axis of tokens.
        apart: places in a tile whose token ``one`` does not take; a tile takes it.
        one: one token: all inputs → output and state.
        tiles: all inputs → the inputs with an axis of tokens, and ``live``, cut into tiles, tiles first.
        step: one tile: its tokens, state and all other inputs → output and state.
        rows: ``tiles.<output>``, the outputs of every tile, and all inputs → output.
        together: whether ``step`` takes all tiles at once, tiles first, and calls ``loops`` for what goes on
            from one to the next; otherwise a loop over ``step`` is what happens.
        loops: what ``step`` calls.
        revealed: name of an output, of ``one``, ``step`` and ``rows``, that gradient graphs alone ask for:
            key, value and gates, which the recurrence derives within itself.
    """

    name: str
    tile: int
    tokens: tuple[str, ...]
    carry: tuple[str, ...]
    output: str
    apart: tuple[int, ...]
    one: Program
    tiles: Program
    step: Program
    rows: Program
    revealed: str | None = None
    together: bool = False
    loops: tuple[LoopProgram, ...] = ()

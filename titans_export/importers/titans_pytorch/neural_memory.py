"""A ``NeuralMemory`` by itself, as a model: vectors in, answers out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_export.importers.titans_pytorch.memory import LibraryMemory
from titans_export.importers.titans_pytorch.options import MemoryOptions
from titans_export.importers.titans_pytorch.stream import (
    Chunks,
    Inputs,
    LessonLoop,
    MemoryLoop,
    Tensors,
    advance_together,
    can_advance_together,
    entries,
    learned,
    one_token,
    pack,
    unpack,
)
from titans_export.loops import Loop
from titans_export.memory_layer import StateEntry


class NeuralMemoryModel(nn.Module):
    """The memory, and what it carries along a stream: the tokens seen and the state of its chunk."""

    operator = "ChunkedMemory"

    def __init__(self, options: MemoryOptions) -> None:
        """Weights are zero until they are loaded."""
        super().__init__()
        self.options = options
        self.memory = LibraryMemory(options)

    @property
    def width(self) -> int:
        """Of the vectors that it takes: three views side by side, where there are three."""
        return self.options.dim * (3 if self.options.qkv_receives_diff_views else 1)

    def state(self) -> dict[str, StateEntry]:
        """Every entry of the state by name."""
        views = 2 if self.options.qkv_receives_diff_views else 1
        return {"position": StateEntry((), torch.int64, role="position"), **entries(self.options, views)}

    def learned_state(self) -> dict[str, Tensor]:
        """Entries of the initial state that are not zero, without their batch axis."""
        return learned(self.memory)

    @property
    def edit_layers(self) -> int:
        """One memory."""
        return 1

    @property
    def tile(self) -> int:
        """Tokens that are taken at once: a chunk."""
        return self.options.chunk_size

    @property
    def apart(self) -> tuple[int, ...]:
        """Places in a tile whose tokens are more than a read: the last completes the chunk."""
        return (self.tile - 1,)

    def before(self, inputs: Tensor) -> Tensor:
        """What stands before the recurrence: nothing."""
        return inputs

    def after(self, answers: Tensor) -> Tensor:
        """What stands after the recurrence: nothing."""
        return answers

    def one(self, x: Tensor, edit: Tensor, carry: Tensors) -> tuple[Tensor, Tensors]:
        """One token that completes no chunk: ``(B, 1, width)`` and the state before it."""
        del edit  # nothing is written yet
        position, *rest = carry
        query, stored = self._views(x)
        place = position % self.options.chunk_size
        y, state = one_token(self.memory, query, stored, place, unpack(self.options, tuple(rest)))
        return y, (position + 1, *pack(state))

    def together(
        self, x: Tensor, live: Tensor, edit: Tensor, carry: Tensors, loop: Loop
    ) -> tuple[Tensor, Tensors]:
        """All tiles: ``(N, B, C, width)`` of which ``live (N, B, C)`` are there."""
        position, *rest = carry
        size, name = self.options.chunk_size, f"{self.operator}Loop"
        after = position + live.sum((0, 2))
        if can_advance_together(self.options):
            past, inputs = unpack(self.options, tuple(rest)), Inputs(*self._views(x), live)
            core = LessonLoop(self.memory, name)
            y, present, _ = advance_together(core, inputs, past, edit[:, 0], (), loop)
            return y, (after, *pack(present))
        first = (position // size + torch.arange(live.shape[0], device=x.device)[:, None]) * size
        tile_loop = MemoryLoop(self.memory, name, Chunks(size, 0, size))
        tiles = (*self._views(x), live, first)
        state, (y,) = loop(tile_loop, tiles, tuple(rest), (edit[:, 0], *tile_loop.weights()))
        return y, (after, *state)

    @property
    def memories(self) -> dict[str, LibraryMemory]:
        """The memory, by what the names of its state begin with."""
        return {"": self.memory}

    def stored(self, x: Tensor) -> Tensor:
        """What the memory stores of its inputs ``(B, T, width)``."""
        return self._views(x)[1]

    def _views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The query's view, and what is stored."""
        if not self.options.qkv_receives_diff_views:
            return x, x
        return x[..., : self.options.dim], x[..., self.options.dim :]

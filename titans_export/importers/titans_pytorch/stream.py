"""A memory along a stream: chunks that begin and end anywhere in what is seen at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from titans_export.importers.titans_pytorch.memory import LibraryMemory, Memories, tensor_count
from titans_export.importers.titans_pytorch.networks import Weights
from titans_export.importers.titans_pytorch.options import MemoryOptions
from titans_export.loops import Loop, carried_on
from titans_export.memory_layer import StateEntry

LEAST_TOGETHER = 16
"""Tokens of the smallest chunk for which all gradients are taken at once: each is as large as the memory."""

Tensors = tuple[Tensor, ...]


class MemoryState(NamedTuple):
    """What one memory carries along a stream.

    Attributes:
        store: ``(B, C, width)``, inputs of the chunk that is not complete yet, by their place.
        memories: see :class:`Memories`.
    """

    store: Tensor
    memories: Memories


class Inputs(NamedTuple):
    """What a memory is given at ``E`` places.

    Attributes:
        query: ``(B, E, dim)``.
        stored: ``(B, E, width)``: the view of keys and values, or the two side by side.
        live: ``(B, E)`` bool, whether there is a token.
    """

    query: Tensor
    stored: Tensor
    live: Tensor


@dataclass(frozen=True)
class Chunks:
    """Where chunks end among ``E`` places.

    Attributes:
        size: ``C``.
        offset: place within its chunk of the first one.
        count: ``E``.
    """

    size: int
    offset: int
    count: int

    @property
    def ends(self) -> list[int]:
        """Places whose token completes a chunk."""
        return [place for place in range(self.count) if (self.offset + place + 1) % self.size == 0]


def advance(
    memory: LibraryMemory,
    chunks: Chunks,
    inputs: Inputs,
    first: Tensor,
    state: MemoryState,
    edit: Tensor,
    previous: list[Weights],
) -> tuple[Tensor, MemoryState, list[Weights]]:
    """Several places at once.

    Args:
        memory: weights and rule.
        chunks: where chunks end.
        inputs: at every place.
        first: ``(B,)`` int64, position of the first place in the memory's stream.
        state: before the first place.
        edit: ``(B,)``, ``λ``.
        previous: of the memory layer before, its memory as each chunk began; empty without one.

    Returns:
        The answers ``(B, E, dim)``, the state after the last place, and the memory as each chunk began,
        that of the last, incomplete one included.
    """
    history, start = [state.memories.memory], 0
    for index, end in enumerate(chunks.ends):
        store = _put(state.store, inputs, chunks, start, end + 1)
        live, boundary = inputs.live[:, end], _at_boundary(memory.options, first + end + 1)
        before = previous[index] if previous else ()
        memories = memory.update(store, state.memories, edit, live, boundary, before)
        state = MemoryState(store, memories)
        history.append(memories.memory)
        start = end + 1
    if start < chunks.count:
        state = state._replace(store=_put(state.store, inputs, chunks, start, chunks.count))
    counts = [stop - begin for begin, stop in itertools.pairwise([0, *chunks.ends, chunks.count])]
    reads = [(weights, count) for weights, count in zip(history, counts, strict=True) if count]
    answers = memory.read_in_turn([w for w, _ in reads], [c for _, c in reads], inputs.query)
    return answers, state, history


@dataclass(frozen=True)
class MemoryLoop:
    """:func:`advance` for tile after tile.

    A tile's tensors are those of :class:`Inputs`, the position of the first place, and the memory of the
    layer before as each chunk began, where it is wanted. It puts out the answers and, where that is wanted,
    its memory as each chunk began.
    """

    memory: LibraryMemory
    name: str
    chunks: Chunks
    keeps: bool = False

    @property
    def results(self) -> list[tuple[int, ...]]:
        """See :class:`titans_export.loops.LoopCore`."""
        options = self.memory.options
        shapes = [(options.heads, *shape) for shape in options.network.shapes()]
        return [(self.chunks.count, options.dim)] + shapes * len(self.chunks.ends) * self.keeps

    def weights(self) -> Tensors:
        """What is shared, edit strength aside."""
        return tuple(self.memory.parameters())

    def step(self, tile: Tensors, carry: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
        """See :class:`titans_export.loops.LoopCore`."""
        edit, *weights = shared
        names = [f"memory.{name}" for name, _ in self.memory.named_parameters()]
        call: tuple[Tensors, Tensors] = functional_call(
            _Advance(self), dict(zip(names, weights, strict=True)), (tile, carry, edit)
        )
        return call


class _Advance(nn.Module):
    """A step of a loop, as a function of the memory's weights, too."""

    def __init__(self, core: MemoryLoop) -> None:
        super().__init__()
        self.memory, self.core = core.memory, core

    def forward(self, tile: Tensors, carry: Tensors, edit: Tensor) -> tuple[Tensors, Tensors]:
        query, stored, live, first, *before = tile
        options, chunks = self.memory.options, self.core.chunks
        previous = _by_chunk(before, len(options.network.shapes()))
        state = unpack(options, carry)
        inputs = Inputs(query, stored, live)
        y, state, history = advance(self.memory, chunks, inputs, first, state, edit, previous)
        kept = history[: len(chunks.ends)] if self.core.keeps else []
        return pack(state), (y, *(w for weights in kept for w in weights))


@dataclass(frozen=True)
class LessonLoop:
    """What is left for a loop where gradients are taken at the same weights all along: a chunk at a time.

    A chunk's tensors are its queries ``(B, H, C, D)``, whether it is complete ``(B,)``, and its lesson. It
    puts out what the memory says to the queries and, where that is wanted, the memory as the chunk began.
    """

    memory: LibraryMemory
    name: str
    keeps: bool = False

    @property
    def results(self) -> list[tuple[int, ...]]:
        """See :class:`titans_export.loops.LoopCore`."""
        options = self.memory.options
        shapes = [(options.heads, *shape) for shape in options.network.shapes()]
        return [(options.heads, options.chunk_size, options.dim_head)] + shapes * self.keeps

    def step(self, tile: Tensors, carry: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
        """See :class:`titans_export.loops.LoopCore`."""
        query, live, *lesson = tile
        (edit,) = shared
        width, size = len(self.memory.options.network.shapes()), self.memory.options.chunk_size
        state = Memories(carry[:width], carry[width:], ())
        never = torch.zeros_like(live)
        after = self.memory.learn(self.memory.as_lesson(lesson), state, edit, live, never)
        reads = [(state.memory, size - 1), (after.memory, 1)][size == 1 :]
        y = self.memory.ask([w for w, _ in reads], [n for _, n in reads], query)
        return (*after.memory, *after.momentum), (y, *(state.memory if self.keeps else ()))


def advance_together(
    core: LessonLoop,
    inputs: Inputs,
    state: MemoryState,
    edit: Tensor,
    previous: Tensors,
    loop: Loop,
    parts: int = 1,
) -> tuple[Tensor, MemoryState, Tensors]:
    """All chunks at once, but for what :class:`LessonLoop` does.

    Args:
        core: the loop.
        inputs: at every place of every chunk, ``(N, B, C, …)`` each.
        state: before the first.
        edit: ``(B,)``, ``λ``.
        previous: of the memory layer before, its memory as each chunk began, ``(N, B, …)``; or empty.
        loop: runs the loop.
        parts: chunks of a tile; all tiles but the first and the last two are whole.

    Returns:
        The answers ``(N, B, C, dim)``, the state after the last chunk, and the memory as each chunk began, if
        that is kept.
    """
    memory, lead = core.memory, inputs.live.shape[:2]
    _, store, last = carried_on(inputs.stored, inputs.live[..., None], state.store, parts)
    complete = inputs.live[:, :, -1]
    before = tuple(w.flatten(0, 1) for w in previous)
    lesson = memory.lesson(store.flatten(0, 1), (), complete.flatten(), before)
    query = inputs.query.flatten(0, 1)
    flat = (memory.queries(query), *lesson.flat())
    queries, *lessons = (x.reshape(*lead, *x.shape[1:]) for x in flat)
    carry = (*state.memories.memory, *state.memories.momentum)
    end, (y, *kept) = loop(core, (queries, complete, *lessons), carry, (edit,))
    width = len(state.memories.memory)
    memories = Memories(end[:width], end[width:], ())
    answers = memory.answer(query, y.flatten(0, 1))
    return answers.reshape(*lead, *answers.shape[1:]), MemoryState(last, memories), tuple(kept)


def can_advance_together(options: MemoryOptions) -> bool:
    """Whether gradients are taken at the same weights all along, and chunks are no smaller than it takes."""
    return options.batch_size is None and options.chunk_size >= LEAST_TOGETHER


def _by_chunk(tensors: Sequence[Tensor], width: int) -> list[Weights]:
    """Memories, one after the other, of ``width`` tensors each."""
    return [tuple(tensors[start : start + width]) for start in range(0, len(tensors), width)]


def one_token(
    memory: LibraryMemory, query: Tensor, stored: Tensor, place: Tensor, state: MemoryState
) -> tuple[Tensor, MemoryState]:
    """A token that completes no chunk.

    Args:
        memory: weights and rule.
        query: ``(B, 1, dim)``.
        stored: ``(B, 1, width)``.
        place: ``(B,)`` int64, the token's place within its chunk.
        state: before the token.
    """
    here = torch.arange(state.store.shape[1], device=place.device) == place[:, None]
    store = torch.where(here[..., None], stored, state.store)
    return memory.read(state.memories.memory, query), state._replace(store=store)


def entries(options: MemoryOptions, views: int) -> dict[str, StateEntry]:
    """State of one memory, in the order of :func:`pack`; ``views`` of the input are stored."""
    shapes = [(options.heads, *shape) for shape in options.network.shapes()]
    schema = {"store": StateEntry((options.chunk_size, views * options.dim), role="window")}
    schema |= {f"memory.{i}": StateEntry(shape, role="memory") for i, shape in enumerate(shapes)}
    for order in range(options.orders):
        schema |= {
            f"momentum.{order}.{i}": StateEntry(shape, role="momentum") for i, shape in enumerate(shapes)
        }
    if options.batch_size:
        schema |= {f"anchor.{i}": StateEntry(shape, role="anchor") for i, shape in enumerate(shapes)}
    return schema


def pack(state: MemoryState) -> Tensors:
    """The state as one flat tuple."""
    memories = state.memories
    return (state.store, *memories.memory, *memories.momentum, *memories.anchor)


def unpack(options: MemoryOptions, tensors: Tensors) -> MemoryState:
    """The other way round."""
    width, momentum, _ = tensor_count(options)
    store, *rest = tensors
    parts = tuple(rest[:width]), tuple(rest[width : width + momentum]), tuple(rest[width + momentum :])
    return MemoryState(store, Memories(*parts))


def learned(memory: LibraryMemory) -> dict[str, Tensor]:
    """Entries of the initial state that are not zero, without their batch axis."""
    names = ["memory", "anchor"] if memory.options.batch_size else ["memory"]
    return {
        f"{name}.{i}": weight for name in names for i, weight in enumerate(memory.memory_model_parameters)
    }


def _put(store: Tensor, inputs: Inputs, chunks: Chunks, start: int, stop: int) -> Tensor:
    """The store with the tokens of places ``start … stop - 1``, which lie in one chunk."""
    begin = (chunks.offset + start) % chunks.size
    end = begin + stop - start
    live = inputs.live[:, start:stop, None]
    new = torch.where(live, inputs.stored[:, start:stop], store[:, begin:end])
    if (begin, end) == (0, chunks.size):
        return new
    return torch.cat([store[:, :begin], new, store[:, end:]], dim=1)


def _at_boundary(options: MemoryOptions, position: Tensor) -> Tensor:
    """Whether a batch of chunks ends before ``position``."""
    if options.batch_size is None:
        return torch.zeros_like(position, dtype=torch.bool)
    return position % options.batch_size == 0

"""A memory along a stream: chunks that begin and end anywhere in what is seen at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from titans_export.importers.titans_pytorch.memory import LibraryMemory, Memories, tensor_count
from titans_export.importers.titans_pytorch.networks import Weights
from titans_export.importers.titans_pytorch.options import MemoryOptions
from titans_export.memory_layer import StateEntry

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

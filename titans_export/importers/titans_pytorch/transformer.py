"""``MemoryAsContextTransformer`` of titans-pytorch, layer after layer for all segments at once.

After every ``S`` tokens stand ``NL`` learned long-term tokens, if a token follows. A tile is therefore a
segment's ``S`` tokens and, before them, the long-term tokens of the segment before. Tiles stand along the
batch, but where a memory goes from one to the next.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_export.importers.titans_pytorch.attention import AttentionState, Places, SegmentAttention
from titans_export.importers.titans_pytorch.memory import LibraryMemory, Projection
from titans_export.importers.titans_pytorch.options import MemoryOptions, TransformerOptions
from titans_export.importers.titans_pytorch.residual import HyperConnection, SingleStream
from titans_export.importers.titans_pytorch.stream import (
    Chunks,
    Inputs,
    LessonLoop,
    MemoryLoop,
    MemoryState,
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


class Selector(nn.Module):
    """Which of the earlier layers' inputs and outputs a memory's query, key and value are made of."""

    def __init__(self, dim: int, choices: int) -> None:
        """``choices``: the memory's own input, and four of every layer before."""
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.weights = Projection(dim, 3 * choices, bias=True)

    def forward(self, x: Tensor, before: list[Tensor]) -> Tensor:
        """``(B, E, dim)`` → the three views ``(3, B, E, dim)``."""
        shares = self.weights(self.norm(x)).unflatten(-1, (3, -1)).softmax(-1)  # (B, E, 3, choices)
        views: Tensor = (shares @ torch.stack([x, *before], dim=-2)).movedim(-2, 0)
        return views


class FeedForward(nn.Module):
    """``(a ⊙ silu(g)) W₂ + b₂`` with ``a, g = rms(x) W₁ + b₁``."""

    def __init__(self, dim: int, mult: float) -> None:
        """``mult``: the library's ``ff_mult``."""
        super().__init__()
        inner = int(dim * mult * 2 / 3)
        self.norm = nn.RMSNorm(dim)
        self.up = Projection(dim, 2 * inner, bias=True)
        self.down = Projection(inner, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, E, dim)`` → the same shape."""
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * value)
        return y


class PositionMlp(nn.Module):
    """``Linear-SiLU-Linear-SiLU-Linear`` of a number."""

    def __init__(self, dim: int) -> None:
        """``dim``: of the model; twice as wide inside."""
        super().__init__()
        self.first = Projection(1, 2 * dim, bias=True)
        self.second = Projection(2 * dim, 2 * dim, bias=True)
        self.third = Projection(2 * dim, dim, bias=True)

    def forward(self, index: Tensor) -> Tensor:
        """``(…, 1)`` → ``(…, dim)``."""
        y: Tensor = self.third(F.silu(self.second(F.silu(self.first(index)))))
        return y


class Layer(nn.Module):
    """Memory, where there is one, attention and feed-forward, each with its connection to the streams."""

    def __init__(self, options: TransformerOptions, index: int, memory: MemoryOptions | None) -> None:
        """``memory``: its options, or None."""
        super().__init__()
        self.memory = None if memory is None else LibraryMemory(memory)
        gates = options.neural_mem_gate_attn_output
        self.memory_connection = None if memory is None else _connection(options, adds=not gates)
        selects = memory is not None and index > 0 and options.neural_memory_qkv_receives_diff_views
        self.selector = Selector(options.dim, 4 * index + 1) if selects else None
        self.attention_connection = _connection(options)
        self.attention = SegmentAttention(options, first=index == 0)
        self.feed_forward_connection = _connection(options)
        self.feed_forward = FeedForward(options.dim, options.ff_mult)

    @property
    def views(self) -> int:
        """Views of its input that the memory stores."""
        return 1 if self.selector is None else 2


class LayerState(NamedTuple):
    """What a layer carries along a stream."""

    attention: AttentionState
    memory: MemoryState | None


class _Pass:
    """One pass over some places: what layers hand on to later ones, and how a layer's parts are run."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.values: Tensor | None = None
        self.history: Tensors = ()
        self.stored: list[Tensor] = []

    def attend(self, layer: Layer, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState, Tensor]:
        raise NotImplementedError

    def remember(
        self, layer: Layer, index: int, query: Tensor, stored: Tensor, state: MemoryState
    ) -> tuple[Tensor, MemoryState]:
        raise NotImplementedError

    def run(self, layer: Layer, index: int, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """``x (B, E, s, dim)``, the streams, → the same shape, and the layer's state."""
        gate, memory = None, state.memory
        if layer.memory is not None and layer.memory_connection is not None and memory is not None:
            mixed = layer.memory_connection(x)
            query, stored = self._views(layer, mixed.branch)
            self.stored.append(stored)
            retrieved, memory = self.remember(layer, index, query, stored, memory)
            if layer.memory_connection.adds:
                x = mixed.added(retrieved)
            else:
                gate = torch.sigmoid(retrieved)
        mixed = layer.attention_connection(x)
        attended, attention, own = self.attend(layer, mixed.branch, state.attention)
        self.values = own if self.values is None else self.values
        attended = attended if gate is None else attended * gate
        self.inputs += [mixed.branch, attended]
        x = mixed.added(attended)
        mixed = layer.feed_forward_connection(x)
        answer = layer.feed_forward(mixed.branch)
        self.inputs += [mixed.branch, answer]
        return mixed.added(answer), LayerState(attention, memory)

    def _views(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """The query's view, and what the memory stores."""
        if layer.selector is None:
            return x, x
        query, key, value = layer.selector(x, self.inputs).unbind(0)
        return query, torch.cat([key, value], dim=-1)


class _TilePass(_Pass):
    """Tiles: the long-term tokens of the segment before, then a segment's tokens."""

    def __init__(self, options: TransformerOptions, places: Places, edit: Tensor, loop: Loop) -> None:
        super().__init__()
        self.options, self.places, self.edit, self.loop = options, places, edit, loop
        lead = options.num_longterm_mem_tokens
        begins = (places.live[:, :, :1] & (places.segment > 0)[..., None]).expand(-1, -1, lead)
        # Rows are joined, then seen as tiles: a compiler may lay out what is joined unlike eager does,
        # and tiles that eager sees as rows would not be rows there.
        self.live_rows = torch.cat([begins.flatten(0, 1), places.live.flatten(0, 1)], dim=1)
        self.live = self.live_rows.unflatten(0, places.live.shape[:2])
        size = options.memory.chunk_size
        self.chunks = Chunks(size, -lead % size, options.window)
        self.first = places.segment * options.window - lead

    def attend(self, layer: Layer, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState, Tensor]:
        return layer.attention.tiles(x, self.places, state, self.values)

    def remember(
        self, layer: Layer, index: int, query: Tensor, stored: Tensor, state: MemoryState
    ) -> tuple[Tensor, MemoryState]:
        assert layer.memory is not None
        layers, options = self.options.memory_layers, layer.memory.options
        previous = self.history if options.accept_weight_residual else ()
        keeps = self.options.neural_mem_weight_residual and index != layers[-1]
        name, edit = f"{TransformerModel.operator}Memory{index}", self.edit[:, layers.index(index)]
        if can_advance_together(options) and self.chunks.offset == 0:
            inputs = Inputs(*(self._in_chunks(x) for x in (query, stored, self.live_rows)))
            core = LessonLoop(layer.memory, name, keeps)
            parts = self.options.window // self.chunks.size
            y, state, self.history = advance_together(core, inputs, state, edit, previous, self.loop, parts)
            return self._from_chunks(y), state
        in_tiles = (x.reshape(*self.live.shape[:2], *x.shape[1:]) for x in (query, stored))
        tile_loop = MemoryLoop(layer.memory, name, self.chunks, keeps)
        tiles = (*in_tiles, self.live, self.first, *previous)
        carry, (y, *kept) = self.loop(tile_loop, tiles, pack(state), (edit, *tile_loop.weights()))
        self.history = tuple(kept)
        return y.flatten(0, 1), unpack(options, carry)

    def _in_chunks(self, x: Tensor) -> Tensor:
        """``(N B, W, …)`` → ``(N K, B, C, …)``, ``K`` chunks a tile."""
        tiles, batch, window = self.live.shape
        size = self.chunks.size
        chunks = x.reshape(tiles, batch, window // size, size, *x.shape[2:])
        return chunks.transpose(1, 2).flatten(0, 1)

    def _from_chunks(self, y: Tensor) -> Tensor:
        """The other way round."""
        tiles, batch, window = self.live.shape
        chunks = y.reshape(tiles, window // self.chunks.size, *y.shape[1:]).transpose(1, 2)
        return chunks.reshape(tiles * batch, window, y.shape[-1])


class _TokenPass(_Pass):
    """One token that completes no chunk and follows no long-term tokens."""

    def __init__(self, options: TransformerOptions, position: Tensor) -> None:
        super().__init__()
        self.place, self.segment = position % options.segment_len, position // options.segment_len
        self.chunk_place = self.place % options.memory.chunk_size

    def attend(self, layer: Layer, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState, Tensor]:
        return layer.attention.one(x, self.place, self.segment, state, self.values)

    def remember(
        self, layer: Layer, index: int, query: Tensor, stored: Tensor, state: MemoryState
    ) -> tuple[Tensor, MemoryState]:
        del index  # nothing is written yet
        assert layer.memory is not None
        return one_token(layer.memory, query, stored, self.chunk_place, state)


class TransformerModel(nn.Module):
    """The transformer, and what it carries along a stream."""

    operator = "SegmentTransformer"

    def __init__(self, options: TransformerOptions) -> None:
        """Weights are zero until they are loaded."""
        super().__init__()
        self.options = options
        dim, streams = options.dim, options.num_residual_streams
        self.embedding = nn.Embedding(options.num_tokens, dim)
        self.long_term = nn.Parameter(torch.zeros(options.num_longterm_mem_tokens, dim))
        self.chunk_position = PositionMlp(dim)
        self.place_position = nn.Parameter(torch.zeros(options.memory.chunk_size, dim))
        self.stream_embedding = nn.Parameter(torch.zeros(streams, dim)) if streams > 1 else None
        self.layers = nn.ModuleList(Layer(options, i, self._memory_of(i)) for i in range(options.depth))
        self.norm = nn.RMSNorm(dim)
        self.to_logits = Projection(dim, options.num_tokens)

    def _memory_of(self, index: int) -> MemoryOptions | None:
        layers, memory = self.options.memory_layers, self.options.memory
        if index not in layers:
            return None
        residual = self.options.neural_mem_weight_residual and index != layers[0]
        return dataclasses.replace(memory, accept_weight_residual=residual)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @property
    def memories(self) -> dict[str, LibraryMemory]:
        """Every memory, by what the names of its state begin with."""
        layers = enumerate(self._layers())
        return {f"layers.{index}.": layer.memory for index, layer in layers if layer.memory is not None}

    @property
    def stored_widths(self) -> list[int]:
        """Of what every memory stores of a token."""
        return [layer.views * self.options.dim for layer in self._layers() if layer.memory is not None]

    def state(self) -> dict[str, StateEntry]:
        """Every entry of the state by name."""
        schema = {"position": StateEntry((), torch.int64, role="position")}
        for index, layer in enumerate(self._layers()):
            own = {f"attention.{name}": entry for name, entry in layer.attention.entries().items()}
            if layer.memory is not None:
                own |= entries(layer.memory.options, layer.views)
            schema |= {f"layers.{index}.{name}": entry for name, entry in own.items()}
        return schema

    def learned_state(self) -> dict[str, Tensor]:
        """Entries of the initial state that are not zero, without their batch axis."""
        return {
            f"layers.{index}.{name}": tensor
            for index, layer in enumerate(self._layers())
            if layer.memory is not None
            for name, tensor in learned(layer.memory).items()
        }

    @property
    def edit_layers(self) -> int:
        """One for every memory."""
        return len(self.options.memory_layers)

    @property
    def tile(self) -> int:
        """Tokens that are taken at once: a segment."""
        return self.options.segment_len

    @property
    def apart(self) -> tuple[int, ...]:
        """Places in a tile whose tokens complete a chunk, follow long-term tokens, or move a window on."""
        size = self.options.memory.chunk_size
        places = {place for place in range(self.tile) if (place + 1) % size == 0}
        if self.options.num_longterm_mem_tokens or self.options.sliding_window_attn:
            places.add(0)
        return tuple(sorted(places))

    def before(self, input_ids: Tensor) -> Tensor:
        """What stands before the recurrence: ids ``(B, T)`` → ``(B, T, dim)``."""
        embedded: Tensor = self.embedding(input_ids)
        return embedded

    def after(self, features: Tensor) -> Tensor:
        """What stands after the recurrence: ``(B, T, dim)`` → logits ``(B, T, vocab)``."""
        logits: Tensor = self.to_logits(self.norm(features))
        return logits

    def one(self, x: Tensor, edit: Tensor, carry: Tensors) -> tuple[Tensor, Tensors]:
        """One token that is not apart: ``(B, 1, dim)`` and the state before it."""
        _, y, present = self._one(x, edit, carry)
        return y, present

    def one_stored(self, x: Tensor, edit: Tensor, carry: Tensors) -> tuple[Tensor, Tensors]:
        """The same, but what all memories store, side by side, in place of the answer."""
        run, _, present = self._one(x, edit, carry)
        return torch.cat(run.stored, dim=-1), present

    def _one(self, x: Tensor, edit: Tensor, carry: Tensors) -> tuple[_Pass, Tensor, Tensors]:
        del edit  # nothing is written yet
        position, *rest = carry
        options = self.options
        place, size = position % options.segment_len, options.memory.chunk_size
        chunk = position // options.segment_len * (options.window // size) + place // size
        x = (
            x
            + self.chunk_position(chunk[:, None, None].to(x.dtype))
            + self.place_position[place % size][:, None]
        )
        run = _TokenPass(options, position)
        y, present = self._run(run, x, tuple(rest))
        return run, y, (position + 1, *present)

    def together(
        self, x: Tensor, live: Tensor, edit: Tensor, carry: Tensors, loop: Loop
    ) -> tuple[Tensor, Tensors]:
        """All tiles: ``(N, B, S, dim)`` of which ``live (N, B, S)`` are there."""
        _, y, present = self._together(x, live, edit, carry, loop)
        return self._own(y, live), present

    def together_stored(
        self, x: Tensor, live: Tensor, edit: Tensor, carry: Tensors, loop: Loop
    ) -> tuple[Tensor, Tensors]:
        """The same, but what all memories store of the tiles' own tokens in place of the answers."""
        run, _, present = self._together(x, live, edit, carry, loop)
        return self._own(torch.cat(run.stored, dim=-1), live), present

    def _together(
        self, x: Tensor, live: Tensor, edit: Tensor, carry: Tensors, loop: Loop
    ) -> tuple[_Pass, Tensor, Tensors]:
        position, *rest = carry
        options, tiles = self.options, torch.arange(live.shape[0], device=x.device)
        segment = position // options.segment_len + tiles[:, None]
        x = x.flatten(0, 1)
        x = torch.cat([self.long_term.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self._positions(segment.flatten(), x.dtype)
        run = _TilePass(options, Places(live, segment), edit, loop)
        y, present = self._run(run, x, tuple(rest))
        return run, y, (position + live.sum((0, 2)), *present)

    def _own(self, y: Tensor, live: Tensor) -> Tensor:
        """``(N B, NL + S, …)`` → ``(N, B, S, …)``: what belongs to tokens of the input."""
        own = y[:, self.options.num_longterm_mem_tokens :]
        return own.reshape(*live.shape[:2], *own.shape[1:])

    def _positions(self, segment: Tensor, dtype: torch.dtype) -> Tensor:
        """Of tiles' places, ``(N B, NL + S, dim)``."""
        options = self.options
        size, lead = options.memory.chunk_size, options.num_longterm_mem_tokens
        places = range(-lead, options.segment_len)
        chunks = sorted({place // size for place in places})
        index = segment[:, None] * (options.window // size) + torch.tensor(chunks, device=segment.device)
        by_chunk = self.chunk_position(index[..., None].to(dtype))
        where = torch.tensor([chunks.index(place // size) for place in places], device=segment.device)
        within = torch.tensor([place % size for place in places], device=segment.device)
        positions: Tensor = by_chunk[:, where] + self.place_position[within]
        return positions

    def _run(self, run: _Pass, x: Tensor, carry: Tensors) -> tuple[Tensor, Tensors]:
        """``x (B, E, dim)`` through all layers, the streams summed at the end."""
        streams = x[:, :, None] if self.stream_embedding is None else x[:, :, None] + self.stream_embedding
        present: list[Tensor] = []
        for index, layer in enumerate(self._layers()):
            state, carry = self._unpack(layer, carry)
            streams, state = run.run(layer, index, streams, state)
            present += [tensor for tensor in state.attention if tensor is not None]
            present += [] if state.memory is None else pack(state.memory)
        return streams.sum(2), tuple(present)

    def _unpack(self, layer: Layer, carry: Tensors) -> tuple[LayerState, Tensors]:
        """One layer's state, and what is left."""
        count = 4 if self.options.sliding_window_attn else 2
        attention, carry = AttentionState(*carry[:count]), carry[count:]
        if layer.memory is None:
            return LayerState(attention, None), carry
        count = len(entries(layer.memory.options, layer.views))
        return LayerState(attention, unpack(layer.memory.options, carry[:count])), carry[count:]


def _connection(options: TransformerOptions, adds: bool = True) -> nn.Module:
    if options.num_residual_streams == 1:
        return SingleStream(adds)
    return HyperConnection(options.num_residual_streams, options.dim, adds)

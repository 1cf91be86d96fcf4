"""Memory as context: a segment attends to what the memory says about it, and is then written to it.

arXiv 2501.00663, section 4.1, equations 21 to 25. For every segment:

    h_t = f_M(q_t)              with M as the segment began
    y_t = Attn([P, h, x])_t     tokens see persistent tokens, and h and x up to themselves
    M_t = M_{t-1} edited by y_t
    o_t = y_t ⊗ f_{M_t}(y_t)

The segment in which a stream stands is part of its state: keys and values so far, and the memory as
it began.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_export.attention import attend, rotate
from titans_export.layers import l2_normalise, log_sigmoid, rms_norm
from titans_export.memory.deep import pack, unpack
from titans_export.memory.mlp import Weights, read
from titans_export.memory.tiles import MemoryForm, MemoryState, TokenInputs, one_token, tile_of_tokens
from titans_export.recurrence import Tensors


class SegmentWeights(NamedTuple):
    """What is learnt and used within a segment.

    Attributes:
        edit: ``(B,)``, ``λ``.
        persistent_key: ``(H, P, D)``.
        persistent_value: ``(H, P, D)``.
        context: ``(2 H D, H D)``, from the memory's answer to its key and value.
        memory: ``(3 H D + G H, H D)``, from the attention's output to the memory's query, key, value
            and ``G`` gates.
        gate_bias: ``(G H,)``.
        attention_norm: ``(D,)``.
        read_norm: ``(D,)``.
    """

    edit: Tensor
    persistent_key: Tensor
    persistent_value: Tensor
    context: Tensor
    memory: Tensor
    gate_bias: Tensor
    attention_norm: Tensor
    read_norm: Tensor


class SegmentState(NamedTuple):
    """Where a stream stands in its segment.

    Attributes:
        key: ``(B, H, 2 C, D)`` rotated: of the memory's answers, then of the tokens, by their place.
        value: likewise.
        context: the memory as the segment began.
        memory: the memory now.
    """

    key: Tensor
    value: Tensor
    context: Weights
    memory: MemoryState


@dataclass(frozen=True)
class SegmentMemory:
    """The core of MAC.

    Tokens: attention's query, key, value and the memory's query ``(B, H, T, D)``. State:
    :class:`SegmentState`. Shared: :class:`SegmentWeights` and the memory's reference.

    Attributes:
        form: kind of the memory; its period divides the segment.
        tile: tokens of a segment.
        retention: whether the memory forgets.
    """

    form: MemoryForm
    tile: int
    retention: bool = True

    @property
    def name(self) -> str:
        """Of the operator."""
        return "SegmentMemory"

    @property
    def apart(self) -> tuple[int, ...]:
        """None: every token is like every other."""
        return ()

    def one(self, tokens: Tensors, place: Tensor, carry: Tensors, shared: Tensors) -> tuple[Tensor, Tensors]:
        """See :class:`titans_export.recurrence.Core`."""
        y, present, _ = self.one_and_inputs(tokens, place, carry, shared)
        return y, present

    def step(self, tokens: Tensors, live: Tensor, carry: Tensors, shared: Tensors) -> tuple[Tensor, Tensors]:
        """See :class:`titans_export.recurrence.Core`."""
        y, present, _ = self.step_and_inputs(tokens, live, carry, shared)
        return y, present

    def one_and_inputs(
        self, tokens: Tensors, place: Tensor, carry: Tensors, shared: Tensors
    ) -> tuple[Tensor, Tensors, TokenInputs]:
        """One token; and what the memory was given, which nothing outside the core can know."""
        slots = torch.arange(self.tile, device=place.device)
        here = slots == place[:, None]  # (B, C)
        position = place[:, None, None]
        seen = (slots <= place[:, None])[:, None, None]
        weights, reference = _split(shared)
        y, state = self._attend(tokens, position, place == 0, here, seen, self._state(carry), weights)
        inputs = self._memory_inputs(y, weights)
        begins = place % self.form.period == 0
        answer, memory = one_token(self.form, state.memory, inputs, begins, weights.edit, reference)
        return _gated(y, answer, weights), _flat(state._replace(memory=memory)), inputs

    def step_and_inputs(
        self, tokens: Tensors, live: Tensor, carry: Tensors, shared: Tensors
    ) -> tuple[Tensor, Tensors, TokenInputs]:
        """One tile, likewise."""
        slots = torch.arange(self.tile, device=live.device)
        seen = slots <= slots[:, None]
        weights, reference = _split(shared)
        y, state = self._attend(tokens, slots, live[:, 0], live, seen, self._state(carry), weights)
        inputs = self._memory_inputs(y, weights)
        answer, memory = tile_of_tokens(self.form, state.memory, inputs, live, weights.edit, reference)
        return _gated(y, answer, weights), _flat(state._replace(memory=memory)), inputs

    def _attend(
        self,
        tokens: Tensors,
        position: Tensor,
        begins: Tensor,
        here: Tensor,
        seen: Tensor,
        state: SegmentState,
        weights: SegmentWeights,
    ) -> tuple[Tensor, SegmentState]:
        """Attention's output ``(B, H, T, D)``; keys and values take their places ``here (B, C)``."""
        query, key, value, question = tokens
        anew = begins[:, None, None, None]
        context = tuple(
            torch.where(anew, m, old) for m, old in zip(state.memory.memory, state.context, strict=True)
        )
        answer = read(context, question, self.form.depth)
        heads = query.shape[1]
        context_key, context_value = _heads(_merge(answer) @ weights.context.t(), 2 * heads).chunk(2, dim=1)
        old_key, old_value = state.key.chunk(2, dim=2), state.value.chunk(2, dim=2)
        mine = here[:, None, :, None]
        keys = [
            torch.where(mine, rotate(new, position), old)
            for new, old in zip((context_key, key), old_key, strict=True)
        ]
        values = [
            torch.where(mine, new, old) for new, old in zip((context_value, value), old_value, strict=True)
        ]
        present = SegmentState(torch.cat(keys, dim=2), torch.cat(values, dim=2), context, state.memory)
        y = attend(
            query,
            rotate(query, position),
            weights.persistent_key,
            weights.persistent_value,
            present.key,
            present.value,
            torch.cat([seen, seen], dim=-1),
        )
        return y, present

    def _memory_inputs(self, y: Tensor, weights: SegmentWeights) -> TokenInputs:
        heads, dim = y.shape[1], y.shape[3]
        inner = heads * dim
        projected = _merge(y) @ weights.memory.t()
        query, key, value = _heads(F.silu(projected[..., : 3 * inner]), 3 * heads).chunk(3, dim=1)
        gates = (projected[..., 3 * inner :] + weights.gate_bias).transpose(1, 2)
        return gated_inputs(
            (l2_normalise(query), l2_normalise(key), value), gates, self.form.momentum, self.retention
        )

    def _state(self, carry: Tensors) -> SegmentState:
        layers = max(self.form.depth, 1)
        key, value, *rest = carry
        return SegmentState(key, value, tuple(rest[:layers]), unpack(self.form, tuple(rest[layers:])))


def gated_inputs(
    projections: tuple[Tensor, Tensor, Tensor], gates: Tensor, momentum: bool, retention: bool
) -> TokenInputs:
    """The memory's inputs from its projections and raw gates ``(B, G H, T)``.

    Gates stand in the order retention, momentum, step; those that are switched off are not there.
    """
    query, key, value = projections
    heads = query.shape[1]
    logs, step = gates.split([gates.shape[1] - heads, heads], dim=1)
    step = torch.sigmoid(step)
    decays = list(log_sigmoid(logs).split(heads, dim=1)) if momentum or retention else []
    log_retention = decays.pop(0) if retention else torch.zeros_like(step)
    log_momentum = decays.pop() if momentum else None
    return TokenInputs(query, key, value, log_retention, step, log_momentum)


def _split(shared: Tensors) -> tuple[SegmentWeights, Weights]:
    count = len(SegmentWeights._fields)
    return SegmentWeights(*shared[:count]), tuple(shared[count:])


def _flat(state: SegmentState) -> Tensors:
    return (state.key, state.value, *state.context, *pack(state.memory))


def _gated(y: Tensor, answer: Tensor, weights: SegmentWeights) -> Tensor:
    """``y ⊗ f_M(y)``: normalised, and one passed through a sigmoid."""
    return rms_norm(y, weights.attention_norm) * torch.sigmoid(rms_norm(answer, weights.read_norm))


def _merge(x: Tensor) -> Tensor:
    """``(B, H, T, D) → (B, T, H D)``."""
    batch, heads, tokens, dim = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * dim)


def _heads(x: Tensor, heads: int) -> Tensor:
    """``(B, T, H D) → (B, H, T, D)``."""
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(1, 2)

"""A memory with a gradient period, matrix or MLP, as a recurrence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titans_export.memory.tiles import MemoryForm, MemoryState, TokenInputs, one_token, tile_of_tokens
from titans_export.recurrence import Tensors


@dataclass(frozen=True)
class PeriodicMemory:
    """The memory rule with gradient period ``form.period`` (arXiv 2501.00663, section 3.2).

    Tokens: query, key, value ``(B, H, T, D)``, log retention, step and, with momentum, log momentum
    ``(B, H, T)``. State: :class:`MemoryState`. Shared: edit ``(B,)`` and the reference's weights, where
    gradients are taken for ``λ = 0``; none for a matrix.
    """

    form: MemoryForm

    @property
    def name(self) -> str:
        """Of the operator."""
        return "PeriodicMemory"

    @property
    def tile(self) -> int:
        """A tile is a period."""
        return self.form.period

    @property
    def apart(self) -> tuple[int, ...]:
        """None: every token is like every other."""
        return ()

    def one(self, tokens: Tensors, place: Tensor, carry: Tensors, shared: Tensors) -> tuple[Tensor, Tensors]:
        """See :class:`titans_export.recurrence.Core`."""
        edit, *reference = shared
        state = unpack(self.form, carry)
        y, state = one_token(self.form, state, TokenInputs(*tokens), place == 0, edit, tuple(reference))
        return y, pack(state)

    def step(self, tokens: Tensors, live: Tensor, carry: Tensors, shared: Tensors) -> tuple[Tensor, Tensors]:
        """See :class:`titans_export.recurrence.Core`."""
        edit, *reference = shared
        state = unpack(self.form, carry)
        y, state = tile_of_tokens(self.form, state, TokenInputs(*tokens), live, edit, tuple(reference))
        return y, pack(state)


def pack(state: MemoryState) -> Tensors:
    """The state as one flat tuple: memory, momentum, anchor."""
    return state.memory + state.momentum + state.anchor


def unpack(form: MemoryForm, tensors: Tensors) -> MemoryState:
    """The other way round."""
    layers = max(form.depth, 1)
    momentum = layers if form.momentum else 0
    return MemoryState(tensors[:layers], tensors[layers : layers + momentum], tensors[layers + momentum :])

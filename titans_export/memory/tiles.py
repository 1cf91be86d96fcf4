"""A tile of tokens at once for every kind of memory, where any token of a tile may be missing.

The formulas are those of ``docs/mathematics.md``. A token that is missing leaves everything as it was:
its gates are open (log 0), its step is 0, and its momentum does not enter the memory, which takes its
column out of ``A``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_export.memory.linear import segment_products, unit_lower_inverse
from titans_export.memory.mlp import Weights, between, errors, output, read


@dataclass(frozen=True)
class MemoryForm:
    """Kind of a memory.

    Attributes:
        depth: 0 for a matrix, else layers of the MLP.
        momentum: whether writes have momentum.
        period: tokens whose gradients are all taken at the memory as their period began.
    """

    depth: int = 0
    momentum: bool = True
    period: int = 1

    @property
    def exact(self) -> bool:
        """Whether tokens of a tile read each other's writes: a matrix whose period is one token."""
        return self.depth == 0 and self.period == 1


class MemoryState(NamedTuple):
    """The memory's part of the state; ``(B, H, in, out)`` a layer.

    Attributes:
        memory: ``M``.
        momentum: ``S``; empty without momentum.
        anchor: ``M`` as the period began; empty for a period of one token.
    """

    memory: Weights
    momentum: Weights
    anchor: Weights


class TokenInputs(NamedTuple):
    """What the memory is given for each token: ``(B, H, T, D)``, gates ``(B, H, T)``.

    ``log_momentum`` is None without momentum.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_retention: Tensor
    step: Tensor
    log_momentum: Tensor | None = None


def one_token(
    form: MemoryForm, state: MemoryState, token: TokenInputs, begins: Tensor, edit: Tensor, reference: Weights
) -> tuple[Tensor, MemoryState]:
    """The rule as it is written, for one token.

    Args:
        form: kind of the memory.
        state: before the token.
        token: inputs with ``T = 1``.
        begins: ``(B,)`` bool, whether a period begins with the token.
        edit: ``(B,)``, ``λ``.
        reference: where gradients are taken for ``λ = 0``; empty means zero.

    Returns:
        ``(B, H, 1, D)`` and the state after the token.
    """
    anchor = _anchor(form, state, begins)
    inputs, deltas = errors(between(reference, anchor, edit), token.key, token.value, form.depth)
    retention, step = token.log_retention[..., None].exp(), token.step[..., None]
    writes = tuple((-step * x).transpose(-1, -2) * delta for x, delta in zip(inputs, deltas, strict=True))
    if token.log_momentum is not None:
        decay = token.log_momentum[..., None].exp()
        writes = tuple(decay * s + write for s, write in zip(state.momentum, writes, strict=True))
    memory = tuple(retention * m + write for m, write in zip(state.memory, writes, strict=True))
    present = MemoryState(memory, writes if form.momentum else (), anchor if form.period > 1 else ())
    return read(memory, token.query, form.depth), present


def tile_of_tokens(
    form: MemoryForm, state: MemoryState, tile: TokenInputs, live: Tensor, edit: Tensor, reference: Weights
) -> tuple[Tensor, MemoryState]:
    """The rule for a tile that begins where a period begins.

    Args:
        form: kind of the memory; the tile's length is a multiple of its period.
        state: before the tile.
        tile: inputs with ``T = C``.
        live: ``(B, C)`` bool; False where a token is missing.
        edit: ``(B,)``, ``λ``.
        reference: where gradients are taken for ``λ = 0``; empty means zero.

    Returns:
        ``(B, H, C, D)`` and the state after the tile's last live token.
    """
    tile = _without_missing(tile, live)
    if form.exact:
        return _exact_tile(state, tile, live, edit)
    outputs = []
    for start in range(0, live.shape[1], form.period):
        part = slice(start, start + form.period)
        inputs = TokenInputs(*(x[:, :, part] for x in tile if x is not None))
        y, state = _period(form, state, inputs, live[:, part], edit, reference)
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), state


def _anchor(form: MemoryForm, state: MemoryState, begins: Tensor) -> Weights:
    if form.period == 1:
        return state.memory
    here = begins[:, None, None, None]
    return tuple(torch.where(here, m, old) for m, old in zip(state.memory, state.anchor, strict=True))


def _without_missing(tile: TokenInputs, live: Tensor) -> TokenInputs:
    here = live[:, None]
    return tile._replace(
        log_retention=torch.where(here, tile.log_retention, 0.0),
        log_momentum=None if tile.log_momentum is None else torch.where(here, tile.log_momentum, 0.0),
        step=torch.where(here, tile.step, 0.0),
    )


class _Gates(NamedTuple):
    """``W, E (B, H, C, C)`` and ``p, r, c (B, H, C, 1)``; no ``E, r, c`` without momentum."""

    write: Tensor
    memory: Tensor
    write_momentum: Tensor | None = None
    momentum: Tensor | None = None
    decay: Tensor | None = None


def _gates(tile: TokenInputs, live: Tensor) -> _Gates:
    log_a = tile.log_retention[..., None]
    retention = segment_products(log_a) * live[:, None, None].to(log_a.dtype)
    p = log_a.cumsum(-2).exp()
    if tile.log_momentum is None:
        return _Gates(write=retention, memory=p)
    log_eta = tile.log_momentum[..., None]
    momentum, c = segment_products(log_eta), log_eta.cumsum(-2).exp()
    return _Gates(retention @ momentum, p, momentum, retention @ c, c)


def _period(
    form: MemoryForm, state: MemoryState, tile: TokenInputs, live: Tensor, edit: Tensor, reference: Weights
) -> tuple[Tensor, MemoryState]:
    """One period: every gradient at the memory as the period began."""
    gates = _gates(tile, live)
    anchor = _anchor(form, state, live[:, 0])
    inputs, deltas = errors(between(reference, anchor, edit), tile.key, tile.value, form.depth)
    writes = [-tile.step[..., None] * delta for delta in deltas]
    x = tile.query
    for layer, (past, key, write) in enumerate(zip(state.memory, inputs, writes, strict=True)):
        if layer:
            x = F.gelu(x)
        z = gates.memory * (x @ past) + (gates.write * (x @ key.transpose(-1, -2))) @ write
        if gates.momentum is not None:
            z = z + gates.momentum * (x @ state.momentum[layer])
        x = z
    present = _advance(gates, state, inputs, writes)
    return output(tile.query, x, form.depth), present._replace(anchor=anchor if form.period > 1 else ())


def _advance(gates: _Gates, state: MemoryState, inputs: list[Tensor], writes: list[Tensor]) -> MemoryState:
    """Memory and momentum after the last token."""
    memory, momentum = [], []
    for layer, (past, key, write) in enumerate(zip(state.memory, inputs, writes, strict=True)):
        columns = key.transpose(-1, -2)
        after = gates.memory[:, :, -1:] * past + (columns * gates.write[:, :, -1:]) @ write
        if gates.momentum is not None and gates.decay is not None and gates.write_momentum is not None:
            surprise = state.momentum[layer]
            after = after + gates.momentum[:, :, -1:] * surprise
            weighted = columns * gates.write_momentum[:, :, -1:]
            momentum.append(gates.decay[:, :, -1:] * surprise + weighted @ write)
        memory.append(after)
    return MemoryState(tuple(memory), tuple(momentum), state.anchor)


def _exact_tile(
    state: MemoryState, tile: TokenInputs, live: Tensor, edit: Tensor
) -> tuple[Tensor, MemoryState]:
    """A matrix whose every token is written at the memory that the token before it left."""
    gates = _gates(tile, live)
    (past,) = state.memory
    rate = edit[:, None, None, None] * tile.step[..., None]
    before, p_before = _row_down(gates.write, 0.0), _row_down(gates.memory, 1.0)
    known = p_before * (tile.key @ past)
    read_past = gates.memory * (tile.query @ past)
    if gates.momentum is not None:
        (surprise,) = state.momentum
        known = known + _row_down(gates.momentum, 0.0) * (tile.key @ surprise)
        read_past = read_past + gates.momentum * (tile.query @ surprise)
    keys = tile.key.transpose(-1, -2)
    inverse = unit_lower_inverse(rate * before * (tile.key @ keys))
    write = inverse @ (tile.step[..., None] * tile.value - rate * known)
    y = read_past + (gates.write * (tile.query @ keys)) @ write
    return y, _advance(gates, state, [tile.key], [write])


def _row_down(x: Tensor, first: float) -> Tensor:
    return torch.cat([torch.full_like(x[..., :1, :], first), x[..., :-1, :]], dim=-2)

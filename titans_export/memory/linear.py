"""The linear memory, exact per token, a tile of tokens at once: matrix products instead of a loop.

Computes :func:`titans_export.memory.reference.token_loop`. ``docs/mathematics.md`` derives the
tile form; the symbols here are the ones used there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from titans_export.memory.output import MemoryOutput


def tile_form(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_retention: Tensor,
    log_momentum: Tensor,
    step: Tensor,
    edit: Tensor,
    past_memory: Tensor,
    past_momentum: Tensor,
    tile: int,
) -> MemoryOutput:
    """The rule for any ``T``, ``tile`` tokens at once: matrix products, and one short loop over tiles.

    Everything that does not depend on the memory is computed for all tiles together; the loop
    holds what does: the memory's part of ``U`` and ``Y``, and the step from tile to tile.
    """
    tokens = query.shape[2]
    q, k, v = (_tiles(x, tile) for x in (query, key, value))  # (B, H, N, C, D)
    theta = _tiles(step[..., None], tile)  # (B, H, N, C, 1)
    weights = _write_weights(_tiles(log_retention[..., None], tile), _tiles(log_momentum[..., None], tile))
    attention = weights.write * (q @ k.transpose(-1, -2))  # W ∘ Q Kᵀ
    strength = edit[:, None, None, None, None]

    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    tracing = tracing or (query.is_cuda and torch.cuda.is_current_stream_capturing())
    edited = tracing or bool((edit != 0).any())  # a graph cannot know the strengths
    if edited:
        inverse = unit_lower_inverse(strength * theta * (weights.write_before * (k @ k.transpose(-1, -2))))
        from_value = inverse @ (theta * v)
        seen = inverse @ (strength * theta * weights.memory_before * k)  # times M_0
        moved = inverse @ (strength * theta * weights.momentum_before * k)  # times S_0
        corrections = list(zip(seen.unbind(2), moved.unbind(2), strict=True))
    else:  # λ = 0 everywhere, the plain state-space model: N = 0 and U = θ V
        from_value = theta * v
        corrections = []

    # Taken apart once: the gradient of a slice is as large as what it was cut from.
    tiles = zip(*(x.unbind(2) for x in (q, k, from_value, attention)), weights.tiles(), strict=True)
    memory, momentum, outputs = past_memory, past_momentum, []
    for n, (queries, keys, from_values, reads, own) in enumerate(tiles):
        u = from_values
        if corrections:
            by_memory, by_momentum = corrections[n]
            u = u - by_memory @ memory - by_momentum @ momentum
        outputs.append(own.memory * (queries @ memory) + own.momentum * (queries @ momentum) + reads @ u)
        # A ragged last tile is computed on padded keys; its state is taken at its last token's row.
        row = min(tile, tokens - n * tile) - 1
        memory, momentum = _advance(own, row, keys, u, memory, momentum)
    output = torch.cat(outputs, dim=2)[:, :, :tokens]
    return output, memory, momentum


@dataclass(frozen=True)
class _WriteWeights:
    """What the gates alone decide, for every tile: ``(B, H, N, C, C)`` or ``(B, H, N, C, 1)``."""

    write: Tensor  # W: of write s in M_t
    write_momentum: Tensor  # E: of write s in S_t
    write_before: Tensor  # W': of write s in M_{t-1}
    memory: Tensor  # p: of M_0 in M_t
    memory_before: Tensor  # p'
    momentum: Tensor  # r: of S_0 in M_t
    momentum_before: Tensor  # r'
    momentum_decay: Tensor  # c: of S_0 in S_t

    def tiles(self) -> Iterator[_WriteWeights]:
        """The same of each tile: without the axis ``N``."""
        parts = (getattr(self, field.name).unbind(2) for field in fields(self))
        return (_WriteWeights(*part) for part in zip(*parts, strict=True))


def _write_weights(log_a: Tensor, log_eta: Tensor) -> _WriteWeights:
    retention, momentum = segment_products(log_a), segment_products(log_eta)  # A, E
    write = retention @ momentum
    p = log_a.cumsum(-2).exp()
    c = log_eta.cumsum(-2).exp()
    r = retention @ c
    return _WriteWeights(
        write=write,
        write_momentum=momentum,
        write_before=_one_row_down(write, 0.0),
        memory=p,
        memory_before=_one_row_down(p, 1.0),
        momentum=r,
        momentum_before=_one_row_down(r, 0.0),
        momentum_decay=c,
    )


def _advance(
    weights: _WriteWeights, row: int, key: Tensor, u: Tensor, memory: Tensor, momentum: Tensor
) -> tuple[Tensor, Tensor]:
    """``M`` and ``S`` after token ``row`` of a tile."""
    at = slice(row, row + 1)
    key_t = key.transpose(-1, -2)
    write = weights.write[:, :, at].transpose(-1, -2)  # (B, H, C, 1)
    write_momentum = weights.write_momentum[:, :, at].transpose(-1, -2)
    next_memory = (
        weights.memory[:, :, at] * memory + weights.momentum[:, :, at] * momentum + key_t @ (write * u)
    )
    next_momentum = weights.momentum_decay[:, :, at] * momentum + key_t @ (write_momentum * u)
    return next_memory, next_momentum


def segment_products(log_gate: Tensor) -> Tensor:
    """``G[t, s] = Π_{i=s+1..t} g_i`` for ``s ≤ t``, else 0: ``(…, C, 1) → (…, C, C)``.

    Built from segment sums. Differences of one cumulative sum lose digits where a gate closes and
    are NaN where it is shut (``-inf``); quotients of cumulative products underflow.
    """
    size = log_gate.shape[-2]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_gate.device)
    below = log_gate.expand(*log_gate.shape[:-1], size).masked_fill(~ones.tril(-1), 0.0)
    return below.cumsum(-2).masked_fill(~ones.tril(), float("-inf")).exp()


def unit_lower_inverse(strictly_lower: Tensor) -> Tensor:
    """``(I + N)⁻¹`` by inverting diagonal blocks of twice the size each step; ``(…, C, C)``.

    Two matrix products a step, ``log2 C`` steps. The Neumann product is equal on paper and useless
    in float32 when keys repeat: its powers of ``N`` grow to 1e16 before they cancel.
    """
    size = strictly_lower.shape[-1]
    index = torch.arange(size, device=strictly_lower.device)
    row, column = index[:, None], index[None, :]
    inverse = torch.eye(size, dtype=strictly_lower.dtype, device=strictly_lower.device)
    inverse = inverse.expand_as(strictly_lower)
    half = 1
    while half < size:
        same_block = row // (2 * half) == column // (2 * half)
        mask = same_block & ((row // half) % 2 == 1) & ((column // half) % 2 == 0)
        inverse = inverse - inverse @ (strictly_lower * mask) @ inverse
        half *= 2
    return inverse


def _one_row_down(x: Tensor, first: float) -> Tensor:
    """Row ``t`` becomes what row ``t - 1`` was; row 0 becomes ``first``."""
    top = torch.full_like(x[..., :1, :], first)
    return torch.cat([top, x[..., :-1, :]], dim=-2)


def _tiles(x: Tensor, tile: int) -> Tensor:
    """``(B, H, T, D) → (B, H, N, C, D)``, zero-padded to whole tiles."""
    batch, heads, tokens, dim = x.shape
    missing = -tokens % tile
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.reshape(batch, heads, -1, tile, dim)


__all__ = ["segment_products", "tile_form", "unit_lower_inverse"]

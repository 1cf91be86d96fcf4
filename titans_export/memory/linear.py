"""The linear memory, exact per token, a tile of tokens at once: matrix products instead of a loop.

Computes :func:`titans_export.memory.reference.token_loop`. ``docs/mathematics.md`` derives the
tile form; the symbols here are the ones used there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_converters.memory_op import LOG_FLOOR
from titans_export.memory.output import MemoryOutput

_BLOCK = 16
"""Rows of blocks whose inverses are found by doubling, and those of larger ones from them."""


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
    # Laid out once: products copy what is not, and what is made of a gate's layout takes it over.
    step, log_retention, log_momentum = (x.contiguous() for x in (step, log_retention, log_momentum))
    q, k, v = (_tiles(x.contiguous(), tile) for x in (query, key, value))  # (B, H, N, C, D)
    theta = _tiles(step[..., None], tile)  # (B, H, N, C, 1)
    tracing = _tracing() or (query.is_cuda and torch.cuda.is_current_stream_capturing())
    edited = tracing or bool((edit != 0).any())  # a graph cannot know the strengths
    carried = tracing or _has_momentum(log_momentum, past_momentum)  # nor that there is no momentum
    log_eta = _tiles(log_momentum[..., None], tile) if carried else None
    weights = _write_weights(_tiles(log_retention[..., None], tile), log_eta)
    attention = weights.write * (q @ k.transpose(-1, -2))  # W ∘ Q Kᵀ
    from_value, corrections = theta * v, []
    if edited:  # λ = 0 everywhere is the plain state-space model: N = 0 and U = θ V
        rate = edit[:, None, None, None, None] * theta
        inverse = unit_lower_inverse(rate * (_one_row_down(weights.write, 0.0) * (k @ k.transpose(-1, -2))))
        from_value = inverse @ from_value
        corrections = [(inverse @ (rate * share * k)).unbind(2) for share in weights.shares_before()]

    # Taken apart once: the gradient of a slice is as large as what it was cut from.
    tiles = zip(*(x.unbind(2) for x in (q, k, from_value, attention)), weights.tiles(), strict=True)
    memory, momentum, outputs = past_memory, past_momentum, []
    for n, (queries, keys, u, reads, own) in enumerate(tiles):
        written = u
        for correction, past in zip(corrections, (memory, momentum), strict=False):  # as many as there are
            written = written - correction[n] @ past
        y = own.memory * (queries @ memory) + reads @ written
        if own.momentum is not None:
            y = y + own.momentum.memory * (queries @ momentum)
        outputs.append(y)
        # A ragged last tile is computed on padded keys; its state is taken at its last token's row.
        row = min(tile, tokens - n * tile) - 1
        memory, momentum = _advance(own, row, keys, written, memory, momentum)
    output = torch.cat(outputs, dim=2)[:, :, :tokens]
    return output, memory, momentum


class _MomentumWeights(NamedTuple):
    """What the momentum adds to :class:`_WriteWeights`."""

    write: Tensor  # E: of write s in S_t
    memory: Tensor  # r: of S_0 in M_t
    decay: Tensor  # c: of S_0 in S_t


class _WriteWeights(NamedTuple):
    """What the gates alone decide, for every tile: ``(B, H, N, C, C)`` or ``(B, H, N, C, 1)``."""

    write: Tensor  # W: of write s in M_t
    memory: Tensor  # p: of M_0 in M_t
    momentum: _MomentumWeights | None

    def shares_before(self) -> list[Tensor]:
        """``p'`` and, with momentum, ``r'``: of ``M_0`` and ``S_0`` in ``M_{t-1}``."""
        before = [_one_row_down(self.memory, 1.0)]
        return before if self.momentum is None else [*before, _one_row_down(self.momentum.memory, 0.0)]

    def tiles(self) -> Iterator[_WriteWeights]:
        """The same of each tile: without the axis ``N``."""
        tiles = zip(self.write.unbind(2), self.memory.unbind(2), strict=True)
        if self.momentum is None:
            return (_WriteWeights(*gates, None) for gates in tiles)
        momentum = zip(*(x.unbind(2) for x in self.momentum), strict=True)
        both = zip(tiles, momentum, strict=True)
        return (_WriteWeights(*gates, _MomentumWeights(*own)) for gates, own in both)


def _has_momentum(log_momentum: Tensor, past_momentum: Tensor) -> bool:
    """Whether any token has some, or a gradient is asked for that is zero if none has."""
    differentiated = log_momentum.requires_grad or past_momentum.requires_grad
    return differentiated or not bool(torch.isneginf(log_momentum).all())


def _write_weights(log_a: Tensor, log_eta: Tensor | None) -> _WriteWeights:
    """``log_eta``: None without momentum, when ``W`` is the retention's ``A``."""
    retention, p = segment_products(log_a), log_a.cumsum(-2).exp()
    if log_eta is None:
        return _WriteWeights(retention, p, None)
    momentum, c = segment_products(log_eta), log_eta.cumsum(-2).exp()
    return _WriteWeights(retention @ momentum, p, _MomentumWeights(momentum, retention @ c, c))


def _advance(
    weights: _WriteWeights, row: int, key: Tensor, u: Tensor, memory: Tensor, momentum: Tensor
) -> tuple[Tensor, Tensor]:
    """``M`` and ``S`` after token ``row`` of a tile."""
    at = slice(row, row + 1)
    key_t = key.transpose(-1, -2)
    write = weights.write[:, :, at].transpose(-1, -2)  # (B, H, C, 1)
    kept = weights.memory[:, :, at] * memory + key_t @ (write * u)
    if weights.momentum is None:  # the last write alone
        return kept, key_t[..., at] @ u[:, :, at]
    write = weights.momentum.write[:, :, at].transpose(-1, -2)
    kept = kept + weights.momentum.memory[:, :, at] * momentum
    return kept, weights.momentum.decay[:, :, at] * momentum + key_t @ (write * u)


def segment_products(log_gate: Tensor) -> Tensor:
    """``G[t, s] = Π_{i=s+1..t} g_i`` for ``s ≤ t``, else 0: ``(…, C, 1) → (…, C, C)``.

    Built from segment sums. Differences of one cumulative sum lose digits where a gate closes and
    are NaN where it is shut (``-inf``); quotients of cumulative products underflow.
    """
    size = log_gate.shape[-2]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_gate.device)
    if not _tracing() and size <= 64 and log_gate.numel() > size**2 and _in_full(log_gate):
        # As one product, which many tiles share: half of the time, a third of the gradient's.
        sums = log_gate.squeeze(-1).clamp(min=LOG_FLOOR) @ _segments(ones, log_gate.dtype)
        products: Tensor = sums.unflatten(-1, (size, size)).exp() * ones.tril()
        return products
    below = log_gate.expand(*log_gate.shape[:-1], size).masked_fill(~ones.tril(-1), 0.0)
    return below.cumsum(-2).masked_fill(~ones.tril(), float("-inf")).exp()


def _in_full(x: Tensor) -> bool:
    """Whether a product of ``x`` keeps all digits, which sums of logs want: no bfloat16 or TF32 for speed."""
    exact = torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
    return exact and x.device.type == "cpu"


def _segments(ones: Tensor, dtype: torch.dtype) -> Tensor:
    """Which gates ``i`` lie in ``s < i ≤ t``, for every ``t`` and ``s``: ``(C, C C)``."""
    after_s, up_to_t = ones.triu(1).t()[:, None, :], ones.triu()[:, :, None]
    return (after_s & up_to_t).to(dtype).flatten(1)


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def unit_lower_inverse(strictly_lower: Tensor) -> Tensor:
    """``(I + N)⁻¹`` by inverting diagonal blocks of twice the size each step; ``(…, C, C)``.

    Two matrix products a step, ``log2 C - 1`` steps, and two for the gradient. The Neumann product is
    equal on paper and useless in float32 when keys repeat: its powers of ``N`` grow to 1e16 before they
    cancel.
    """
    if strictly_lower.requires_grad and torch.is_grad_enabled() and not _tracing():
        inverse: Tensor = _UnitLowerInverse.apply(strictly_lower)  # type: ignore[no-untyped-call]
        return inverse
    return _by_doubling(strictly_lower) if _tracing() else _by_blocks(strictly_lower)


class _UnitLowerInverse(torch.autograd.Function):
    """Its gradient is ``-Xᵀ G Xᵀ``, two products in place of those of every step."""

    @staticmethod
    def forward(ctx: Any, strictly_lower: Tensor) -> Tensor:  # noqa: ANN401 - PyTorch's own type
        """See :func:`unit_lower_inverse`."""
        inverse = _by_blocks(strictly_lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ANN401
        """Differentiable itself; of what is not strictly lower, zero."""
        transposed: Tensor = ctx.saved_tensors[0].transpose(-1, -2)
        return -(transposed @ grads[0] @ transposed).tril(-1)


def _by_blocks(strictly_lower: Tensor) -> Tensor:
    """Both halves of the diagonal at once, and below them ``-D⁻¹ N A⁻¹``: no product of zeros."""
    size = strictly_lower.shape[-1]
    half = size // 2
    if size <= _BLOCK or size % 2:
        return _by_doubling(strictly_lower)
    above, below = strictly_lower.split(half, dim=-2)
    upper, lower = _by_blocks(torch.stack([above[..., :half], below[..., half:]]))
    inverse = torch.zeros_like(strictly_lower)
    inverse[..., :half, :half] = upper
    inverse[..., half:, half:] = lower
    inverse[..., half:, :half] = -(lower @ (below[..., :half] @ upper))
    return inverse


def _by_doubling(strictly_lower: Tensor) -> Tensor:
    size = strictly_lower.shape[-1]
    index = torch.arange(size, device=strictly_lower.device)
    row, column = index[:, None], index[None, :]
    identity = torch.eye(size, dtype=strictly_lower.dtype, device=strictly_lower.device)
    inverse = identity - strictly_lower * _below(row, column, 1)  # of blocks of two
    half = 2
    while half < size:
        inverse = inverse - inverse @ (strictly_lower * _below(row, column, half)) @ inverse
        half *= 2
    return inverse


def _below(row: Tensor, column: Tensor, half: int) -> Tensor:
    """Where the lower left quarters of diagonal blocks of ``2 half`` are, ``(C, C)``."""
    return (row // (2 * half) == column // (2 * half)) & (row // half > column // half)


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

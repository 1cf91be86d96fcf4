"""The exact linear memory in the parts that an exported loop needs: before it, and one round.

Computes :func:`titans_export.memory.linear.tile_form`, for graphs: nothing depends on values, any number of
tokens is cut into whole tiles, and tokens that are missing from the last one leave the memory alone.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from titans_export.memory.linear import segment_products, unit_lower_inverse
from titans_export.recurrence import Alignment, Tensors, align, into_tiles

TILE_PARTS: Final = {
    "own": "row",  # (I + N)⁻¹ θ V
    "seen_memory": "row",  # times M_0, is subtracted from it
    "seen_momentum": "row",  # times S_0, likewise
    "asked_memory": "row",  # p ∘ Q
    "asked_momentum": "row",  # r ∘ Q
    "attention": "square",  # W ∘ Q Kᵀ
    "write_memory": "column",  # Kᵀ diag(W[C,:])
    "write_momentum": "column",  # Kᵀ diag(E[C,:])
    "keep": "scalar",  # p_C
    "move": "scalar",  # r_C
    "decay": "scalar",  # c_C
}
"""What a tile gives to its round, by name.

``row (B, H, C, D)``, ``square (B, H, C, C)``, ``column (B, H, D, C)``, ``scalar (B, H, 1, 1)``.
"""


def cut_from_start(like: Tensor, tile: int) -> Alignment:
    """Cut streams ``(B, H, T, …)`` into tiles whose first begins with the first token.

    As :func:`align` cuts them, a tile too many included: a count that might be 1 is beyond the tracer.
    """
    return align(torch.zeros(like.shape[0], dtype=torch.int64, device=like.device), like.shape[2], tile)


def tile_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_retention: Tensor,
    log_momentum: Tensor,
    step: Tensor,
    edit: Tensor,
    *,
    tile: int,
) -> Tensors:
    """All that does not depend on the memory, tiles first: :data:`TILE_PARTS`, and which tokens are there."""
    cut = cut_from_start(query, tile)
    live = cut.live[:, :, None]  # (N, B, 1, C)
    q, k, v = (into_tiles(x, cut) for x in (query, key, value))  # (N, B, H, C, D)
    log_a, log_eta, theta = (
        torch.where(live, into_tiles(x, cut), 0.0)[..., None] for x in (log_retention, log_momentum, step)
    )
    # A missing token keeps everything: its gates are open, and momentum does not enter the memory there.
    retention = segment_products(log_a) * live[..., None, :].to(log_a.dtype)  # A
    momentum = segment_products(log_eta)  # E
    write = retention @ momentum  # W
    p, c = log_a.cumsum(-2).exp(), log_eta.cumsum(-2).exp()
    r = retention @ c
    keys = k.transpose(-1, -2)
    rate = edit[:, None, None, None] * theta
    inverse = unit_lower_inverse(rate * _one_row_down(write, 0.0) * (k @ keys))
    return (
        inverse @ (theta * v),
        inverse @ (rate * _one_row_down(p, 1.0) * k),
        inverse @ (rate * _one_row_down(r, 0.0) * k),
        p * q,
        r * q,
        write * (q @ keys),
        keys * write[..., -1:, :],
        keys * momentum[..., -1:, :],
        p[..., -1:, :],
        r[..., -1:, :],
        c[..., -1:, :],
        cut.live,
    )


def tile_step(
    own: Tensor,
    seen_memory: Tensor,
    seen_momentum: Tensor,
    asked_memory: Tensor,
    asked_momentum: Tensor,
    attention: Tensor,
    write_memory: Tensor,
    write_momentum: Tensor,
    keep: Tensor,
    move: Tensor,
    decay: Tensor,
    memory: Tensor,
    momentum: Tensor,
) -> Tensors:
    """One tile: ``Y (B, H, C, D)``, ``M_C`` and ``S_C``, from its parts and ``M_0``, ``S_0 (B, H, D, D)``."""
    u = own - seen_memory @ memory - seen_momentum @ momentum
    y = asked_memory @ memory + asked_momentum @ momentum + attention @ u
    return y, keep * memory + move * momentum + write_memory @ u, decay * momentum + write_momentum @ u


def _one_row_down(x: Tensor, first: float) -> Tensor:
    """Row ``t`` becomes what row ``t - 1`` was; row 0 becomes ``first``."""
    return torch.cat([torch.full_like(x[..., :1, :], first), x[..., :-1, :]], dim=-2)

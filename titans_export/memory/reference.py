"""The memory rule as a loop over tokens: slow, obvious, the oracle of every test."""

from __future__ import annotations

import torch
from torch import Tensor

MemoryOutput = tuple[Tensor, Tensor, Tensor]


def token_loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_retention: Tensor,
    log_momentum: Tensor,
    step: Tensor,
    edit: Tensor,
    past_memory: Tensor,
    past_momentum: Tensor,
) -> MemoryOutput:
    """One token after the other (arXiv 2501.00663, equations 9, 10 and 13, with edit strength ``λ``)::

        e_t = v_t - λ M_{t-1}ᵀ k_t
        S_t = η_t S_{t-1} + θ_t k_t e_tᵀ
        M_t = a_t M_{t-1} + S_t
        y_t = M_tᵀ q_t

    Arguments, shapes and results are those of :func:`titans_export.memory.neural_memory`.
    """
    memory, momentum = past_memory, past_momentum
    strength = edit[:, None, None]  # (B, 1, 1)
    outputs = []
    for t in range(query.shape[2]):
        k, v = key[:, :, t], value[:, :, t]  # (B, H, D)
        retention = log_retention[:, :, t, None, None].exp()
        decay = log_momentum[:, :, t, None, None].exp()
        error = v - strength * read(memory, k)
        momentum = decay * momentum + step[:, :, t, None, None] * k[..., :, None] * error[..., None, :]
        memory = retention * memory + momentum
        outputs.append(read(memory, query[:, :, t]))
    return torch.stack(outputs, dim=2), memory, momentum


def read(memory: Tensor, key: Tensor) -> Tensor:
    """``Mᵀ k`` for every batch row and head: ``(B, H, Dk, Dv), (B, H, Dk) → (B, H, Dv)``."""
    return torch.einsum("bhkv,bhk->bhv", memory, key)

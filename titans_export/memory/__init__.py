"""The mathematics of the memory and nothing else: the rule, its fast forms, its oracle."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from titans_export.memory.linear import tile_form
from titans_export.memory.output import MemoryOutput
from titans_export.memory.reference import token_loop

MemoryRule = Callable[..., MemoryOutput]
"""Anything with the contract of :func:`neural_memory`."""


def neural_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_retention: Tensor,
    log_momentum: Tensor,
    step: Tensor,
    edit: Tensor,
    past_memory: Tensor,
    past_momentum: Tensor,
    *,
    tile: int = 32,
) -> MemoryOutput:
    """The operator ``titans::NeuralMemory`` version 1 as a PyTorch function.

    Retrieve from and edit a linear memory, exactly per token (arXiv 2501.00663, equations 9, 10, 13).

    Args:
        query: ``(B, H, T, Dk)``.
        key: ``(B, H, T, Dk)``, L2-normalised for a stable rule.
        value: ``(B, H, T, Dv)``.
        log_retention: ``(B, H, T)``, ``log a_t ≤ 0``; ``-inf`` forgets everything.
        log_momentum: ``(B, H, T)``, ``log η_t ≤ 0``; ``-inf`` has no momentum.
        step: ``(B, H, T)``, ``θ_t ≥ 0``.
        edit: ``(B,)``, ``λ`` in [0, 1]: 0 is a plain gated state-space model, 1 the full gradient step.
        past_memory: ``(B, H, Dk, Dv)``, ``M_0``.
        past_momentum: ``(B, H, Dk, Dv)``, ``S_0``.
        tile: tokens taken at once for ``T > 1``; changes rounding only.

    Returns:
        ``output (B, H, T, Dv)``, ``present_memory`` and ``present_momentum (B, H, Dk, Dv)``.
    """
    past = (past_memory, past_momentum)
    gates = (log_retention, log_momentum, step, edit)
    if query.shape[2] == 1:  # the rule as it is written
        return token_loop(query, key, value, *gates, *past)
    return tile_form(query, key, value, *gates, *past, tile)


__all__ = ["MemoryOutput", "MemoryRule", "neural_memory", "token_loop"]

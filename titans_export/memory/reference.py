"""The memory rule as a loop over tokens: slow, obvious, the oracle of every test."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_export.memory.deep import PeriodicMemory, pack, unpack
from titans_export.memory.mlp import between
from titans_export.memory.mlp import read as read_memory
from titans_export.memory.output import MemoryOutput
from titans_export.memory.tiles import MemoryForm, MemoryState
from titans_export.recurrence import Core, Tensors


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


def reference_recurrence(
    core: Core, position: Tensor, tokens: Tensors, carry: Tensors, shared: Tensors
) -> tuple[Tensor, Tensors]:
    """The contract of :func:`titans_export.recurrence.run_core`, one token after the other.

    A memory with a gradient period takes its gradients from autograd; other cores take their one-token
    form, which has no tiles.
    """
    outputs = []
    for t in range(tokens[0].shape[2]):
        token = tuple(x[:, :, t : t + 1] for x in tokens)
        if isinstance(core, PeriodicMemory):
            y, carry = _periodic_token(core.form, position + t, token, carry, shared)
        else:
            y, carry = core.one(token, (position + t) % core.tile, carry, shared)
        outputs.append(y)
    return torch.cat(outputs, dim=2), carry


def _periodic_token(
    form: MemoryForm, position: Tensor, token: Tensors, carry: Tensors, shared: Tensors
) -> tuple[Tensor, Tensors]:
    """Section 6 of ``docs/mathematics.md`` as it stands there, the gradient by autograd::

    ∇   = ∂/∂M ½‖f_M(k_t) - v_t‖²   at  λ M_b + (1 - λ) M_ref,  M_b as the period began
    S_t = η_t S_{t-1} - θ_t ∇
    M_t = a_t M_{t-1} + S_t
    y_t = f_{M_t}(q_t)
    """
    query, key, value, log_retention, step, *log_momentum = token
    edit, *reference = shared
    state = unpack(form, carry)
    begins = (position % form.period == 0)[:, None, None, None]
    anchor = (
        state.memory
        if form.period == 1
        else tuple(torch.where(begins, m, old) for m, old in zip(state.memory, state.anchor, strict=True))
    )
    points = between(tuple(reference), anchor, edit)
    with torch.enable_grad():
        variables = [point.detach().requires_grad_() for point in points]
        loss = 0.5 * (read_memory(tuple(variables), key, form.depth) - value).square().sum()
        gradients = torch.autograd.grad(loss, variables)
    retention, rate = log_retention[..., None].exp(), step[..., None]
    writes = tuple(-rate * gradient for gradient in gradients)
    if log_momentum:
        decay = log_momentum[0][..., None].exp()
        writes = tuple(decay * s + write for s, write in zip(state.momentum, writes, strict=True))
    memory = tuple(retention * m + write for m, write in zip(state.memory, writes, strict=True))
    present = MemoryState(memory, writes if form.momentum else (), anchor if form.period > 1 else ())
    return read_memory(memory, query, form.depth), pack(present)

"""What a memory is: a matrix, or an MLP with a residual connection and a LayerNorm.

``f_M(x) = x W`` for depth 0, else ``f_M(x) = x + LayerNorm(φ(… φ(x W¹) …) Wᴸ)`` with ``φ`` the exact
GELU (arXiv 2501.00663, section 3.1, and the residual normalised form of test-time-training layers).
The gradient of ``½‖f_M(k) - v‖²`` with respect to a layer's weights is an outer product of that
layer's input and the error at its output, so nothing larger than tokens by width is ever built.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = tuple[Tensor, ...]
"""One tensor ``(B, H, in, out)`` a layer of the memory."""

NORM_EPS = 1e-3
"""In the LayerNorm: the weights may decay to zero, and its gradient must not explode there."""


def layer_shapes(depth: int, expansion: int, head_dim: int) -> list[tuple[int, int]]:
    """``(in, out)`` of every layer: one matrix, or ``depth`` layers ``expansion * head_dim`` wide inside."""
    widths = [head_dim, *[expansion * head_dim] * (depth - 1), head_dim]
    return list(itertools.pairwise(widths)) if depth else [(head_dim, head_dim)]


def read(weights: Weights, x: Tensor, depth: int) -> Tensor:
    """``f_M(x)``: ``(B, H, T, D) → (B, H, T, D)``."""
    z = x @ weights[0]
    for weight in weights[1:]:
        z = F.gelu(z) @ weight
    return output(x, z, depth)


def output(x: Tensor, z: Tensor, depth: int) -> Tensor:
    """What the memory answers, from its input and its last layer's product."""
    return x + normalise(z) if depth else z


def normalise(z: Tensor) -> Tensor:
    """LayerNorm over the last axis, without weights."""
    return F.layer_norm(z, z.shape[-1:], eps=NORM_EPS)


def errors(weights: Weights, key: Tensor, value: Tensor, depth: int) -> tuple[list[Tensor], list[Tensor]]:
    """Forward and backward pass of ``½‖f_M(k) - v‖²`` for every token on its own.

    Args:
        weights: where the gradient is taken.
        key: ``(B, H, T, D)``.
        value: ``(B, H, T, D)``.
        depth: of the memory.

    Returns:
        Inputs ``hˡ⁻¹`` and errors ``δˡ`` of every layer: the gradient of token ``t`` with respect to
        ``Wˡ`` is ``hˡ⁻¹_t δˡ_tᵀ``.
    """
    inputs, products = [key], [key @ weights[0]]
    for weight in weights[1:]:
        inputs.append(F.gelu(products[-1]))
        products.append(inputs[-1] @ weight)
    error = output(key, products[-1], depth) - value
    if depth:
        error = _through_norm(products[-1], error)
    deltas = [error]
    for weight, product in zip(reversed(weights[1:]), reversed(products[:-1]), strict=True):
        deltas.append(deltas[-1] @ weight.transpose(-1, -2) * gelu_slope(product))
    return inputs, deltas[::-1]


def _through_norm(z: Tensor, error: Tensor) -> Tensor:
    """Error at ``z`` from the error at ``LayerNorm(z)``."""
    centred = z - z.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
    normal = centred * scale
    along = (error * normal).mean(-1, keepdim=True)
    return scale * (error - error.mean(-1, keepdim=True) - normal * along)


def gelu_slope(x: Tensor) -> Tensor:
    """``Φ(x) + x φ(x)``, the derivative of the exact GELU."""
    below = 0.5 * (1.0 + torch.erf(x * 0.5**0.5))
    density = torch.exp(-0.5 * x.square()) * 0.3989422804014327
    return below + x * density


def between(reference: Sequence[Tensor], memory: Weights, edit: Tensor) -> Weights:
    """Where the gradient is taken: ``λ M + (1 - λ) M_ref``.

    With ``λ = 1`` at the memory itself: gradient descent. With ``λ = 0`` at the fixed reference, so
    that what is written does not depend on what was written before: a state-space model. The
    reference of a matrix is zero, which gives the error ``v - λ Mᵀ k``.
    """
    strength = edit[:, None, None, None]
    if not reference:
        return tuple(strength * weight for weight in memory)
    return tuple(fixed + strength * (weight - fixed) for fixed, weight in zip(reference, memory, strict=True))

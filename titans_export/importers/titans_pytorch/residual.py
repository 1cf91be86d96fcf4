"""Hyper-connections: residual streams that doubly stochastic matrices mix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans_export.importers.titans_pytorch.lengths import length

ITERATIONS = 20
_SMALLEST = 1e-12


class Mixed(NamedTuple):
    """What a connection makes of its streams.

    Attributes:
        branch: ``(B, E, dim)``, what the branch is given.
        streams: ``(B, E, s, dim)``, to which its answer is added, where it is.
        weight: ``(B, E, s, 1)``, how much of the answer each stream takes; None where there is one stream.
    """

    branch: Tensor
    streams: Tensor
    weight: Tensor | None

    def added(self, answer: Tensor) -> Tensor:
        """The streams after the branch."""
        own = answer[:, :, None]
        return self.streams + (own if self.weight is None else own * self.weight)


class HyperConnection(nn.Module):
    """With ``X`` the streams, ``x̂_s`` each at unit length::

        A = x̂ W + A₀ ;  branch = Σ_s σ(A_s0) X_s ;  X ← R X + 2 σ(A_s,-1) · answer
        R = sinkhorn(A_s,1…s)ᵀ, doubly stochastic

    ``W`` is the library's ``dynamic_alpha_fn`` and ``dynamic_beta_fn`` with norm and scales multiplied in.
    """

    def __init__(self, streams: int, dim: int, adds: bool = True) -> None:
        """``adds``: whether the branch's answer goes back to the streams."""
        super().__init__()
        self.streams, self.adds = streams, adds
        self.sinkhorn = sinkhorn  # an exporter puts an operator here
        columns = 1 + streams + adds
        self.weight = nn.Parameter(torch.zeros(dim, columns))
        self.static = nn.Parameter(torch.zeros(streams, columns))

    def forward(self, x: Tensor) -> Mixed:
        """``(B, E, s, dim)``."""
        mix = (x @ self.weight) / length(x, (-1,), _SMALLEST, keepdim=True) + self.static
        branch = (torch.sigmoid(mix[..., :1]) * x).sum(2)
        if not self.adds:
            return Mixed(branch, x, None)
        stochastic = self.sinkhorn(mix[..., 1 : 1 + self.streams], ITERATIONS)
        return Mixed(branch, stochastic.mT @ x, 2.0 * torch.sigmoid(mix[..., -1:]))


class SingleStream(nn.Module):
    """What stands in its place where there is one stream."""

    def __init__(self, adds: bool = True) -> None:
        """``adds``: whether the branch's answer goes back to the stream."""
        super().__init__()
        self.adds = adds

    def forward(self, x: Tensor) -> Mixed:
        """``(B, E, 1, dim)``."""
        return Mixed(x.squeeze(2), x, None)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """``exp`` of ``(…, s, s)``, its columns and rows divided by their sums in turn.

    Kept as the matrix and a factor for each row and column: ``u_i K_ij v_j``.
    """
    kernel = logits.softmax(-2)  # the columns have been divided once
    row = 1.0 / kernel.sum(-1, keepdim=True)
    column = torch.ones_like(kernel[..., :1, :])
    for _ in range(iterations - 1):
        column = 1.0 / (kernel * row).sum(-2, keepdim=True)
        row = 1.0 / (kernel * column).sum(-1, keepdim=True)
    return kernel * row * column

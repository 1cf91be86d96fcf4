"""The networks that titans-pytorch has for a memory, each with the gradient of its weights written out.

``W`` are weights ``(…, H, in, out)``, vectors ``(…, H, D)``; ``x`` is ``(…, H, T, D)``. A gradient is summed
over the tokens, so it has the shape of the weights and nothing of size ``T × |W|`` is ever built.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = tuple[Tensor, ...]
Backward = Callable[[Tensor], tuple[Tensor | None, Weights]]
"""From the error at the output to that at the input (None where nobody asks) and the weights' gradients."""

_NORM_EPS = 1e-5  # of torch.nn.LayerNorm
_ROOT = math.sqrt(0.5)
_LOG_DENSITY = math.log(2 / math.sqrt(math.pi))  # of the derivative of erf at 0


class Network(Protocol):
    """A memory's network: shapes of its weights in the library's order, and the two passes."""

    def shapes(self) -> list[tuple[int, ...]]:
        """Of one head."""
        ...

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """``f(W; x)``."""
        ...

    def forward(self, weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        """``f(W; x)``, and the way back."""
        ...


@dataclass(frozen=True)
class Mlp:
    """``MemoryMLP``: matrices with GELU between them."""

    dim: int
    depth: int
    expansion_factor: float = 2.0

    def shapes(self) -> list[tuple[int, ...]]:
        """See :class:`Network`, here and below."""
        hidden = int(self.dim * self.expansion_factor)
        widths = [self.dim, *[hidden] * (self.depth - 1), self.dim]
        return [*itertools.pairwise(widths)]

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """The matrices in turn."""
        return _chain(weights, x, step=1)

    def forward(self, weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        """The matrices in turn."""
        return _chain_forward(weights, x, step=1)


@dataclass(frozen=True)
class FactorizedMlp:
    """``FactorizedMemoryMLP``: products of two thin matrices, with GELU between the products."""

    dim: int
    depth: int
    k: int = 32

    def shapes(self) -> list[tuple[int, ...]]:
        """See :class:`Network`, here and below."""
        return [(self.dim, self.k), (self.k, self.dim)] * self.depth

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """The matrices in turn."""
        return _chain(weights, x, step=2)

    def forward(self, weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        """The matrices in turn."""
        return _chain_forward(weights, x, step=2)


@dataclass(frozen=True)
class SwiGluMlp:
    """``MemorySwiGluMLP``: gated layers with residual connections, normalised at the end."""

    dim: int
    depth: int = 1
    expansion_factor: float = 4.0

    def shapes(self) -> list[tuple[int, ...]]:
        """See :class:`Network`, here and below."""
        inner = int(self.dim * self.expansion_factor * 2 / 3)
        return [*[(self.dim, 2 * inner), (inner, self.dim)] * self.depth, (self.dim,)]

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """``x + (a ⊙ gelu(b)) W₂`` with ``a, b = x W₁``, layer after layer."""
        *matrices, gamma = weights
        for first, second in zip(matrices[::2], matrices[1::2], strict=True):
            a, b = (x @ first).chunk(2, dim=-1)
            x = x + (a * F.gelu(b)) @ second
        return _scaled(_layer_norm(x), gamma)

    def forward(self, weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        """The same, and back."""
        *matrices, gamma = weights
        saved = []
        for first, second in zip(matrices[::2], matrices[1::2], strict=True):
            a, b = (x @ first).chunk(2, dim=-1)
            active, slope = gelu_and_slope(b)
            hidden = a * active
            saved.append((x, a, active, slope, hidden))
            x = x + hidden @ second
        y, norm_back = _norm_forward(x, gamma)

        def backward(error: Tensor) -> tuple[Tensor | None, Weights]:
            error, gamma_gradient = norm_back(error)
            gradients: list[Tensor] = [gamma_gradient]
            for layer in reversed(range(self.depth)):
                first, second = matrices[2 * layer], matrices[2 * layer + 1]
                before, a, active, slope, hidden = saved[layer]
                second_gradient = _outer(hidden, error)
                inside = error @ second.mT
                both = torch.cat([inside * active, inside * a * slope], dim=-1)
                gradients = [_outer(before, both), second_gradient, *gradients]
                error = error + both @ first.mT
            return error, tuple(gradients)

        return y, backward


@dataclass(frozen=True)
class GatedResidualMlp:
    """``GatedResidualMemoryMLP``: a layer moves its input towards an MLP's answer, as a gate says."""

    dim: int
    depth: int
    expansion_factor: float = 4.0

    def shapes(self) -> list[tuple[int, ...]]:
        """The last projection stands first, as ``named_parameters`` has it."""
        hidden = int(self.dim * self.expansion_factor)
        layer = [(self.dim, hidden), (hidden, self.dim), (2 * self.dim, self.dim)]
        return [(self.dim, self.dim), *layer * self.depth]

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """``x ← x + σ([branch, x] W_g) (branch - x)`` with ``branch = gelu(x W₁) W₂``."""
        last, *matrices = weights
        for layer in range(self.depth):
            first, second, gate = matrices[3 * layer : 3 * layer + 3]
            branch = F.gelu(x @ first) @ second
            x = x + torch.sigmoid(torch.cat([branch, x], dim=-1) @ gate) * (branch - x)
        return x @ last

    def forward(self, weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        """The same, and back."""
        last, *matrices = weights
        saved = []
        for layer in range(self.depth):
            first, second, gate = matrices[3 * layer : 3 * layer + 3]
            hidden, slope = gelu_and_slope(x @ first)
            branch = hidden @ second
            both = torch.cat([branch, x], dim=-1)
            open_ = torch.sigmoid(both @ gate)
            saved.append((x, hidden, slope, branch, both, open_))
            x = x + open_ * (branch - x)

        def backward(error: Tensor) -> tuple[Tensor | None, Weights]:
            gradients: list[Tensor] = []
            last_gradient, error = _outer(x, error), error @ last.mT
            for layer in reversed(range(self.depth)):
                first, second, gate = matrices[3 * layer : 3 * layer + 3]
                before, hidden, slope, branch, both, open_ = saved[layer]
                at_gate = error * (branch - before) * open_ * (1 - open_)
                through_gate = at_gate @ gate.mT
                at_branch = error * open_ + through_gate[..., : self.dim]
                inside = at_branch @ second.mT * slope
                gradients = [
                    _outer(before, inside),
                    _outer(hidden, at_branch),
                    _outer(both, at_gate),
                    *gradients,
                ]
                error = error * (1 - open_) + through_gate[..., self.dim :] + inside @ first.mT
            return error, (last_gradient, *gradients)

        return x @ last, backward


@dataclass(frozen=True)
class ResidualNorm:
    """``f(W; x) = x + (γ + 1) ⊙ LayerNorm(inner(x))``, what the library puts around a memory's network."""

    inner: Mlp | FactorizedMlp | SwiGluMlp | GatedResidualMlp

    @property
    def dim(self) -> int:
        """Width of input and output."""
        return self.inner.dim

    def shapes(self) -> list[tuple[int, ...]]:
        """``γ`` first."""
        return [(self.dim,), *self.inner.shapes()]

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """See the class."""
        gamma, *rest = weights
        return x + _scaled(_layer_norm(self.inner.read(tuple(rest), x)), gamma)

    def forward(self, weights: Weights, x: Tensor) -> tuple[Tensor, Backward]:
        """See the class."""
        gamma, *rest = weights
        z, back = self.inner.forward(tuple(rest), x)
        y, norm_back = _norm_forward(z, gamma)

        def backward(error: Tensor) -> tuple[Tensor | None, Weights]:
            at_z, gamma_gradient = norm_back(error)
            _, gradients = back(at_z)
            return None, (gamma_gradient, *gradients)

        return x + y, backward


NETWORKS: dict[str, type[Mlp | FactorizedMlp | SwiGluMlp | GatedResidualMlp]] = {
    "MemoryMLP": Mlp,
    "FactorizedMemoryMLP": FactorizedMlp,
    "MemorySwiGluMLP": SwiGluMlp,
    "GatedResidualMemoryMLP": GatedResidualMlp,
}
"""By the library's names."""


def build(spec: dict[str, Any], residual_norm: bool) -> Network:
    """The network of a specification ``{"class": name, argument: value, …}``."""
    arguments = {name: value for name, value in spec.items() if name != "class"}
    inner = NETWORKS[spec["class"]](**arguments)
    return ResidualNorm(inner) if residual_norm else inner


def gradient(network: Network, weights: Weights, key: Tensor, value: Tensor, step: Tensor) -> Weights:
    """``∇_W Σ_t θ_t · mean_d (f(W; k_t) - v_t)²``.

    Args:
        network: of the memory.
        weights: where the gradient is taken.
        key: ``(…, H, T, D)``.
        value: likewise.
        step: ``θ (…, H, T)``.
    """
    answer, backward = network.forward(weights, key)
    error = (answer - value) * (step * (2.0 / key.shape[-1]))[..., None]
    return backward(error)[1]


def gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """The exact GELU ``x Φ(x)`` and its derivative ``Φ(x) + x φ(x)``."""
    below = 0.5 + 0.5 * torch.erf(x * math.sqrt(0.5))
    density = torch.exp(-0.5 * (x * x)) * (1 / math.sqrt(2 * math.pi))
    return x * below, below + x * density


def _doubled_gelu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """``√2 gelu(√2 z) = z (1 + erf z)``, and twice the slope of GELU there."""
    twice_below = torch.erf(z) + 1.0
    return z * twice_below, twice_below + z * torch.exp(_LOG_DENSITY - z * z)


def _chain(weights: Weights, x: Tensor, step: int) -> Tensor:
    for index, weight in enumerate(weights):
        if index and index % step == 0:
            x = F.gelu(x)
        x = x @ weight
    return x


def _chain_forward(weights: Weights, x: Tensor, step: int) -> tuple[Tensor, Backward]:
    """Matrices in turn, with a GELU before every ``step``-th, the first excepted.

    There are as few operators as can be over what is widest, between the matrices: factors of GELU and its
    slope go to the matrices. With ``z = x √½`` what stands for ``gelu(x)`` is ``√2`` times that.
    """
    inputs: list[Tensor] = []
    slopes: list[Tensor | None] = []
    for index, weight in enumerate(weights):
        slope = None
        if index and index % step == 0:
            x, slope = _doubled_gelu_and_slope(x)
            weight = weight * _ROOT  # noqa: PLW2901
        if (index + 1) % step == 0 and index + 1 < len(weights):
            weight = weight * _ROOT  # noqa: PLW2901
        inputs.append(x)
        slopes.append(slope)
        x = x @ weight

    def backward(error: Tensor) -> tuple[Tensor | None, Weights]:
        gradients: list[Tensor] = []
        for index in reversed(range(len(weights))):
            weight, slope = weights[index], slopes[index]
            if slope is not None:
                error, weight = error * _ROOT, weight * _ROOT
            gradients.insert(0, _outer(inputs[index], error))
            if index:
                error = error @ weight.mT
                error = error if slope is None else error * slope
        return None, tuple(gradients)

    return x, backward


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_NORM_EPS)


def _scaled(x: Tensor, gamma: Tensor) -> Tensor:
    return x * (gamma[..., None, :] + 1.0)


def _norm_forward(x: Tensor, gamma: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """``(γ + 1) ⊙ LayerNorm(x)``, and from the error there to that at ``x`` and the gradient of ``γ``."""
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + _NORM_EPS)
    normal = centred * scale

    def backward(error: Tensor) -> tuple[Tensor, Tensor]:
        gradient = (error * normal).sum(-2)
        inside = error * (gamma[..., None, :] + 1.0)
        along = (inside * normal).mean(-1, keepdim=True)
        return scale * (inside - inside.mean(-1, keepdim=True) - normal * along), gradient

    return _scaled(normal, gamma), backward


def _outer(x: Tensor, error: Tensor) -> Tensor:
    """``Σ_t x_t δ_tᵀ``."""
    return x.mT @ error

"""The parts of a layer: norms, gates, causal convolution, feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """``x / √(mean x² + ε) ⊙ weight`` over the last axis, with one ``ε`` for every dtype."""

    def __init__(self, dim: int) -> None:
        """``dim``: width of the last axis."""
        super().__init__(dim, eps=1e-6)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """:class:`RMSNorm` with a weight that stands elsewhere."""
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Unit length over the last axis; ``ε`` inside the root keeps a zero vector zero.

    ``x / √(Σ x² + ε)``, written as an RMS norm with a constant weight: one operator when exported.
    """
    dim = x.shape[-1]
    return F.rms_norm(x, (dim,), x.new_full((dim,), dim**-0.5), eps / dim)


def log_sigmoid(x: Tensor) -> Tensor:
    """``log σ(x)``, exact where the gate is almost open: ``log`` of a rounded ``σ`` is not."""
    return -F.softplus(-x)


class CausalConv(nn.Module):
    """Depthwise causal convolution over tokens, with its past inputs as explicit state.

    Written as a convolution of images one row high: for those, PyTorch and ONNX Runtime have fast
    depthwise kernels on tokens-by-channels data, which they lack for sequences.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        """``channels``: convolved one by one; ``kernel``: taps, the current token included."""
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(kernel, channels))
        nn.init.normal_(self.weight, std=0.1)
        with torch.no_grad():
            self.weight[-1] += 1.0  # begins as the identity on the current token

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """``x (B, T, C)`` and ``past (B, kernel - 1, C)`` → the same two shapes."""
        window = torch.cat([past, x], dim=1)
        image = window[:, None].permute(0, 3, 1, 2)  # (B, C, 1, T + kernel - 1)
        weight = self.weight.t()[:, None, None]  # (C, 1, 1, kernel)
        output = F.conv2d(image, weight, groups=self.weight.shape[1])
        return output.permute(0, 2, 3, 1).squeeze(1), window[:, 1 - self.kernel :]


class FeedForward(nn.Module):
    """``W₂ gelu(W₁ x)``."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        """``d_ff``: inner width."""
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, d_model) → (B, T, d_model)``."""
        hidden: Tensor = self.down(F.gelu(self.up(x)))
        return hidden

"""S4D ("On the Parameterization and Initialization of Diagonal State Space Models", arXiv 2206.11893).

A diagonal, time-invariant state-space model for each channel, run as one long convolution, to which a
state of the past adds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.experiments.contestants.network import Mixer, State

_LEAST, _MOST = 1e-3, 1e-1  # of the step Δ, log-uniform, as in the paper


class DiagonalStateSpace(Mixer):
    """``K_l = 2 Re Σ_n C_n (e^{Δ A_n} - 1) / A_n · e^{Δ A_n l}``, ``y = K ∗ x + D x``, then a gated product.

    ``A_n = -½ + i π n`` to begin with (S4D-Lin), discretised by zero-order hold; ``B = 1``.
    """

    def __init__(self, width: int, states: int) -> None:
        """``states``: complex numbers of a channel's state, conjugates counted."""
        super().__init__()
        half = states // 2
        self.log_step = nn.Parameter(math.log(_LEAST) + torch.rand(width) * math.log(_MOST / _LEAST))
        self.log_decay = nn.Parameter(torch.full((width, half), math.log(0.5)))
        self.frequency = nn.Parameter((math.pi * torch.arange(half)).repeat(width, 1))
        self.mix = nn.Parameter(torch.randn(width, half, 2) * 0.5**0.5)
        self.direct = nn.Parameter(torch.randn(width))
        self.out_projection = nn.Linear(width, 2 * width)

    def initial_state(self, batch: int) -> State:
        """``h (B, width, states / 2)`` as pairs of real numbers."""
        return {"state": torch.zeros(batch, *self.mix.shape)}

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """``h_t = e^{Δ A} h_{t-1} + (e^{Δ A} - 1) / A · x_t``; see :class:`Mixer`."""
        length, past = x.shape[1], torch.view_as_complex(state["state"])
        rate = torch.complex(-self.log_decay.exp(), self.frequency)
        stepped = rate * self.log_step.exp()[:, None]  # Δ A
        moved, mix = stepped.exp(), torch.view_as_complex(self.mix)
        write = (moved - 1) / rate
        powers = torch.exp(stepped[..., None] * torch.arange(length))  # of 0 … length - 1
        kernel = 2 * ((mix * write)[:, None] @ powers).real[:, 0]
        channels = x.transpose(1, 2)
        spectrum = torch.fft.rfft(kernel, 2 * length) * torch.fft.rfft(channels, 2 * length)
        y = torch.fft.irfft(spectrum, 2 * length)[..., :length] + self.direct[:, None] * channels
        y = y + 2 * torch.einsum("bdn,dnt->bdt", mix * moved * past, powers).real
        written = torch.einsum("bdt,dnt->bdn", channels.to(powers.dtype), powers.flip(-1))
        present = (length * stepped).exp() * past + write * written
        mixed = F.glu(self.out_projection(F.gelu(y).transpose(1, 2)), dim=-1)
        return mixed, {"state": torch.view_as_real(present)}

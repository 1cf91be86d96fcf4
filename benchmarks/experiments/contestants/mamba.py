"""Mamba (Gu and Dao, arXiv 2312.00752), its selective scan S6 included, in plain PyTorch for CPUs.

The block of section 3.4: projection to twice the inner width, causal convolution of four taps, SiLU, the
selective scan with ``Δ``, ``B`` and ``C`` from the token, a gate, projection back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.experiments.contestants.network import Mixer, State, scaled
from titans_export.layers import CausalConv

_CHUNK = 256
"""Tokens whose states are held at once."""
_TAPS = 4
_LEAST, _MOST = 1e-3, 1e-1  # of Δ to begin with, as in the paper


class _SelectiveScan(torch.autograd.Function):
    """The recurrence with its gradient by hand, token by token: every pass is over states in cache.

    With ``g_t = ∂y_t C_t + e^{Δ_{t+1} A} g_{t+1}``, the gradient by ``h_t``.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - PyTorch's own type
        x: Tensor,
        step: Tensor,
        rate: Tensor,
        write: Tensor,
        read: Tensor,
        first: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``y (T, B, D)`` and the last state ``(B, N, D)``; ``rate (N, D)``, others begin with ``T``."""
        states = x.new_empty(len(x) + 1, *first.shape)
        states[0] = first
        outputs = torch.empty_like(x)
        written = step * x
        decay = torch.empty_like(first)
        for t in range(len(x)):
            torch.mul(step[t, :, None], rate, out=decay).exp_()
            torch.mul(written[t, :, None], write[t, ..., None], out=states[t + 1])
            states[t + 1].addcmul_(decay, states[t])
            torch.bmm(read[t, :, None], states[t + 1], out=outputs[t, :, None])
        ctx.save_for_backward(x, step, rate, write, read, states)
        return outputs, states[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        """With respect to every input."""
        x, step, rate, write, read, states = ctx.saved_tensors
        by_output, g = grads[0].contiguous(), grads[1].clone()
        by_written, by_step = torch.empty_like(x), torch.empty_like(x)
        by_write, by_read, by_rate = torch.empty_like(write), torch.empty_like(read), torch.zeros_like(rate)
        written = step * x
        decay, by_exponent = torch.empty_like(g), torch.empty_like(g)
        for t in range(len(x) - 1, -1, -1):
            g.addcmul_(by_output[t, :, None], read[t, ..., None])
            torch.bmm(states[t + 1], by_output[t, ..., None], out=by_read[t, ..., None])
            torch.bmm(g, written[t, ..., None], out=by_write[t, ..., None])
            torch.bmm(write[t, :, None], g, out=by_written[t, :, None])
            g.mul_(torch.mul(step[t, :, None], rate, out=decay).exp_())
            torch.mul(g, states[t], out=by_exponent)
            torch.sum(torch.mul(by_exponent, rate, out=decay), 1, out=by_step[t])
            by_rate += by_exponent.mul_(step[t, :, None]).sum(0)
        return by_written * step, by_step + by_written * x, by_rate, by_write, by_read, g


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """``h_t = e^{Δ_t A} h_{t-1} + Δ_t B_t x_t``, ``y_t = C_t h_t``, ``A`` diagonal: algorithm 2 of the paper.

    Args:
        x: ``(B, T, D)``.
        step: ``Δ``, likewise.
        rate: ``A (D, N)``.
        write: ``B (B, T, N)``.
        read: ``C (B, T, N)``.
        state: ``h_0 (B, N, D)``: channels last, so that what is the same for all of them is read once.

    Returns:
        ``y (B, T, D)`` and the last state.
    """
    x, step, write, read = (tensor.transpose(0, 1).contiguous() for tensor in (x, step, write, read))
    outputs, by_state = [], rate.T.contiguous()
    for start in range(0, len(x), _CHUNK):
        part = slice(start, start + _CHUNK)
        y, state = _SelectiveScan.apply(x[part], step[part], by_state, write[part], read[part], state)
        outputs.append(y)
    return torch.cat(outputs).transpose(0, 1), state


class Selective(Mixer):
    """The block."""

    def __init__(self, width: int, states: int = 16, expand: int = 2, write_spread: float = 0.0) -> None:
        """``states``: ``N``; ``expand``: inner width over ``width``; ``write_spread``: see :func:`scaled`."""
        super().__init__()
        self.write_spread = write_spread
        inner, self.states, self.rank = expand * width, states, math.ceil(width / 16)
        self.in_projection = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = CausalConv(inner, _TAPS)
        self.bias = nn.Parameter(torch.empty(inner))
        for parameter in (self.convolution.weight, self.bias):  # all taps alike, as PyTorch's own begins
            nn.init.uniform_(parameter, -(_TAPS**-0.5), _TAPS**-0.5)
        self.selection = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.step_projection = nn.Linear(self.rank, inner)
        self.log_rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.direct = nn.Parameter(torch.ones(inner))
        self.out_projection = nn.Linear(inner, width, bias=False)
        self._begin_steps(inner)

    @torch.no_grad()
    def _begin_steps(self, inner: int) -> None:
        """``Δ`` is log-uniform to begin with."""
        nn.init.uniform_(self.step_projection.weight, -(self.rank**-0.5), self.rank**-0.5)
        step = torch.exp(math.log(_LEAST) + torch.rand(inner) * math.log(_MOST / _LEAST))
        self.step_projection.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus⁻¹

    def initial_state(self, batch: int) -> State:
        """The convolution's past inputs and ``h``."""
        inner = len(self.direct)
        return {
            "conv": torch.zeros(batch, self.convolution.kernel - 1, inner),
            "state": torch.zeros(batch, self.states, inner),
        }

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See :class:`Mixer`."""
        x, gate = self.in_projection(x).chunk(2, dim=-1)
        x, tail = self.convolution(x, state["conv"])
        x = F.silu(x + self.bias)
        step, write, read = self.selection(x).split([self.rank, self.states, self.states], dim=-1)
        step = F.softplus(self.step_projection(step))
        written = scaled(x, self.noise * self.write_spread)
        y, present = selective_scan(written, step, -self.log_rate.exp(), write, read, state["state"])
        mixed = self.out_projection((y + self.direct * x) * F.silu(gate))
        return mixed, {"conv": tail, "state": present}

"""What every contestant is: an embedding, something in between, a head; features apart from logits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from titans_export.layers import FeedForward, RMSNorm

SEGMENT = 256
"""Tokens of a stream that are taken at once, where questions are asked and a state can be carried."""

State = dict[str, Tensor]
"""What a recurrent network knows of the past, by name, rows first; empty if it cannot be carried."""


class Network(nn.Module, ABC):
    """A causal model of token sequences. ``head(features(tokens))`` are its logits.

    The head, the widest product, is applied where an answer is asked for only.
    """

    head: nn.Linear

    def set_noise(self, share: float) -> None:
        """``share``, 0 to 1, of the noise that this contestant is trained with; most have none.

        0 until training says otherwise, and again when it is over: an open editor takes gradients, too.
        """

    def features(self, tokens: Tensor) -> Tensor:
        """``(B, T)`` int64 → ``(B, T, width)``, from a stream's beginning; segment by segment if long."""
        state = self.initial_state(len(tokens))
        parts = []
        for part in tokens.split(SEGMENT if state else tokens.shape[1], dim=1):
            features, state = self(part, state)
            parts.append(features)
        return torch.cat(parts, dim=1)

    @abstractmethod
    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """:meth:`features` of a stream that goes on from ``state``, and the state after it."""

    @abstractmethod
    def initial_state(self, batch: int) -> State:
        """Before the first token."""


class Mixer(nn.Module, ABC):
    """What moves information from token to token: ``(B, T, width) → (B, T, width)``, causal."""

    noise = 0.0
    """See :meth:`Network.set_noise`."""

    @abstractmethod
    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Without norm and residual, which the network adds."""

    def initial_state(self, batch: int) -> State:  # noqa: ARG002
        """See :class:`Network`; nothing, unless a mixer says otherwise."""
        return {}


class Residual(Network):
    """Pre-norm residual layers: a mixer each, and a feed-forward layer where one is wanted."""

    def __init__(self, vocab_size: int, width: int, mixers: list[Mixer], d_ff: int) -> None:
        """``d_ff``: inner width of the feed-forward layers; 0 for none."""
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.mixers = nn.ModuleList(mixers)
        self.mixer_norms = nn.ModuleList(RMSNorm(width) for _ in mixers)
        self.feed_forwards = nn.ModuleList(FeedForward(width, d_ff) for _ in mixers if d_ff)
        self.feed_forward_norms = nn.ModuleList(RMSNorm(width) for _ in mixers if d_ff)
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def set_noise(self, share: float) -> None:
        """See :class:`Network`."""
        for mixer in self.mixers:
            mixer.noise = share

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """See :meth:`Network.forward`."""
        x, present = self.embedding(tokens), {}
        for layer, mixer in enumerate(self.mixers):
            prefix = f"{layer}."
            own = {name.removeprefix(prefix): past for name, past in state.items() if name.startswith(prefix)}
            mixed, after = mixer(self.mixer_norms[layer](x), own)
            present |= {prefix + name: tensor for name, tensor in after.items()}
            x = x + mixed
            if self.feed_forwards:
                x = x + self.feed_forwards[layer](self.feed_forward_norms[layer](x))
        return self.norm(x), present

    def initial_state(self, batch: int) -> State:
        """See :class:`Network`."""
        return {
            f"{layer}.{name}": tensor
            for layer, mixer in enumerate(self.mixers)
            for name, tensor in mixer.initial_state(batch).items()
        }


def scaled(written: Tensor, spread: float) -> Tensor:
    """What tokens write, ``(B, …, T, width)``, times ``e^spread`` or ``e^-spread`` at random.

    What a token writes where another one reads is noise that grows with the root of their number. A small
    write among all others reads like a plain one among ``e^(2 spread) cosh(2 spread)`` times as many tokens:
    a row of 256, at 2, holds the noise of 380,000 for every second answer, and so presses for keys that
    leave each other alone.
    """
    if not spread:
        return written
    batch, *middle, tokens, _ = written.shape
    signs = 2.0 * torch.randint(0, 2, (batch, *[1] * len(middle), tokens, 1)) - 1.0
    return written * torch.exp(spread * signs)


def parameters(network: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in network.parameters())

"""LSTM: PyTorch's own, two layers on an embedding."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.experiments.contestants.network import Network
from titans_export.layers import RMSNorm


class LSTM(Network):
    """No residual stream: what Lake and Baroni trained, but as one stream instead of two networks."""

    def __init__(self, vocab_size: int, width: int, layers: int = 2) -> None:
        """``width``: of embedding and state."""
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.recurrence = nn.LSTM(width, width, layers, batch_first=True)
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def features(self, tokens: Tensor) -> Tensor:
        """See :class:`Network`."""
        normalised: Tensor = self.norm(self.recurrence(self.embedding(tokens))[0])
        return normalised

"""LSTM: PyTorch's own, two layers on an embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.experiments.contestants.network import Network, State
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

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """See :class:`Network`."""
        past = tuple(state[name].transpose(0, 1).contiguous() for name in ("hidden", "cell"))
        outputs, present = self.recurrence(self.embedding(tokens), past)
        hidden, cell = (tensor.transpose(0, 1) for tensor in present)
        return self.norm(outputs), {"hidden": hidden, "cell": cell}

    def initial_state(self, batch: int) -> State:
        """See :class:`Network`."""
        zeros = torch.zeros(batch, self.recurrence.num_layers, self.recurrence.hidden_size)
        return {"hidden": zeros, "cell": zeros}

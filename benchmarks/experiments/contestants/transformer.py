"""Causal attention with rotary positions (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.experiments.contestants.network import Mixer, State
from titans_export.attention import rotate
from titans_export.memory_layer import merge_heads, split_heads


class Attention(Mixer):
    """Every token sees all before it and itself; no state of constant size stands for the past."""

    def __init__(self, width: int, heads: int) -> None:
        """``heads`` share the width."""
        super().__init__()
        self.heads = heads
        self.in_projection = nn.Linear(width, 3 * width, bias=False)
        self.out_projection = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See :class:`Mixer`."""
        query, key, value = (split_heads(part, self.heads) for part in self.in_projection(x).chunk(3, dim=-1))
        places = torch.arange(x.shape[1])
        attended = F.scaled_dot_product_attention(
            rotate(query, places), rotate(key, places), value, is_causal=True
        )
        return self.out_projection(merge_heads(attended)), state

"""The product's own models, unchanged, behind the contestants' face."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.experiments.contestants.network import Network, State, scaled
from titans_export.config import ModelConfig
from titans_export.memory import neural_memory
from titans_export.memory_layer import Rules
from titans_export.model import TitansModel


class ScaledWrites:
    """The memory's rule, every token's value multiplied at random: see :func:`~.network.scaled`."""

    def __init__(self, spread: float) -> None:
        """``spread``: of the factors' logarithms, at a ``share`` of 1; 0 is what it begins with."""
        self.spread, self.share = spread, 0.0

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor, tile: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The contract of :func:`titans_export.memory.neural_memory`."""
        return neural_memory(query, key, scaled(value, self.share * self.spread), *rest, tile=tile)


class Titans(Network):
    """A Titans model with a strength of editing: what it is trained with, until it is set anew."""

    def __init__(self, config: ModelConfig, edit: float, write_spread: float = 0.0) -> None:
        """``edit``: ``λ`` of every layer; ``write_spread``: see :class:`ScaledWrites`."""
        super().__init__()
        self.writes = ScaledWrites(write_spread)
        self.model = TitansModel(config, Rules(exact=self.writes) if write_spread else Rules())
        self.model.readout_key.requires_grad_(False)
        self.edit: tuple[float, ...] = (edit,) * config.layers

    @property
    def head(self) -> nn.Linear:  # type: ignore[override]
        """The model's."""
        return self.model.head

    def set_noise(self, share: float) -> None:
        """See :class:`Network`."""
        self.writes.share = share

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """See :meth:`Network.forward`."""
        edit = torch.tensor([self.edit]).expand(len(tokens), -1)
        features: Tensor
        features, state = self.model.features(tokens, edit, state)
        return features, state

    def initial_state(self, batch: int) -> State:
        """Without the entries of the readout memory, which is edited in the runtime only."""
        state = self.model.initial_state(batch)
        return {name: tensor for name, tensor in state.items() if name not in ("context", "readout")}


def strengths(layers: int, values: Sequence[float]) -> list[tuple[float, ...]]:
    """``λ`` for all layers, and for each layer by itself."""
    single = [
        tuple(value if layer == own else 0.0 for layer in range(layers))
        for own in range(layers)
        for value in values
    ]
    return [(value,) * layers for value in values] + single

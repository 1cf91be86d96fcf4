"""The reference model: state in, state out, no hidden module state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_export.config import ModelConfig
from titans_export.layers import CausalConv, FeedForward, RMSNorm, l2_normalise, log_sigmoid
from titans_export.memory import MemoryOutput, neural_memory
from titans_export.memory.readout import ReadoutKey

MemoryRule = Callable[..., MemoryOutput]
"""Anything with the contract of :func:`titans_export.memory.neural_memory`."""

State = dict[str, Tensor]
"""State entries by name; :func:`state_schema` lists them."""


class StateEntry(NamedTuple):
    """One tensor of the state, without its batch axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class ModelOutput:
    """What one call returns.

    Attributes:
        logits: ``(B, T, vocab)``.
        readout_key: ``(B, T, Dr)``, the readout memory's key at every position.
        state: the present state, the readout memory excepted: only its editor changes that.
    """

    logits: Tensor
    readout_key: Tensor
    state: State


class MemoryLayer(nn.Module):
    """The long-term memory module of arXiv 2501.00663, section 3.1, with section 4.4's details.

    Query, key and value are projected, convolved and passed through SiLU; query and key are
    L2-normalised; retention, momentum and step depend on the token; the read is normalised per
    head and gated.
    """

    def __init__(self, config: ModelConfig, memory_rule: MemoryRule) -> None:
        """``memory_rule``: the function that stands for ``titans::NeuralMemory``."""
        super().__init__()
        self.heads, self.head_dim, self.inner = config.heads, config.head_dim, config.inner
        self.tile = config.tile
        self.memory_rule = memory_rule
        self.norm = RMSNorm(config.d_model)
        # One product for query, key, value, output gate and the three gates of every head.
        self.in_projection = nn.Linear(config.d_model, 4 * self.inner, bias=False)
        self.gates = nn.Linear(config.d_model, 3 * config.heads)
        self.convolution = CausalConv(config.conv_channels, config.conv_kernel)
        self.head_norm = RMSNorm(config.head_dim)
        self.out_projection = nn.Linear(self.inner, config.d_model, bias=False)
        self._initialise_gates()

    @torch.no_grad()
    def _initialise_gates(self) -> None:
        """Heads begin with retention times from about 10 to 1,000 tokens, momentum 0.5, step 0.5."""
        nn.init.normal_(self.gates.weight, std=0.02)
        times = torch.logspace(1, 3, self.heads)
        retention = torch.log(times)  # σ(log n) = n / (n + 1)
        rest = torch.zeros(2 * self.heads)
        self.gates.bias.copy_(torch.cat([retention, rest]))

    def forward(
        self, x: Tensor, edit: Tensor, past_conv: Tensor, past_memory: Tensor, past_momentum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``x (B, T, d_model)``, ``edit (B,)`` and this layer's state → output and present state."""
        batch, tokens, _ = x.shape
        x = self.norm(x)
        projected, output_gate = self.in_projection(x).split([3 * self.inner, self.inner], dim=-1)
        convolved, present_conv = self.convolution(projected, past_conv)
        query, key, value = (
            part.reshape(batch, tokens, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, D)
            for part in F.silu(convolved).split(self.inner, dim=-1)
        )
        retention, momentum, step = self.gates(x).transpose(1, 2).split(self.heads, dim=1)  # (B, H, T)
        read, present_memory, present_momentum = self.memory_rule(
            l2_normalise(query),
            l2_normalise(key),
            value,
            log_sigmoid(retention),
            log_sigmoid(momentum),
            torch.sigmoid(step),
            edit,
            past_memory,
            past_momentum,
            tile=self.tile,
        )
        read = self.head_norm(read).transpose(1, 2).reshape(batch, tokens, self.inner)
        output = self.out_projection(read * F.silu(output_gate))
        return output, present_conv, present_memory, present_momentum


class Block(nn.Module):
    """A memory layer and a feed-forward layer, each on a residual stream."""

    def __init__(self, config: ModelConfig, memory_rule: MemoryRule) -> None:
        """See :class:`MemoryLayer`."""
        super().__init__()
        self.memory = MemoryLayer(config, memory_rule)
        self.feed_forward_norm = RMSNorm(config.d_model)
        self.feed_forward = FeedForward(config.d_model, config.d_ff)

    def forward(
        self, x: Tensor, edit: Tensor, past_conv: Tensor, past_memory: Tensor, past_momentum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``x (B, T, d_model)`` → the same shape, and the layer's present state."""
        read, conv, memory, momentum = self.memory(x, edit, past_conv, past_memory, past_momentum)
        x = x + read
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x, conv, memory, momentum


class TitansModel(nn.Module):
    """LMM: long-term memory layers in sequence, a head, and the readout memory on its logits."""

    def __init__(self, config: ModelConfig, memory_rule: MemoryRule = neural_memory) -> None:
        """``memory_rule``: replaced by the exporter, which puts the operator in its place."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, memory_rule) for _ in range(config.layers))
        self.norm = RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.readout_key = ReadoutKey(config)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        residual_std = 0.02 / (2 * self.config.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("in_projection.weight", "up.weight", "head.weight")):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(("out_projection.weight", "down.weight")):
                nn.init.normal_(parameter, std=residual_std)

    def forward(self, input_ids: Tensor, edit: Tensor, state: State) -> ModelOutput:
        """Score the token after each of ``input_ids``.

        Args:
            input_ids: ``(B, T)`` int64, ``T ≥ 1``.
            edit: ``(B, layers)``, edit strength ``λ`` of every row and layer.
            state: the past state, as :func:`initial_state` or an earlier call gave it.
        """
        features, present = self.features(input_ids, edit, state)
        key, present["context"] = self.readout_key(features, input_ids, state["context"])
        logits = self.head(features) + key @ state["readout"]
        return ModelOutput(logits=logits, readout_key=key, state=present)

    def features(self, input_ids: Tensor, edit: Tensor, state: State) -> tuple[Tensor, State]:
        """What the head reads, ``(B, T, d_model)``, and the layers' present state."""
        present: State = {}
        x = self.embedding(input_ids)
        for layer, block in enumerate(self.blocks):
            names = layer_state_names(layer)
            x, *after = block(x, edit[:, layer], *(state[name] for name in names))
            present.update(zip(names, after, strict=True))
        return self.norm(x), present


def layer_state_names(layer: int) -> tuple[str, str, str]:
    """Names of one layer's state entries: convolution tail, memory, momentum."""
    return f"layers.{layer}.conv", f"layers.{layer}.memory", f"layers.{layer}.momentum"


def state_schema(config: ModelConfig) -> dict[str, StateEntry]:
    """Every state entry by name, in the order graphs and files keep."""
    tail = (config.conv_kernel - 1, config.conv_channels)
    memory = (config.heads, config.head_dim, config.head_dim)
    schema: dict[str, StateEntry] = {}
    for layer in range(config.layers):
        for name, shape in zip(layer_state_names(layer), (tail, memory, memory), strict=True):
            schema[name] = StateEntry(shape, torch.float32)
    schema["context"] = StateEntry((config.context_tail,), torch.int64)
    schema["readout"] = StateEntry((config.readout_key_dim, config.vocab_size), torch.float32)
    return schema


def initial_state(
    config: ModelConfig, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> State:
    """The state before the first token: zeros throughout.

    ``dtype`` replaces float32, for the float64 tests.
    """
    return {
        name: torch.zeros(
            (batch, *entry.shape), dtype=dtype if entry.dtype == torch.float32 else entry.dtype, device=device
        )
        for name, entry in state_schema(config).items()
    }

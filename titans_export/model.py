"""The reference model: state in, state out, no hidden module state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_export.config import ModelConfig
from titans_export.layers import FeedForward, RMSNorm
from titans_export.memory.readout import ReadoutKey, read_logits
from titans_export.memory_layer import (
    MemoryAsContextLayer,
    MemoryAsGateLayer,
    MemoryLayer,
    Rules,
    State,
    StateEntry,
    WindowAttentionLayer,
    window_entries,
)

__all__ = ["ModelOutput", "Rules", "State", "StateEntry", "TitansModel", "initial_state", "state_schema"]


@dataclass
class ModelOutput:
    """What one call returns.

    Attributes:
        logits: ``(B, T, vocab)``.
        readout_key: ``(B, T, d_model)``, the dense part of the readout memory's key.
        readout_rows: ``(B, T, contexts)`` int64, the rows that its one-hot parts pick.
        state: the present state, the readout memory excepted: only its editor changes that.
    """

    logits: Tensor
    readout_key: Tensor
    readout_rows: Tensor
    state: State


_MEMORY_LAYERS: dict[str, type[MemoryLayer | MemoryAsContextLayer]] = {
    "lmm": MemoryLayer,
    "mal": MemoryLayer,
    "mag": MemoryAsGateLayer,
    "mac": MemoryAsContextLayer,
}


class Block(nn.Module):
    """A memory layer, for MAL an attention layer, and a feed-forward layer, each on a residual stream.

    LMM is the memory alone; in MAL (arXiv 2501.00663, section 4.3, equations 29 to 31) attention
    follows it; in MAG and MAC attention is part of the memory layer.
    """

    def __init__(self, config: ModelConfig, rules: Rules) -> None:
        """See :class:`Rules`."""
        super().__init__()
        self.memory = _MEMORY_LAYERS[config.architecture](config, rules)
        self.attention = WindowAttentionLayer(config) if config.architecture == "mal" else None
        self.feed_forward_norm = RMSNorm(config.d_model)
        self.feed_forward = FeedForward(config.d_model, config.d_ff)

    def forward(self, x: Tensor, edit: Tensor, state: State) -> tuple[Tensor, State]:
        """``x (B, T, d_model)`` → the same shape, and the layer's present state."""
        read, present = self.memory(x, edit, state)
        x = x + read
        if self.attention is not None:
            attended, window = self.attention(x, state)
            x, present = x + attended, present | window
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x, present


class TitansModel(nn.Module):
    """Titans: blocks with a long-term memory, a head, and the readout memory on its logits."""

    def __init__(self, config: ModelConfig, rules: Rules = Rules()) -> None:  # noqa: B008 - immutable
        """``rules``: replaced by the exporter, which puts operators in their place."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, rules) for _ in range(config.layers))
        self.norm = RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.readout_key = ReadoutKey(config)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        residual_std = 0.02 / (2 * self.config.layers) ** 0.5
        inputs = ("in_projection.weight", "context_projection.weight", "memory_projection.weight")
        for name, parameter in self.named_parameters():
            if name.endswith((*inputs, "up.weight", "head.weight")):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(("out_projection.weight", "down.weight")):
                nn.init.normal_(parameter, std=residual_std)

    def forward(self, input_ids: Tensor, edit: Tensor, state: State) -> ModelOutput:
        """Score the token after each of ``input_ids``.

        Args:
            input_ids: ``(B, T)`` int64, ``T ≥ 1``.
            edit: ``(B, layers)``, edit strength ``λ`` of every row and layer.
            state: the past state, as :meth:`initial_state` or an earlier call gave it.
        """
        features, present = self.features(input_ids, edit, state)
        key, rows, present["context"] = self.readout_key(features, input_ids, state["context"])
        logits = self.head(features) + read_logits(
            state["readout"], key, rows, self.config.readout_context_scale
        )
        return ModelOutput(logits=logits, readout_key=key, readout_rows=rows, state=present)

    def features(self, input_ids: Tensor, edit: Tensor, state: State) -> tuple[Tensor, State]:
        """What the head reads, ``(B, T, d_model)``, and the layers' present state."""
        present: State = {}
        x = self.embedding(input_ids)
        for layer, block in enumerate(self.blocks):
            own = layer_state(state, layer)
            if self.config.counts_tokens:
                own["position"] = state["position"]
            x, after = block(x, edit[:, layer], own)
            present.update({f"layers.{layer}.{name}": tensor for name, tensor in after.items()})
        if self.config.counts_tokens:
            present["position"] = state["position"] + input_ids.shape[1]
        return self.norm(x), present

    def initial_state(self, batch: int) -> State:
        """The state before the first token, in the dtype of the weights: zeros, and memories as learned."""
        weight = self.embedding.weight
        state = initial_state(self.config, batch, weight.dtype, weight.device)
        for name, tensor in self.learned_state().items():
            state[name] = tensor.expand(batch, *tensor.shape)
        return state

    def group_products(self, gates_apart: bool = False) -> None:
        """See :meth:`titans_export.memory_layer.MemoryLayer.group_products`."""
        for memory in self._memories():
            if isinstance(memory, MemoryLayer):
                memory.group_products(gates_apart)

    def _memories(self) -> list[MemoryLayer | MemoryAsContextLayer]:
        return [block.memory for block in self.blocks if isinstance(block, Block)]

    def learned_state(self) -> State:
        """Entries of the initial state that are not zero, without their batch axis."""
        return {
            f"layers.{layer}.{name}": tensor
            for layer, memory in enumerate(self._memories())
            for name, tensor in memory.initial_state().items()
        }


def layer_state(state: State, layer: int) -> State:
    """One layer's entries, under their names within the layer."""
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def state_schema(config: ModelConfig) -> dict[str, StateEntry]:
    """Every state entry by name, in the order graphs and files keep."""
    entries = _MEMORY_LAYERS[config.architecture].state_schema(config)
    if config.architecture == "mal":
        entries |= window_entries(config)
    schema = {
        f"layers.{layer}.{name}": entry for layer in range(config.layers) for name, entry in entries.items()
    }
    if config.counts_tokens:
        schema["position"] = StateEntry((), torch.int64, role="position")
    schema["context"] = StateEntry((config.context_tail,), torch.int64, role="window")
    schema["readout"] = StateEntry((config.readout_height, config.vocab_size), role="memory")
    return schema


def initial_state(
    config: ModelConfig, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> State:
    """Zeros for every state entry: what a model without learned memories begins with.

    ``dtype`` replaces float32, for the float64 tests.
    """
    return {
        name: torch.zeros(
            (batch, *entry.shape), dtype=dtype if entry.dtype == torch.float32 else entry.dtype, device=device
        )
        for name, entry in state_schema(config).items()
    }

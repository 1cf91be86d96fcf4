"""The long-term memory as a layer: projections, gates and the rule; and MAG and MAC around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_export.attention import window_attention
from titans_export.config import ModelConfig
from titans_export.layers import CausalConv, RMSNorm, l2_normalise
from titans_export.memory import MemoryRule, neural_memory
from titans_export.memory.deep import PeriodicMemory, pack, unpack
from titans_export.memory.mlp import layer_shapes
from titans_export.memory.segment import SegmentMemory, SegmentWeights, gated_inputs
from titans_export.memory.tiles import MemoryState, TokenInputs
from titans_export.recurrence import Recurrence, Tensors, run_core

State = dict[str, Tensor]
"""State entries by name."""


class StateEntry(NamedTuple):
    """One tensor of the state, without its batch axis.

    ``role`` is what it is to an editor: ``memory``, ``momentum``, ``anchor`` (the memory as a period or
    a segment began), ``window`` (past inputs) or ``position``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    role: str = "window"


@dataclass(frozen=True)
class Rules:
    """The functions that stand for the memory; an exporter or an oracle puts others in their place.

    Attributes:
        exact: the contract of :func:`titans_export.memory.neural_memory`.
        recurrence: the contract of :func:`titans_export.recurrence.run_core`.
    """

    exact: MemoryRule = neural_memory
    recurrence: Recurrence = run_core


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(B, T, H D) → (B, H, T, D)``."""
    batch, tokens, _ = x.shape
    return x.reshape(batch, tokens, heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``(B, H, T, D) → (B, T, H D)``."""
    batch, heads, tokens, dim = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * dim)


def memory_entries(
    config: ModelConfig, names: tuple[str, ...] = ("memory", "momentum", "anchor")
) -> dict[str, StateEntry]:
    """State entries of one layer's memory, in the order of :func:`titans_export.memory.deep.pack`."""
    form = config.memory_form
    shapes = layer_shapes(form.depth, config.memory_expansion, config.head_dim)
    present = {"memory": True, "momentum": form.momentum, "anchor": form.period > 1, "context": True}
    entries = {}
    for name in names:
        if present[name]:
            role = "anchor" if name == "context" else name
            for layer, shape in enumerate(shapes):
                full = f"{name}.{layer}" if form.depth else name
                entries[full] = StateEntry((config.heads, *shape), role=role)
    return entries


class MemoryBase(nn.Module):
    """What every layer with a memory has: its gates' biases and its learned initial weights."""

    def __init__(self, config: ModelConfig, rules: Rules) -> None:
        """``rules``: what stands for the memory."""
        super().__init__()
        self.config, self.rules = config, rules
        self.heads, self.inner = config.heads, config.inner
        self.form = config.memory_form
        self.norm = RMSNorm(config.d_model)
        shapes = layer_shapes(self.form.depth, config.memory_expansion, config.head_dim)
        self.initial_memory = nn.ParameterList(
            nn.Parameter(torch.empty(config.heads, *shape)) for shape in shapes if config.learned_memory
        )
        for weight in self.initial_memory:
            if self.form.depth:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            else:
                nn.init.zeros_(weight)

    def gate_bias(self) -> Tensor:
        """Heads begin with retention times from about 10 to 1,000 tokens, momentum 0.5, step 0.5.

        An MLP begins with steps of 0.0025 and forgets slower: at 0.02 the inner descent of one of depth 2
        overshoots, and what it learns is chaotic.
        """
        deep = self.form.depth > 0
        times = torch.logspace(2, 4, self.heads) if deep else torch.logspace(1, 3, self.heads)
        parts = [torch.log(times)] if self.config.retention else []  # σ(log n) = n / (n + 1)
        parts += [torch.zeros(self.heads)] if self.form.momentum else []
        return torch.cat([*parts, torch.full((self.heads,), -6.0 if deep else 0.0)])

    def initial_state(self) -> dict[str, Tensor]:
        """Entries that do not begin at zero, without their batch axis."""
        names = [name for name, entry in memory_entries(self.config).items() if entry.role == "memory"]
        return dict(zip(names, self.initial_memory, strict=False))

    def reference(self) -> Tensors:
        """Where gradients are taken for ``λ = 0``; a matrix has zero there."""
        return tuple(self.initial_memory) if self.form.depth else ()


class MemoryLayer(MemoryBase):
    """The long-term memory module of arXiv 2501.00663, section 3.1, with section 4.4's details.

    Query, key and value are projected, convolved and passed through SiLU; query and key are
    L2-normalised; retention, momentum and step depend on the token; the read is normalised per
    head and gated.
    """

    def __init__(self, config: ModelConfig, rules: Rules) -> None:
        """See :class:`MemoryBase`."""
        super().__init__(config, rules)
        # One product for query, key, value and whatever else a layer needs of its input.
        self.in_projection = nn.Linear(config.d_model, self.input_width(config), bias=False)
        self.gates = nn.Linear(config.d_model, config.gate_count * config.heads)
        nn.init.normal_(self.gates.weight, std=0.02)
        with torch.no_grad():
            self.gates.bias.copy_(self.gate_bias())
        self.convolution = CausalConv(3 * self.inner, config.conv_kernel) if config.convolution else None
        self.head_norm = RMSNorm(config.head_dim)
        self.out_projection = nn.Linear(self.inner, config.d_model, bias=False)
        self._grouped: tuple[Tensor, ...] | None = None

    @staticmethod
    def input_width(config: ModelConfig) -> int:
        """Query, key, value and output gate."""
        return 4 * config.inner

    @torch.no_grad()
    def group_products(self, gates_apart: bool = False) -> None:
        """Group the input's products for an exported graph, with the same weights.

        One product for what is convolved, one for all else, gates included. PyTorch splits one wide
        result without a copy; ONNX Runtime copies it, 2 % of a prefill.

        Args:
            gates_apart: whether the gates have a product of their own, since the others are quantised.
        """
        kept, other = self.in_projection.weight.split([3 * self.inner, self._other_width])
        gates = self.gates.weight
        rest = (other.clone(), gates.clone()) if gates_apart else (torch.cat([other, gates]),)
        self._grouped = kept.clone(), *rest

    @property
    def _other_width(self) -> int:
        return self.in_projection.out_features - 3 * self.inner

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``(B, T, 3 H D)``; what else the layer needs; raw gates ``(B, T, G H)``."""
        if self._grouped is None:
            projected, other = self.in_projection(x).split([3 * self.inner, self._other_width], dim=-1)
            return projected, other, self.gates(x)
        projected, *rest = (F.linear(x, weight) for weight in self._grouped)
        if len(rest) == 1:
            rest = list(rest[0].split([self._other_width, self.gates.out_features], dim=-1))
        other, gates = rest
        return projected, other, gates + self.gates.bias

    @staticmethod
    def state_schema(config: ModelConfig) -> dict[str, StateEntry]:
        """The layer's state entries."""
        tail = StateEntry((config.conv_kernel - 1, 3 * config.inner))
        return ({"conv": tail} if config.convolution else {}) | memory_entries(config)

    def forward(self, x: Tensor, edit: Tensor, state: State) -> tuple[Tensor, State]:
        """``x (B, T, d_model)``, ``edit (B,)`` and this layer's state → output and present state."""
        projected, output_gate, gates = self.project(self.norm(x))
        read, present = self.recall(projected, gates, edit, state)
        read = merge_heads(self.head_norm(read))
        return self.out_projection(read * F.silu(output_gate)), present

    def recall(self, projected: Tensor, gates: Tensor, edit: Tensor, state: State) -> tuple[Tensor, State]:
        """Write and read: the memory's answers ``(B, H, T, D)`` and its present state."""
        present = {}
        if self.convolution is not None:
            projected, present["conv"] = self.convolution(projected, state["conv"])
        addresses, value = split_heads(F.silu(projected), 3 * self.heads).split(
            [2 * self.heads, self.heads], dim=1
        )
        query, key = l2_normalise(addresses).split(self.heads, dim=1)
        projections = query, key, value
        inputs = gated_inputs(projections, gates.transpose(1, 2), self.form.momentum, self.config.retention)
        names = list(memory_entries(self.config))
        carry = tuple(state[name] for name in names)
        if self.form.exact:
            read, carry = self._exact(inputs, edit, carry)
        else:
            tokens = tuple(tensor for tensor in inputs if tensor is not None)
            shared = (edit, *self.reference())
            core = PeriodicMemory(self.form)
            read, carry = self.rules.recurrence(core, state["position"], tokens, carry, shared)
        return read, present | dict(zip(names, carry, strict=True))

    def _exact(self, inputs: TokenInputs, edit: Tensor, carry: Tensors) -> tuple[Tensor, Tensors]:
        """The operator, which always has momentum: without, its decay is zero and no state of it is kept."""
        query, key, value, log_retention, step, log_momentum = inputs
        state = unpack(self.form, carry)
        (memory,) = state.memory
        if log_momentum is None:
            log_momentum = torch.full_like(step, float("-inf"))
        momentum = state.momentum[0] if state.momentum else torch.zeros_like(memory)
        read, memory, momentum = self.rules.exact(
            query,
            key,
            value,
            log_retention,
            log_momentum,
            step,
            edit,
            memory,
            momentum,
            tile=self.config.tile,
        )
        return read, pack(MemoryState((memory,), (momentum,) if state.momentum else (), ()))


class MemoryAsGateLayer(MemoryLayer):
    """MAG: the memory gates sliding-window attention (arXiv 2501.00663, section 4.2, equations 26 to 28).

    ``o = y ⊗ M(x)`` with ``y`` the attention's output: both are normalised with learned weights, the
    memory's answer is passed through a sigmoid.
    """

    def __init__(self, config: ModelConfig, rules: Rules) -> None:
        """See :class:`MemoryBase`."""
        super().__init__(config, rules)
        self.persistent = PersistentTokens(config)
        self.attention_norm = RMSNorm(config.head_dim)

    @staticmethod
    def input_width(config: ModelConfig) -> int:
        """Query, key and value of the memory and of the attention."""
        return 6 * config.inner

    @staticmethod
    def state_schema(config: ModelConfig) -> dict[str, StateEntry]:
        """The layer's state entries."""
        return MemoryLayer.state_schema(config) | window_entries(config)

    def forward(self, x: Tensor, edit: Tensor, state: State) -> tuple[Tensor, State]:
        """``x (B, T, d_model)``, ``edit (B,)`` and this layer's state → output and present state."""
        projected, attended, gates = self.project(self.norm(x))
        read, present = self.recall(projected, gates, edit, state)
        y, window = attend_window(attended, self.heads, self.persistent, state)
        gated = self.attention_norm(y) * torch.sigmoid(self.head_norm(read))
        return self.out_projection(merge_heads(gated)), present | window


class MemoryAsContextLayer(MemoryBase):
    """MAC: the memory as context of attention (arXiv 2501.00663, section 4.1, equations 21 to 25).

    A segment attends to persistent tokens, to what the memory says about it, and to itself; the memory
    then learns from the attention's output and is read again: :mod:`titans_export.memory.segment`.
    """

    def __init__(self, config: ModelConfig, rules: Rules) -> None:
        """See :class:`MemoryBase`."""
        super().__init__(config, rules)
        inner, gates = config.inner, config.gate_count * config.heads
        self.in_projection = nn.Linear(config.d_model, 4 * inner, bias=False)
        self.convolution = CausalConv(4 * inner, config.conv_kernel) if config.convolution else None
        self.persistent = PersistentTokens(config)
        self.context_projection = nn.Linear(inner, 2 * inner, bias=False)
        self.memory_projection = nn.Linear(inner, 3 * inner + gates, bias=False)
        self.gate_biases = nn.Parameter(self.gate_bias())
        self.attention_norm = RMSNorm(config.head_dim)
        self.head_norm = RMSNorm(config.head_dim)
        self.out_projection = nn.Linear(inner, config.d_model, bias=False)

    @staticmethod
    def state_schema(config: ModelConfig) -> dict[str, StateEntry]:
        """The layer's state entries."""
        tail = {"conv": StateEntry((config.conv_kernel - 1, 4 * config.inner))} if config.convolution else {}
        slots = StateEntry((config.heads, 2 * config.segment, config.head_dim))
        segment = {"segment.key": slots, "segment.value": slots}
        return tail | segment | memory_entries(config, ("context", "memory", "momentum", "anchor"))

    def forward(self, x: Tensor, edit: Tensor, state: State) -> tuple[Tensor, State]:
        """``x (B, T, d_model)``, ``edit (B,)`` and this layer's state → output and present state."""
        present = {}
        projected = self.in_projection(self.norm(x))
        if self.convolution is not None:
            projected, present["conv"] = self.convolution(projected, state["conv"])
        *attention, question = (split_heads(part, self.heads) for part in projected.split(self.inner, dim=-1))
        names = [name for name in self.state_schema(self.config) if name != "conv"]
        core = SegmentMemory(self.form, self.config.segment, self.config.retention)
        shared = SegmentWeights(
            edit,
            self.persistent.key,
            self.persistent.value,
            self.context_projection.weight,
            self.memory_projection.weight,
            self.gate_biases,
            self.attention_norm.weight,
            self.head_norm.weight,
        )
        output, carry = self.rules.recurrence(
            core,
            state["position"],
            (*attention, l2_normalise(F.silu(question))),
            tuple(state[name] for name in names),
            (*shared, *self.reference()),
        )
        return self.out_projection(merge_heads(output)), present | dict(zip(names, carry, strict=True))


class PersistentTokens(nn.Module):
    """Learned keys and values that are visible from everywhere: what is known about the task.

    The paper puts learned tokens before the sequence; as keys and values they cost no place in it.
    """

    def __init__(self, config: ModelConfig) -> None:
        """``config.persistent`` tokens a head."""
        super().__init__()
        shape = (config.heads, config.persistent, config.head_dim)
        self.key = nn.Parameter(torch.randn(shape) * 0.02)
        self.value = nn.Parameter(torch.randn(shape) * 0.02)


class WindowAttentionLayer(nn.Module):
    """Sliding-window attention with persistent tokens: the second half of MAL."""

    def __init__(self, config: ModelConfig) -> None:
        """Heads are as many and as wide as the memory's."""
        super().__init__()
        self.heads = config.heads
        self.norm = RMSNorm(config.d_model)
        self.in_projection = nn.Linear(config.d_model, 3 * config.inner, bias=False)
        self.persistent = PersistentTokens(config)
        self.out_projection = nn.Linear(config.inner, config.d_model, bias=False)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """``x (B, T, d_model)`` and this layer's state → output and present state."""
        y, present = attend_window(self.in_projection(self.norm(x)), self.heads, self.persistent, state)
        return self.out_projection(merge_heads(y)), present


def window_entries(config: ModelConfig) -> dict[str, StateEntry]:
    """State entries of a layer's attention window."""
    window = StateEntry((config.heads, config.window - 1, config.head_dim))
    return {"window.key": window, "window.value": window}


def attend_window(
    projected: Tensor, heads: int, persistent: PersistentTokens, state: State
) -> tuple[Tensor, State]:
    """Window attention of ``projected (B, T, 3 H D)``: ``(B, H, T, D)`` and the present window."""
    query, key, value = (split_heads(part, heads) for part in projected.chunk(3, dim=-1))
    y, present_key, present_value = window_attention(
        query,
        key,
        value,
        state["window.key"],
        state["window.value"],
        state["position"],
        persistent.key,
        persistent.value,
    )
    return y, {"window.key": present_key, "window.value": present_value}

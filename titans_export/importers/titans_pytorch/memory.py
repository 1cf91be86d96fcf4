"""``NeuralMemory`` of titans-pytorch: a memory edited once a chunk, by the gradient of the whole chunk.

With ``P`` the memory's weights, ``Ŵ`` those at which gradients are taken, ``n`` the chunk::

    g_n = ∇ Σ_t θ_t · mean_d (f(Ŵ; k_t) - v_t)²         θ per token; α, η per chunk
    S_n = η_n S_{n-1} - g_n ;  M_n = (1 - α_n) M_{n-1} + S_n
    token t reads M of the chunks that are complete with it: the last token of a chunk reads its own

``Ŵ`` is the initial memory, or, with a ``batch_size``, the memory as it was at the last multiple of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_export.importers.titans_pytorch.lengths import length
from titans_export.importers.titans_pytorch.networks import Weights, gradient
from titans_export.importers.titans_pytorch.options import MemoryOptions

_SMALLEST = 1e-15  # a length of zero must neither divide zero nor have an infinite slope
_SMALLEST_MATRIX = 1e-7  # the library's, below which a matrix is not stretched to length one
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Memories(NamedTuple):
    """The memory's part of the state, ``(B, H, …)`` each.

    Attributes:
        memory: ``M``, one tensor for each of the network's.
        momentum: ``S``: every order's tensors, the first order first.
        anchor: ``Ŵ``; empty without a batch size: then it is the initial memory.
    """

    memory: Weights
    momentum: Weights
    anchor: Weights


class Lesson(NamedTuple):
    """What a chunk teaches, whatever the memory is that learns it; ``(B, …)`` each.

    Attributes:
        decay: ``α (B, H)``.
        gates: ``η (B, H, orders)``, one for rows whose chunk is not complete; None without momentum.
        shares: ``(B, H, combined)``; None where the last order's momentum is what is learnt.
        surprises: ``-g``, zero for rows whose chunk is not complete.
    """

    decay: Tensor
    gates: Tensor | None
    shares: Tensor | None
    surprises: Weights

    def flat(self) -> tuple[Tensor, ...]:
        """All that is there, in order."""
        given = (self.decay, self.gates, self.shares)
        return *(x for x in given if x is not None), *self.surprises


class Projection(nn.Module):
    """``x W + b`` with ``W`` as ``(in, out)``: a graph multiplies by it as it stands."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        """Zeros, to be filled."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``(…, in) → (…, out)``."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class HeadNorm(nn.Module):
    """RMS norm over a head's width, with a weight for each head."""

    def __init__(self, dim: int, heads: int) -> None:
        """``γ`` begins at zero: a weight of one."""
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, T, D)`` → the same shape."""
        normal: Tensor = F.rms_norm(x, x.shape[-1:]) * (self.gamma + 1.0)
        return normal


class LibraryMemory(nn.Module):
    """Weights and mathematics of a ``NeuralMemory``; no state."""

    def __init__(self, options: MemoryOptions) -> None:
        """Parameters have the library's names where they have its shapes."""
        super().__init__()
        self.options, self.network = options, options.network
        dim, heads, inner = options.dim, options.heads, options.heads * options.dim_head
        updates, networks = options.num_kv_per_token, self.network.shapes()
        self.retrieve_norm = nn.RMSNorm(dim) if options.pre_rmsnorm else nn.Identity()
        self.store_norm = nn.RMSNorm(dim) if options.pre_rmsnorm else nn.Identity()
        self.multihead_rmsnorm = _head_norm(options, there=options.post_rmsnorm)
        self.q_norm = _head_norm(options, there=options.qk_rmsnorm)
        self.k_norm = _head_norm(options, there=options.qk_rmsnorm)
        self.to_queries = Projection(dim, inner)
        self.to_keys = Projection(dim, inner * updates)
        self.to_values = Projection(dim, inner * updates)
        self.activation = getattr(nn, options.activation)() if options.activation else nn.Identity()
        self.combine_heads = Projection(inner, dim) if heads > 1 else None
        self.retrieve_gate = Projection(dim, heads) if heads > 1 else None
        self.to_adaptive_step = Projection(dim, heads * updates, bias=True)
        self.to_decay_factor = Projection(dim, heads, bias=True)
        self.to_momentum = Projection(dim, heads * options.orders, bias=True) if options.orders else None
        self.to_learned_momentum_combine = (
            Projection(dim, heads * options.combined, bias=True) if options.combined else None
        )
        self.to_layer_modulation = (
            Projection(dim, heads * len(networks), bias=True) if options.per_parameter_lr_modulation else None
        )
        self.to_learned_weight_residual_mix = (
            Projection(dim, heads, bias=True) if options.accept_weight_residual else None
        )
        self.to_attn_logits = Projection(dim, dim, bias=True) if options.attn_pool_chunks else None
        self.transition_gate = nn.Parameter(torch.tensor(-5.0)) if options.gated_transition else None
        self.memory_model_parameters = nn.ParameterList(
            nn.Parameter(torch.zeros(heads, *shape)) for shape in networks
        )

    # --- reading

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """What the memory answers: ``(B, T, dim)`` → the same shape.

        Args:
            weights: ``M``, ``(B, H, …)`` each.
            x: the query's view.
        """
        return self.read_in_turn([weights], [x.shape[1]], x)

    def read_in_turn(self, memories: list[Weights], counts: list[int], x: Tensor) -> Tensor:
        """The same where the memory changes along ``x``: each of ``memories`` answers ``counts`` tokens."""
        return self.answer(x, self.ask(memories, counts, self.queries(x)))

    def queries(self, x: Tensor) -> Tensor:
        """``(B, T, dim) → (B, H, T, D)``."""
        query: Tensor = self.q_norm(self._heads(self.activation(self.to_queries(self.retrieve_norm(x)))))
        return query

    def ask(self, memories: list[Weights], counts: list[int], query: Tensor) -> Tensor:
        """What the networks say to queries ``(B, H, T, D)``, of which each has ``counts``."""
        if len(memories) == 1:
            return self.network.read(memories[0], query)
        parts = zip(memories, query.split(counts, dim=2), strict=True)
        return torch.cat([self.network.read(weights, part) for weights, part in parts], dim=2)

    def answer(self, x: Tensor, y: Tensor) -> Tensor:
        """The heads' words ``(B, H, T, D)`` as one answer ``(B, T, dim)``; ``x``: the query's view."""
        x, y = self.retrieve_norm(x), self.multihead_rmsnorm(y)
        if self.combine_heads is None or self.retrieve_gate is None:
            alone: Tensor = y.squeeze(1)
            return alone
        gate = torch.sigmoid(self.retrieve_gate(x)).transpose(1, 2)[..., None]
        answer: Tensor = self.combine_heads((y * gate).transpose(1, 2).flatten(2))
        return answer

    # --- writing

    def update(
        self,
        chunk: Tensor,
        state: Memories,
        edit: Tensor,
        live: Tensor,
        boundary: Tensor,
        previous: Weights = (),
    ) -> Memories:
        """The memory after a chunk.

        Args:
            chunk: ``(B, C, dim)``, the chunk's inputs; with a view for keys and one for values, side by
                side ``(B, C, 2 dim)``.
            state: before the chunk.
            edit: ``(B,)``, ``λ``: how much of the update the memory takes; 0 leaves it as it is.
            live: ``(B,)`` bool, whether the row's chunk is complete; others keep their state.
            boundary: ``(B,)`` bool, whether a batch of chunks ends with this one.
            previous: memory of the memory layer before, as the chunk began; empty without weight residual.
        """
        lesson = self.lesson(chunk, state.anchor, live, previous)
        return self.learn(lesson, state, edit, live, boundary)

    def lesson(self, chunk: Tensor, anchor: Weights, live: Tensor, previous: Weights = ()) -> Lesson:
        """What a chunk teaches; see :meth:`update`.

        ``anchor``: what gradients are taken at; empty where that is the initial memory.
        """
        key_view, value_view = self._views(chunk)
        pooled = self._pool(key_view)
        base = anchor or tuple(self.memory_model_parameters)
        if self.to_learned_weight_residual_mix is not None:
            mix = torch.sigmoid(self.to_learned_weight_residual_mix(pooled))
            base = tuple(w + _beside(mix, p) * p for w, p in zip(base, previous, strict=True))
        there = live.to(chunk.dtype)[:, None]  # (B, 1)
        surprises = self._modulated(self._surprise(base, key_view, value_view, there), pooled)
        gates = shares = None
        if self.to_momentum is not None:
            gates = torch.sigmoid(self.to_momentum(pooled)).unflatten(-1, (self.options.heads, -1))
            gates = torch.where(live[:, None, None], gates, 1.0)
        if self.to_learned_momentum_combine is not None:
            raw = self.to_learned_momentum_combine(pooled).unflatten(-1, (self.options.heads, -1))
            shares = raw.softmax(-1)
        return Lesson(torch.sigmoid(self.to_decay_factor(pooled)), gates, shares, surprises)

    def as_lesson(self, tensors: Sequence[Tensor]) -> Lesson:
        """The converse of :meth:`Lesson.flat`."""
        decay, *rest = tensors
        gates = rest.pop(0) if self.to_momentum is not None else None
        shares = rest.pop(0) if self.to_learned_momentum_combine is not None else None
        return Lesson(decay, gates, shares, tuple(rest))

    def learn(
        self, lesson: Lesson, state: Memories, edit: Tensor, live: Tensor, boundary: Tensor
    ) -> Memories:
        """The memory after a lesson; see :meth:`update`."""
        update, momentum = self._momentum(lesson, state.momentum, live)
        if self.options.spectral_norm_surprises:
            update = tuple(_orthogonal(u) for u in update)
        strength = edit[:, None] * live.to(edit.dtype)[:, None]
        decay = 1.0 - strength * lesson.decay
        memory = tuple(
            _beside(decay, m) * m + _beside(strength, u) * u
            for m, u in zip(state.memory, update, strict=True)
        )
        if not state.anchor:
            return Memories(memory, momentum, ())
        return Memories(*self._moved(memory, state.anchor, boundary & live, momentum))

    def taught(self, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the memory is taught by tokens: keys and values ``(B, H, T U, D)``, steps ``(B, H, T U)``.

        Args:
            stored: ``(B, T, dim)``, or two views side by side.
        """
        return self._taught(*self._views(stored))

    def _taught(self, key_view: Tensor, value_view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = self.k_norm(self._heads(self.activation(self.to_keys(key_view))))
        value = self._heads(self.activation(self.to_values(value_view)))
        step = torch.sigmoid(self._per_update(key_view)) * self.options.default_step_transform_max_lr
        return key, value, step

    def _views(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        if chunk.shape[-1] == self.options.dim:
            view = self.store_norm(chunk)
            return view, view
        key, value = chunk.chunk(2, dim=-1)
        return self.store_norm(key), self.store_norm(value)

    def _pool(self, view: Tensor) -> Tensor:
        """What stands for the chunk: ``(B, C, dim) → (B, dim)``."""
        if self.to_attn_logits is None:
            mean: Tensor = view.mean(1)
            return mean
        attended: Tensor = (view * self.to_attn_logits(view).softmax(1)).sum(1)
        return attended

    def _surprise(self, base: Weights, key_view: Tensor, value_view: Tensor, there: Tensor) -> Weights:
        """``-g``; zero for rows whose chunk is not complete. Sign and zeros go in with the steps."""
        options = self.options
        key, value, step = self._taught(key_view, value_view)
        step = -step * there[..., None]
        if options.store_with_lookahead_value:
            key, value, step = key[:, :, :-1], value[:, :, 1:], step[:, :, :-1]
        descent = gradient(self.network, base, key, value, step)
        if options.max_grad_norm is None:
            return descent
        return tuple(_clamped(g, options.max_grad_norm) for g in descent)

    def _per_update(self, view: Tensor) -> Tensor:
        """Raw steps ``(B, H, C U)``: a token may write several times."""
        batch, tokens, _ = view.shape
        raw = self.to_adaptive_step(view).reshape(batch, tokens, self.options.heads, -1)
        steps: Tensor = raw.transpose(1, 2).reshape(batch, self.options.heads, -1)
        return steps

    def _modulated(self, surprises: Weights, pooled: Tensor) -> Weights:
        if self.to_layer_modulation is None:
            return surprises
        raw = self.to_layer_modulation(pooled).unflatten(-1, (self.options.heads, -1))
        scales = (torch.sigmoid(raw) * self.options.max_mem_layer_modulation).split(1, dim=-1)
        return tuple(s * _beside(scale, s) for scale, s in zip(scales, surprises, strict=True))

    def _momentum(self, lesson: Lesson, past: Weights, live: Tensor) -> tuple[Weights, Weights]:
        """What is added to the memory, and every order's momentum."""
        if lesson.gates is None:
            return lesson.surprises, ()
        width, levels = len(lesson.surprises), [lesson.surprises]
        for order, gate in enumerate(lesson.gates.split(1, dim=-1)):
            before = past[order * width : (order + 1) * width]
            new = tuple(
                _beside(gate, s) * s + x for s, x in zip(before, self._into(order, levels, live), strict=True)
            )
            levels.append(new)
        present = tuple(s for level in levels[1:] for s in level)
        if lesson.shares is None:
            return levels[-1], present
        parts = lesson.shares.split(1, dim=-1)
        mixed = levels if self.options.learned_combine_include_zeroth else levels[1:]
        update = tuple(
            sum((_beside(part, u) * u for part, u in zip(parts, tensors, strict=True)), start=torch.zeros(()))
            for tensors in zip(*mixed, strict=True)
        )
        return update, present

    @staticmethod
    def _into(order: int, levels: list[Weights], live: Tensor) -> Weights:
        """What an order of momentum takes up: the order below, of rows whose chunk is complete."""
        if order == 0:
            return levels[0]  # zero already, where it is not
        there = live[:, None].to(levels[0][0].dtype)
        return tuple(x * _beside(there, x) for x in levels[-1])

    def _moved(
        self, memory: Weights, anchor: Weights, boundary: Tensor, momentum: Weights
    ) -> tuple[Weights, Weights, Weights]:
        """At the end of a batch of chunks: gradients are taken at the new memory from here on."""
        if self.transition_gate is not None:
            gate = torch.sigmoid(self.transition_gate)
            moved = tuple(w + gate * (m - w) for m, w in zip(memory, anchor, strict=True))
            memory = tuple(_choose(boundary, new, m) for new, m in zip(moved, memory, strict=True))
        anchor = tuple(_choose(boundary, m, w) for m, w in zip(memory, anchor, strict=True))
        return memory, momentum, anchor

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, T, H U D) → (B, H, T U, D)``."""
        batch, tokens, _ = x.shape
        heads, dim = self.options.heads, self.options.dim_head
        return x.reshape(batch, tokens, heads, -1).transpose(1, 2).reshape(batch, heads, -1, dim)


def _head_norm(options: MemoryOptions, there: bool) -> nn.Module:
    return HeadNorm(options.dim_head, options.heads) if there else nn.Identity()


def _beside(scale: Tensor, weights: Tensor) -> Tensor:
    """``(B, H)`` or ``(B, 1)``, then an axis of one or none, with as many axes as ``weights (B, H, …)``."""
    return scale.reshape(*scale.shape[:2], *[1] * (weights.dim() - 2))


def _choose(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def _clamped(gradient: Tensor, limit: float) -> Tensor:
    """``g · (tanh(‖g‖ / (m/2)) + 1) (m/2) / ‖g‖``, over all of a head's tensor."""
    norm = length(gradient, tuple(range(2, gradient.dim())), _SMALLEST)
    half = limit / 2
    scale = (torch.tanh(norm / half) * half + half) / norm
    return gradient * _beside(scale, gradient)


def _orthogonal(x: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix (Jordan et al., 2024); vectors stay."""
    if x.dim() <= 3:
        return x
    a, b, c = _NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    t = x.mT if tall else x
    t = t / length(t, (-2, -1), _SMALLEST_MATRIX, keepdim=True)
    for _ in range(5):
        square = t @ t.mT
        t = a * t + (b * square + c * square @ square) @ t
    turned: Tensor = t.mT if tall else t
    return turned


def initial_memories(memory: LibraryMemory, batch: int) -> Memories:
    """The state before the first token."""
    weights = tuple(w.expand(batch, *w.shape) for w in memory.memory_model_parameters)
    momentum = tuple(torch.zeros_like(w) for w in weights) * memory.options.orders
    return Memories(weights, momentum, weights if memory.options.batch_size else ())


def tensor_count(options: MemoryOptions) -> tuple[int, int, int]:
    """How many tensors :class:`Memories` has: of memory, momentum, anchor."""
    width = len(options.network.shapes())
    return width, width * options.orders, width if options.batch_size else 0

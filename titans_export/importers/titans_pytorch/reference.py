"""Imported models token by token: slow, obvious, one row at a time. What goldens and tests come from.

Nothing here knows chunks of a tile, masks or explicit gradients: a chunk's gradient is autograd's, of the
loss as it is stated; a token attends to the tokens within its sight, each turned by its place in the stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from titans_export.importers.titans_pytorch.attention import SegmentAttention
from titans_export.importers.titans_pytorch.keys import LibraryModel
from titans_export.importers.titans_pytorch.memory import LibraryMemory
from titans_export.importers.titans_pytorch.neural_memory import NeuralMemoryModel
from titans_export.importers.titans_pytorch.residual import ITERATIONS, HyperConnection
from titans_export.importers.titans_pytorch.transformer import Layer, TransformerModel

Weights = list[Tensor]


class MemoryLoop:
    """One memory along one stream; its weights are ``(H, …)``."""

    def __init__(self, memory: LibraryMemory, edit: Tensor, width: int) -> None:
        """``edit``: a scalar, ``λ``; ``width``: of what is stored for a token."""
        self.own, self.options, self.edit = memory, memory.options, edit
        self.memory: Weights = [w.detach().clone() for w in memory.memory_model_parameters]
        self.anchor: Weights = [w.clone() for w in self.memory]
        self.momentum: list[Weights] = [
            [torch.zeros_like(w) for w in self.memory] for _ in range(self.options.orders)
        ]
        self.store = torch.zeros(self.options.chunk_size, width, dtype=edit.dtype)
        self.last = self.store[0]
        self.seen = 0

    def see(self, query: Tensor, stored: Tensor, previous: Weights | None) -> Tensor:
        """One token: ``query (dim,)`` and what is stored of it; what the memory answers."""
        self.store[self.seen % self.options.chunk_size] = self.last = stored
        self.seen += 1
        if self.seen % self.options.chunk_size == 0:
            self._learn(previous)
        return self.own.read(tuple(w[None] for w in self.memory), query[None, None])[0, 0]

    def state(self) -> dict[str, Tensor]:
        """Its part of the model's state."""
        arrays = {"store": self.store}
        arrays |= {f"memory.{i}": w for i, w in enumerate(self.memory)}
        for order, tensors in enumerate(self.momentum):
            arrays |= {f"momentum.{order}.{i}": s for i, s in enumerate(tensors)}
        if self.options.batch_size:
            arrays |= {f"anchor.{i}": w for i, w in enumerate(self.anchor)}
        return arrays

    def _learn(self, previous: Weights | None) -> None:
        options, own = self.options, self.own
        key_view, value_view = self.store, self.store
        if self.store.shape[1] != options.dim:
            key_view, value_view = self.store[:, : options.dim], self.store[:, options.dim :]
        key_view, value_view = own.store_norm(key_view), own.store_norm(value_view)
        if own.to_attn_logits is None:
            pooled = sum(list(key_view), start=torch.zeros_like(key_view[0])) / len(key_view)
        else:
            pooled = (torch.softmax(own.to_attn_logits(key_view), 0) * key_view).sum(0)
        for head in range(options.heads):
            gradient = self._gradient(head, key_view, value_view, pooled, previous)
            if own.to_layer_modulation is not None:
                raw = own.to_layer_modulation(pooled).reshape(options.heads, -1)[head]
                scale = torch.sigmoid(raw) * options.max_mem_layer_modulation
                gradient = [g * x for g, x in zip(gradient, scale, strict=True)]
            update = self._with_momentum(head, [-g for g in gradient], pooled)
            if options.spectral_norm_surprises:
                update = [u if u.dim() == 1 else _newton_schulz(u) for u in update]
            decay = torch.sigmoid(own.to_decay_factor(pooled)[head])
            for memory, u in zip(self.memory, update, strict=True):
                memory[head] = (1 - self.edit * decay) * memory[head] + self.edit * u
        if options.batch_size and self.seen % options.batch_size == 0:
            if own.transition_gate is not None:
                share = torch.sigmoid(own.transition_gate)
                self.memory = [w + share * (m - w) for w, m in zip(self.anchor, self.memory, strict=True)]
            self.anchor = [m.clone() for m in self.memory]

    def _gradient(
        self, head: int, key_view: Tensor, value_view: Tensor, pooled: Tensor, previous: Weights | None
    ) -> Weights:
        """By autograd, of ``Σ θ_t mean (f(k_t) - v_t)²``."""
        options, own = self.options, self.own
        base = [w[head] for w in self.anchor]
        if own.to_learned_weight_residual_mix is not None and previous is not None:
            mix = torch.sigmoid(own.to_learned_weight_residual_mix(pooled)[head])
            base = [w + mix * p[head] for w, p in zip(base, previous, strict=True)]
        keys, values, steps = [], [], []
        for k, v in zip(key_view, value_view, strict=True):
            key, value, step = self._pair(k, v)
            keys += list(key[head])
            values += list(value[head])
            steps += list(step[head])
        if options.store_with_lookahead_value:
            keys, values, steps = keys[:-1], values[1:], steps[:-1]
            if options.chunk_size * options.num_kv_per_token == 1:  # nothing to look ahead to
                return [torch.zeros_like(w) for w in base]
        with torch.enable_grad():
            variables = [w.detach().clone().requires_grad_() for w in base]
            weights = tuple(w[None] for w in variables)
            losses = [
                step * (own.network.read(weights, key[None, None])[0, 0] - value).square().mean()
                for key, value, step in zip(keys, values, steps, strict=True)
            ]
            loss = torch.stack(losses).sum()
            found = list(torch.autograd.grad(loss, variables, materialize_grads=True))
        limit = options.max_grad_norm
        return found if limit is None else [_soft_clamp(g, limit) for g in found]

    def _pair(self, key_view: Tensor, value_view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one token: keys and values ``(H, U, D)``, steps ``(H, U)``."""
        options, own = self.options, self.own
        key = own.activation(own.to_keys(key_view)).reshape(options.heads, -1, options.dim_head)
        value = own.activation(own.to_values(value_view)).reshape(options.heads, -1, options.dim_head)
        step = torch.sigmoid(own.to_adaptive_step(key_view)).reshape(options.heads, -1)
        return own.k_norm(key[None])[0], value, options.default_step_transform_max_lr * step

    def association(self, weights: Weights, stored: list[Tensor]) -> tuple[Tensor, Weights, Tensor]:
        """``½ ‖f(W; k) - v‖²`` over what some tokens store, its gradient by autograd, steps ``(H, T)``."""
        own, dim = self.own, self.options.dim
        pairs = []
        for one in stored:
            views = (one, one) if len(one) == dim else (one[:dim], one[dim:])
            pairs.append(self._pair(*(own.store_norm(view) for view in views)))
        with torch.enable_grad():
            variables = [w.detach().clone().requires_grad_() for w in weights]
            batch = tuple(w[None] for w in variables)
            errors = [own.network.read(batch, key[None])[0] - value for key, value, _ in pairs]
            loss = torch.stack([0.5 * error.square().sum() for error in errors]).sum()
            found = list(torch.autograd.grad(loss, variables, materialize_grads=True))
        steps = torch.stack([step.mean(-1) for _, _, step in pairs], dim=-1)
        return loss.detach(), found, steps * 2 / self.options.dim_head

    def _with_momentum(self, head: int, surprise: Weights, pooled: Tensor) -> Weights:
        options, own = self.options, self.own
        if own.to_momentum is None:
            return surprise
        gates = torch.sigmoid(own.to_momentum(pooled)).reshape(options.heads, -1)[head]
        levels = [surprise]
        for order, gate in enumerate(gates):
            for i, below in enumerate(levels[-1]):
                self.momentum[order][i][head] = gate * self.momentum[order][i][head] + below
            levels.append([s[head].clone() for s in self.momentum[order]])
        if own.to_learned_momentum_combine is None:
            return levels[-1]
        shares = torch.softmax(own.to_learned_momentum_combine(pooled).reshape(options.heads, -1)[head], 0)
        mixed = levels if options.learned_combine_include_zeroth else levels[1:]
        update = [torch.zeros_like(u) for u in surprise]
        for share, level in zip(shares, mixed, strict=True):
            update = [u + share * x for u, x in zip(update, level, strict=True)]
        return update


class AttentionLoop:
    """One layer's attention along one stream, long-term tokens counted."""

    def __init__(self, attention: SegmentAttention, dtype: torch.dtype) -> None:
        """Nothing seen yet."""
        self.own, self.options = attention, attention.options
        self.keys: list[Tensor] = []
        # Of the token i in row i, (h, D) each; twice as many rows whenever they are full.
        self.turned = torch.zeros(1, self.options.heads, self.options.dim_head, dtype=dtype)
        self.values = torch.zeros_like(self.turned)
        self.dtype = dtype

    def see(self, x: Tensor, first_values: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x (dim,)`` → what is attended to, and the token's own values ``(h, D)``."""
        own, options = self.own, self.options
        query, key, value, plain = (t[0, :, 0] for t in own.project(x[None, None], _row(first_values)))
        now = len(self.keys)
        if now == len(self.turned):
            self.turned = torch.cat([self.turned, torch.zeros_like(self.turned)])
            self.values = torch.cat([self.values, torch.zeros_like(self.values)])
        self.keys.append(key)
        self.turned[now], self.values[now] = self._turn(key, now), value
        if options.sliding_window_attn:
            first = max(now - options.window, 0)
        else:
            first = now // options.window * options.window
        keys = torch.cat([self.turned[first : now + 1], own.persistent[0].transpose(0, 1)])
        values = torch.cat([self.values[first : now + 1], own.persistent[1].transpose(0, 1)])
        scores = (self._turn(query, now) * keys).sum(-1) * options.dim_head**-0.5  # (seen, h)
        y = (torch.softmax(scores, 0)[..., None] * values).sum(0)
        return own.to_out(y.reshape(-1)), plain

    def state(self) -> dict[str, Tensor]:
        """What was last at every place, keys turned by it."""
        options = self.options
        shape = (options.heads, options.segment_len, options.dim_head)
        key, value = torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)
        for index, own in enumerate(self.keys):
            place = index % options.window
            if place < options.segment_len:
                key[:, place], value[:, place] = self._turn(own, place), self.values[index]
        arrays = {"key": key, "value": value}
        if options.sliding_window_attn:
            past = torch.zeros(2, options.heads, options.window, options.dim_head, dtype=self.dtype)
            begins = (len(self.keys) - 1) // options.window * options.window
            for index in range(max(begins - options.window, 0), max(begins, 0)):
                place = index % options.window
                past[0, :, place] = self._turn(self.keys[index], place - options.window)
                past[1, :, place] = self.values[index]
            arrays |= {"past_key": past[0], "past_value": past[1]}
        return arrays

    def _turn(self, x: Tensor, place: int) -> Tensor:
        """The two halves of ``x (h, D)`` as the parts of complex numbers."""
        angle = place * self.own.frequencies
        number = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([number.real, number.imag], dim=-1)


class NeuralMemoryLoop:
    """A memory by itself along one stream."""

    def __init__(self, model: NeuralMemoryModel, edit: Tensor) -> None:
        """``edit (1,)``."""
        self.options = model.options
        views = 2 if self.options.qkv_receives_diff_views else 1
        self.memory = MemoryLoop(model.memory, edit[0], views * self.options.dim)

    @torch.no_grad()
    def see(self, x: Tensor) -> Tensor:
        """One vector ``(width,)`` → the answer ``(dim,)``."""
        if not self.options.qkv_receives_diff_views:
            return self.memory.see(x, x, None)
        return self.memory.see(x[: self.options.dim], x[self.options.dim :], None)

    @property
    def memories(self) -> dict[str, MemoryLoop]:
        """The memory, by what the names of its state begin with."""
        return {"": self.memory}

    def state(self) -> dict[str, Tensor]:
        """The model's state, without its batch axis."""
        return {"position": torch.tensor(self.memory.seen), **self.memory.state()}


class TransformerLoop:
    """A transformer along one stream."""

    def __init__(self, model: TransformerModel, edit: Tensor) -> None:
        """``edit (memories,)``."""
        self.own, self.options = model, model.options
        self.tokens = self.places = 0
        self.attention = [AttentionLoop(layer.attention, edit.dtype) for layer in _layers(model)]
        strengths = iter(edit)
        self.memory = [
            MemoryLoop(layer.memory, next(strengths), layer.views * model.options.dim)
            if layer.memory is not None
            else None
            for layer in _layers(model)
        ]

    @torch.no_grad()
    def see(self, token: Tensor) -> Tensor:
        """One id → logits ``(vocab,)``; first the long-term tokens, where the token begins a segment."""
        if self.tokens and self.tokens % self.options.segment_len == 0:
            for long_term in self.own.long_term:
                self._see(long_term)
        self.tokens += 1
        return self.own.after(self._see(self.own.embedding.weight[token])[None, None])[0, 0]

    @property
    def memories(self) -> dict[str, MemoryLoop]:
        """Every memory, by what the names of its state begin with."""
        return {f"layers.{i}.": memory for i, memory in enumerate(self.memory) if memory is not None}

    def state(self) -> dict[str, Tensor]:
        """The model's state, without its batch axis."""
        arrays = {"position": torch.tensor(self.tokens)}
        for index, (attention, memory) in enumerate(zip(self.attention, self.memory, strict=True)):
            own = {f"attention.{name}": array for name, array in attention.state().items()}
            own |= {} if memory is None else memory.state()
            arrays |= {f"layers.{index}.{name}": array for name, array in own.items()}
        return arrays

    def _see(self, x: Tensor) -> Tensor:
        """One vector through all layers; the streams summed at the end."""
        own, size = self.own, self.options.memory.chunk_size
        chunk = torch.tensor([self.places // size]).to(x)
        x = x + own.chunk_position(chunk) + own.place_position[self.places % size]
        self.places += 1
        streams = x[None] if own.stream_embedding is None else x + own.stream_embedding
        first_values: Tensor | None = None
        before: list[Tensor] = []
        previous: Weights | None = None
        for layer, attention, memory in zip(_layers(own), self.attention, self.memory, strict=True):
            gate = None
            if memory is not None and layer.memory_connection is not None:
                branch, after = _connect(layer.memory_connection, streams)
                query = stored = branch
                if layer.selector is not None:
                    views = layer.selector(branch[None, None], [b[None, None] for b in before])
                    query, stored = views[0, 0, 0], views[1:, 0, 0].flatten()
                began = [w.clone() for w in memory.memory]
                retrieved = memory.see(query, stored, previous)
                previous = began
                if self.options.neural_mem_gate_attn_output:
                    gate = torch.sigmoid(retrieved)
                else:
                    streams = after(retrieved)
            branch, after = _connect(layer.attention_connection, streams)
            attended, values = attention.see(branch, first_values)
            first_values = values if first_values is None else first_values
            attended = attended if gate is None else attended * gate
            streams = after(attended)
            before += [branch, attended]
            branch, after = _connect(layer.feed_forward_connection, streams)
            answer = layer.feed_forward(branch)
            streams = after(answer)
            before += [branch, answer]
        return streams.sum(0)


Loop = NeuralMemoryLoop | TransformerLoop


def loop(model: LibraryModel, edit: Tensor) -> Loop:
    """A new stream of ``model``, in float64 where its weights are; ``edit (memories,)``."""
    if isinstance(model, TransformerModel):
        return TransformerLoop(model, edit)
    return NeuralMemoryLoop(model, edit)


def _connect(connection: torch.nn.Module, streams: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the branch is given of ``streams (s, dim)``, and how its answer comes back."""
    if not isinstance(connection, HyperConnection):
        return streams[0], lambda answer: streams + answer
    count = connection.streams
    unit = streams / streams.norm(dim=-1, keepdim=True)
    mix = unit @ connection.weight + connection.static
    matrix = torch.exp(mix[:, 1 : 1 + count])
    for _ in range(ITERATIONS):
        matrix = matrix / matrix.sum(0)
        matrix = matrix / matrix.sum(1)[:, None]
    branch = (torch.sigmoid(mix[:, :1]) * streams).sum(0)
    moved = matrix.t() @ streams
    weight = 2 * torch.sigmoid(mix[:, -1:])
    return branch, lambda answer: moved + weight * answer


def _layers(model: TransformerModel) -> list[Layer]:
    return [layer for layer in model.layers if isinstance(layer, Layer)]


def _row(values: Tensor | None) -> Tensor | None:
    """``(h, D)`` as of a batch of one row and one token."""
    return None if values is None else values[None, :, None]


def _soft_clamp(gradient: Tensor, limit: float) -> Tensor:
    norm = gradient.norm()
    half = limit / 2
    return gradient * ((torch.tanh(norm / half) + 1) * half / norm) if norm > 0 else gradient


def _newton_schulz(x: Tensor) -> Tensor:
    """Five steps on the singular values alone: ``σ ← 3.4445 σ - 4.7750 σ³ + 2.0315 σ⁵``."""
    left, values, right = torch.linalg.svd(x / max(x.norm(), 1e-7), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    orthogonal: Tensor = left @ torch.diag(values) @ right
    return orthogonal

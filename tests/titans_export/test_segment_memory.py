"""MAC's core equals the paper's equations written with plain lists, one token after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from titans_export.attention import rotate
from titans_export.memory.deep import PeriodicMemory, unpack
from titans_export.memory.mlp import layer_shapes, read
from titans_export.memory.reference import reference_recurrence
from titans_export.memory.segment import SegmentMemory, SegmentWeights
from titans_export.memory.tiles import MemoryForm
from titans_export.recurrence import Tensors, run_core

HEADS, DIM, SEGMENT, PERSISTENT = 2, 4, 6, 2
INNER = HEADS * DIM
FORMS = {
    "matrix": MemoryForm(),
    "matrix without momentum": MemoryForm(momentum=False),
    "matrix, period 3": MemoryForm(period=3),
    "MLP of depth 2, period 2": MemoryForm(depth=2, period=2),
    "MLP of depth 1, period 6": MemoryForm(depth=1, momentum=False, period=6),
}


def _inputs(form: MemoryForm, tokens: int, seed: int) -> tuple[Tensors, Tensors, Tensors]:
    """Tokens of one row, its state at the start of a stream, and the weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    memory = [0.5 * normal(1, HEADS, *shape) for shape in layer_shapes(form.depth, 2, DIM)]
    slots = torch.zeros(2, 1, HEADS, 2 * SEGMENT, DIM, dtype=torch.float64)
    momentum = [torch.zeros_like(weight) for weight in memory] if form.momentum else []
    anchor = memory if form.period > 1 else []
    gates = (2 + form.momentum) * HEADS
    bias = normal(gates) - 1.0
    # Larger steps overshoot, in an MLP or over a period, and amplify rounding.
    bias[-HEADS:] -= 6.0 if form.depth else 1.0 + (form.period > 1)
    shared = SegmentWeights(
        torch.tensor([0.7], dtype=torch.float64),
        normal(HEADS, PERSISTENT, DIM),
        normal(HEADS, PERSISTENT, DIM),
        normal(2 * INNER, INNER),
        0.5 * normal(3 * INNER + gates, INNER),
        bias,
        normal(DIM),
        normal(DIM),
    )
    reference = [weight[0] + 0.1 for weight in memory] if form.depth else []
    carry = (*slots, *memory, *memory, *momentum, *anchor)
    return tuple(normal(1, HEADS, tokens, DIM) for _ in range(4)), carry, (*shared, *reference)


def _by_equations(
    form: MemoryForm, tokens: Tensors, carry: Tensors, shared: Tensors
) -> tuple[Tensor, Tensors]:
    """Outputs ``(H, T, D)`` and the memory, of a stream's first tokens."""
    weights, reference = SegmentWeights(*shared[:8]), shared[8:]
    layers = max(form.depth, 1)
    memory = tuple(carry[2 + layers :])
    rule, outputs = PeriodicMemory(form), []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for t in range(tokens[0].shape[2]):
        query, key, value, question = (x[:, :, t : t + 1] for x in tokens)
        if t % SEGMENT == 0:
            began, keys, values = unpack(form, memory).memory, [], []
        h = read(began, question, form.depth)  # equation 21
        h_key, h_value = (
            (_merged(h) @ weights.context.t()).reshape(1, 1, 2 * HEADS, DIM).transpose(1, 2).split(HEADS, 1)
        )
        place = torch.tensor([t % SEGMENT])
        keys += [rotate(h_key, place), rotate(key, place)]
        values += [h_value, value]
        y = _attention(query, rotate(query, place), keys, values, weights)  # equations 22 and 23
        projected = _merged(y) @ weights.memory.t()
        q, k, v = (
            F.silu(projected[..., : 3 * INNER]).reshape(1, 1, 3 * HEADS, DIM).transpose(1, 2).split(HEADS, 1)
        )
        gates = (projected[..., 3 * INNER :] + weights.gate_bias).transpose(1, 2).split(HEADS, 1)
        log_gates = [F.logsigmoid(gate) for gate in gates[:-1]]
        inputs = (_unit(q), _unit(k), v, log_gates[0], torch.sigmoid(gates[-1]), *log_gates[1:])
        again, memory = reference_recurrence(
            rule, torch.tensor([t]), inputs, memory, (weights.edit, *reference)
        )  # equation 24, and the read of 25
        outputs.append(_norm(y) * weights.attention_norm * torch.sigmoid(_norm(again) * weights.read_norm))
    return torch.cat(outputs, dim=2), memory


def _attention(
    query: Tensor, turned: Tensor, keys: list[Tensor], values: list[Tensor], weights: SegmentWeights
) -> Tensor:
    far = query @ weights.persistent_key.transpose(-1, -2)
    near = turned @ torch.cat(keys, dim=2).transpose(-1, -2)
    probabilities = (torch.cat([far, near], dim=-1) / DIM**0.5).softmax(-1)
    return probabilities @ torch.cat([weights.persistent_value[None], *values], dim=2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(1, 1, INNER)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=10)
@given(tokens=st.integers(1, 3 * SEGMENT + 1), seed=st.integers(0, 1000), data=st.data())
def test_equals_the_equations_however_it_is_cut(
    name: str, tokens: int, seed: int, data: st.DataObject
) -> None:
    form = FORMS[name]
    core = SegmentMemory(form, SEGMENT)
    stream, carry, shared = _inputs(form, tokens, seed)
    expected, memory = _by_equations(form, stream, carry, shared)
    cut = data.draw(st.integers(0, tokens - 1))
    outputs = []
    for start, end in ((0, cut), (cut, tokens)):
        if end > start:
            part = tuple(x[:, :, start:end] for x in stream)
            y, carry = run_core(core, torch.tensor([start]), part, carry, shared)
            outputs.append(y)
    # What follows a norm of a small vector is ill-conditioned: 400 streams were off by 2e-13 at most.
    assert torch.allclose(torch.cat(outputs, dim=2), expected, rtol=1e-10, atol=1e-10)
    layers = max(form.depth, 1)
    for actual, present in zip(carry[2 + layers :], memory, strict=True):
        assert torch.allclose(actual, present, rtol=1e-10, atol=1e-10)


@given(
    first=st.integers(0, 2 * SEGMENT), second=st.integers(0, 2 * SEGMENT), tokens=st.integers(1, SEGMENT + 2)
)
def test_rows_stand_anywhere_in_their_segments(first: int, second: int, tokens: int) -> None:
    """Two rows at different places of their streams, advanced together and alone."""
    core = SegmentMemory(FORMS["matrix"], SEGMENT)
    rows = []
    for row, seen in enumerate((first, second)):
        stream, carry, shared = _inputs(core.form, seen + tokens, row)
        if seen:
            _, carry = run_core(core, torch.tensor([0]), tuple(x[:, :, :seen] for x in stream), carry, shared)
        rows.append((tuple(x[:, :, seen:] for x in stream), carry))
    shared = _inputs(core.form, 1, 0)[2]
    edit = torch.cat([shared[0], shared[0] / 2])
    positions = torch.tensor([first, second])
    together = run_core(
        core,
        positions,
        tuple(torch.cat(pair) for pair in zip(rows[0][0], rows[1][0], strict=True)),
        tuple(torch.cat(pair) for pair in zip(rows[0][1], rows[1][1], strict=True)),
        (edit, *shared[1:]),
    )
    for row, (stream, carry) in enumerate(rows):
        one = slice(row, row + 1)
        alone = run_core(core, positions[one], stream, carry, (edit[one], *shared[1:]))
        for actual, expected in zip((together[0], *together[1]), (alone[0], *alone[1]), strict=True):
            assert torch.allclose(actual[one], expected, rtol=1e-12, atol=1e-12)

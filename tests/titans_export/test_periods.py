"""Memories with a gradient period: tiles equal the token loop whose gradients are autograd's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titans_export.memory import neural_memory
from titans_export.memory.deep import PeriodicMemory
from titans_export.memory.mlp import errors, gelu_slope, layer_shapes, read
from titans_export.memory.reference import reference_recurrence
from titans_export.memory.tiles import MemoryForm
from titans_export.recurrence import Tensors, run_core

BATCH, HEADS, DIM = 3, 2, 6
STEP = {0: 1.0, 1: 0.002, 2: 0.002, 3: 0.002, 4: 0.002}
"""Largest step by depth. The LayerNorm's ε of 1e-3 bounds the curvature of a deep memory's loss by about
1,000: with larger steps the inner descent of one that has been forgotten overshoots, and amplifies rounding
errors, in float64 and float32 alike. The steps that a matrix takes at one point add up over a period."""


@dataclass(frozen=True)
class Case:
    """One random stream: what the memory is, and what it is given."""

    form: MemoryForm
    tokens: int
    seed: int
    retention: str = "random"
    decay: str = "random"
    repeated: bool = False

    def inputs(self) -> tuple[Tensor, Tensors, Tensors, Tensors]:
        """``position, tokens, carry, shared`` in float64."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        shape = (BATCH, HEADS, self.tokens, DIM)
        query, key = (torch.nn.functional.normalize(normal(*shape), dim=-1) for _ in range(2))
        value = normal(*shape)
        if self.repeated:
            key, value = (x[:, :, :1].expand(shape).contiguous() for x in (key, value))
        gates = [
            _log_gate(self.retention, normal(*shape[:3])),
            STEP[self.form.depth]
            / (self.form.period if not self.form.depth else 1)
            * normal(*shape[:3]).sigmoid(),
        ]
        if self.form.momentum:
            gates.append(_log_gate(self.decay, normal(*shape[:3])))
        weights = [
            normal(BATCH, HEADS, *layer) * layer[0] ** -0.5 for layer in layer_shapes(self.form.depth, 2, DIM)
        ]
        momentum = [0.1 * normal(*weight.shape) for weight in weights] if self.form.momentum else []
        anchor = [weight + 0.1 * normal(*weight.shape) for weight in weights] if self.form.period > 1 else []
        reference = [weight[0] + 0.1 for weight in weights] if self.form.depth else []
        position = torch.randint(0, 50, (BATCH,), generator=generator)
        edit = torch.tensor([0.0, 1.0, 0.4], dtype=torch.float64)
        return position, (query, key, value, *gates), (*weights, *momentum, *anchor), (edit, *reference)


def _log_gate(kind: str, raw: Tensor) -> Tensor:
    constant = {"one": 0.0, "zero": -math.inf}
    if kind in constant:
        return torch.full_like(raw, constant[kind])
    return torch.nn.functional.logsigmoid(raw + 2.0)


forms = st.builds(
    MemoryForm,
    depth=st.integers(0, 4),
    momentum=st.booleans(),
    period=st.sampled_from([1, 2, 3, 4, 7, 16]),
)
cases = st.builds(
    Case,
    form=forms,
    tokens=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    retention=st.sampled_from(["random", "one", "zero"]),
    decay=st.sampled_from(["random", "one", "zero"]),
    repeated=st.booleans(),
)


def _flat(result: tuple[Tensor, Tensors]) -> list[Tensor]:
    return [result[0], *result[1]]


def _assert_equal(actual: tuple[Tensor, Tensors], expected: tuple[Tensor, Tensors], limit: float) -> None:
    for one, other in zip(_flat(actual), _flat(expected), strict=True):
        assert one.shape == other.shape
        assert torch.isfinite(one).all()
        scale = max(float(other.abs().max()), 1.0)
        assert float((one.double() - other).abs().max()) <= limit * scale


def _single(tensors: Tensors) -> Tensors:
    return tuple(tensor.float() for tensor in tensors)


@settings(max_examples=60)
@given(cases)
def test_tiles_equal_the_token_loop(case: Case) -> None:
    core, inputs = PeriodicMemory(case.form), case.inputs()
    expected = reference_recurrence(core, *inputs)
    _assert_equal(run_core(core, *inputs), expected, 1e-12)
    position, *rest = inputs
    _assert_equal(run_core(core, position, *(_single(part) for part in rest)), expected, 1e-4)


@settings(max_examples=30)
@given(cases, st.data())
def test_cuts_change_nothing(case: Case, data: st.DataObject) -> None:
    core, (position, tokens, carry, shared) = PeriodicMemory(case.form), case.inputs()
    whole = run_core(core, position, tokens, carry, shared)
    outputs, start = [], 0
    while start < case.tokens:
        count = data.draw(st.integers(1, case.tokens - start))
        part = tuple(x[:, :, start : start + count] for x in tokens)
        y, carry = run_core(core, position + start, part, carry, shared)
        outputs.append(y)
        start += count
    _assert_equal((torch.cat(outputs, dim=2), carry), whole, 1e-12)


@settings(max_examples=30)
@given(cases)
def test_a_row_is_what_it_is_alone(case: Case) -> None:
    """Whatever the positions and edit strengths of the rows beside it."""
    core, (position, tokens, carry, (edit, *reference)) = PeriodicMemory(case.form), case.inputs()
    together = run_core(core, position, tokens, carry, (edit, *reference))
    for row in range(BATCH):
        one = slice(row, row + 1)
        alone = run_core(
            core,
            position[one],
            tuple(x[one] for x in tokens),
            tuple(x[one] for x in carry),
            (edit[one], *reference),
        )
        expected = together[0][one], tuple(x[one] for x in together[1])
        _assert_equal(alone, expected, 1e-12)


@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 12), st.integers(0, 1000))
def test_a_step_of_zero_leaves_the_memory_untouched(depth: int, period: int, tokens: int, seed: int) -> None:
    form = MemoryForm(depth, momentum=False, period=period)
    position, (query, key, value, _, step), carry, shared = Case(form, tokens, seed, retention="one").inputs()
    gates = torch.zeros_like(step), torch.zeros_like(step)
    _, after = run_core(PeriodicMemory(form), position, (query, key, value, *gates), carry, shared)
    for weight, present in zip(carry[: max(depth, 1)], after, strict=False):
        assert torch.equal(weight, present)


@given(st.integers(1, 40), st.integers(0, 1000), st.booleans())
def test_a_matrix_with_period_one_is_the_exact_rule(tokens: int, seed: int, momentum: bool) -> None:
    form = MemoryForm(0, momentum, 1)
    position, inputs, carry, (edit,) = Case(form, tokens, seed).inputs()
    query, key, value, log_retention, step, *decay = inputs
    log_momentum = decay[0] if momentum else torch.full_like(step, -math.inf)
    past = carry[1] if momentum else torch.zeros_like(carry[0])
    expected = neural_memory(
        query, key, value, log_retention, log_momentum, step, edit, carry[0], past, tile=8
    )
    y, present = run_core(PeriodicMemory(form), position, inputs, carry, (edit,))
    _assert_equal((y, present), (expected[0], expected[1 : 2 + momentum]), 1e-12)


@pytest.mark.parametrize("depth", range(5))
def test_errors_are_autograds(depth: int) -> None:
    generator = torch.Generator().manual_seed(depth)
    shapes = layer_shapes(depth, 2, DIM)
    weights = [torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    key, value = torch.randn(2, 1, 1, 5, DIM, generator=generator, dtype=torch.float64)
    inputs, deltas = errors(tuple(weights), key, value, depth)
    for t in range(5):
        variables = [weight.clone().requires_grad_() for weight in weights]
        one = slice(t, t + 1)
        loss = 0.5 * (read(tuple(variables), key[:, :, one], depth) - value[:, :, one]).square().sum()
        for layer, gradient in enumerate(torch.autograd.grad(loss, variables)):
            outer = inputs[layer][:, :, one].transpose(-1, -2) * deltas[layer][:, :, one]
            assert torch.allclose(outer, gradient, rtol=1e-12, atol=1e-12)


def test_gelu_slope_is_autograds() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
    assert torch.allclose(gelu_slope(x.detach()), expected, rtol=1e-12, atol=1e-14)

"""Whole models of every architecture and memory: the oracle, streams, the state-space mode, memory bounds."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.titans_export.memory_inputs import relative_error
from titans_export.config import ARCHITECTURES, PRESETS, ModelConfig
from titans_export.memory import neural_memory, token_loop
from titans_export.memory.deep import PeriodicMemory
from titans_export.memory.output import MemoryOutput
from titans_export.memory.reference import reference_recurrence
from titans_export.memory.tiles import MemoryForm
from titans_export.model import Rules, State, TitansModel, state_schema
from titans_export.recurrence import run_core

MEMORIES: dict[str, dict[str, object]] = {
    "matrix": {},
    "matrix, period 4": {"period": 4},
    "MLP of depth 2, period 4": {"memory_depth": 2, "period": 4, "learned_memory": True},
    "MLP of depth 1, period 1": {"memory_depth": 1, "learned_memory": True, "momentum": False},
    "matrix, all switched off": {"momentum": False, "retention": False, "convolution": False},
}
MEMBERS = [f"{architecture}: {memory}" for architecture in ARCHITECTURES for memory in MEMORIES]
TOKENS = 27


def _config(member: str) -> ModelConfig:
    architecture, memory = member.split(": ")
    return dataclasses.replace(PRESETS["tiny"], architecture=architecture, **MEMORIES[memory])


def _model(config: ModelConfig, rules: Rules | None = None) -> TitansModel:
    """Random weights with lively gates, the same ones whatever the rules are."""
    torch.manual_seed(0)
    model = TitansModel(config, rules or Rules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double().eval()


def _token_loop_rule(*inputs: Tensor, tile: int) -> MemoryOutput:
    del tile
    return token_loop(*inputs)


def _staggered(model: TitansModel) -> tuple[Tensor, State]:
    """Edit strengths by row and layer, and the state of rows that have seen 0, 5 and 18 tokens."""
    edit = torch.tensor([[0.0, 1.0], [1.0, 0.5], [0.3, 0.0]]).to(model.head.weight)
    rows = []
    for row, seen in enumerate((0, 5, 18)):
        state = model.initial_state(1)
        if seen:
            state |= model(_ids(1, seen, row), edit[row : row + 1], state).state
        rows.append(state)
    return edit, {name: torch.cat([state[name] for state in rows]) for name in rows[0]}


def _ids(batch: int, tokens: int, seed: int) -> Tensor:
    return torch.randint(256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _assert_close(actual: State, expected: State, limit: float) -> None:
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            assert relative_error(actual[name], tensor.clamp_min(0) + tensor.clamp_max(0)) <= limit, name
        else:
            assert torch.equal(actual[name], tensor), name


@torch.no_grad()
@pytest.mark.parametrize("member", MEMBERS)
def test_equals_the_oracle_however_it_is_cut(member: str) -> None:
    """Outputs and state, in float64 and float32, with rows at different positions of their streams."""
    config, ids = _config(member), _ids(3, TOKENS, 9)
    oracle, model = _model(config, Rules(_token_loop_rule, reference_recurrence)), _model(config)
    edit, state = _staggered(oracle)
    whole = oracle(ids, edit, state)
    expected = whole.state | {"logits": whole.logits}
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        model = model.to(dtype)
        for places in ([], [1], [8], [3, 4, 16, 26]):
            present = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
            logits = []
            for start, end in itertools.pairwise([0, *places, TOKENS]):
                output = model(ids[:, start:end], edit.to(dtype), present)
                present |= output.state
                logits.append(output.logits)
            _assert_close(present | {"logits": torch.cat(logits, dim=1)}, expected, limit)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_later_tokens_change_no_earlier_logits(architecture: str) -> None:
    model = _model(_config(f"{architecture}: MLP of depth 2, period 4"))
    ids, edit = _ids(1, TOKENS, 1), torch.ones(1, 2, dtype=torch.float64)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 256
    before, after = (model(x, edit, model.initial_state(1)).logits for x in (ids, changed))
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@torch.no_grad()
@pytest.mark.parametrize("member", MEMBERS)
def test_the_state_is_as_large_after_many_tokens_as_before_the_first(member: str) -> None:
    config = _config(member)
    model = _model(config)
    edit, state = torch.zeros(1, 2, dtype=torch.float64), model.initial_state(1)
    schema = {name: (1, *entry.shape) for name, entry in state_schema(config).items()}
    for tokens in (1, 2, 100, 1):
        state |= model(_ids(1, tokens, tokens), edit, state).state
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == schema


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_switched_off_leaves_neither_state_nor_weights(architecture: str) -> None:
    config = dataclasses.replace(PRESETS["tiny"], architecture=architecture)
    whole = TitansModel(config)
    for switch, entry in (("momentum", "momentum"), ("convolution", "conv"), ("retention", None)):
        without = dataclasses.replace(config, **{switch: False})
        smaller = TitansModel(without)
        parameters = [sum(p.numel() for p in model.parameters()) for model in (whole, smaller)]
        assert parameters[1] < parameters[0]
        names = [name for name in state_schema(config) if entry and name.endswith(f".{entry}")]
        assert len(names) == (config.layers if entry else 0)
        assert not set(names) & set(state_schema(without))


# --- the state-space mode


def _gates(batch: int, heads: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, tokens, generator=generator, dtype=torch.float64)


@settings(max_examples=20)
@given(tokens=st.integers(1, 40), seed=st.integers(0, 1000), momentum=st.booleans())
def test_edit_zero_is_the_gated_state_space_model(tokens: int, seed: int, momentum: bool) -> None:
    """``h_{t+1} = A_t h_t + B_t x_t`` with data-dependent ``A_t``, ``B_t`` for every head, written out here.

    With momentum the state is ``[M; S]`` and ``A_t`` a two by two matrix of scalars.
    """
    batch, heads, dim = 2, 3, 4
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, tokens, dim, generator=generator, dtype=torch.float64)
    retention, decay, step = _gates(batch, heads, tokens, seed).sigmoid()
    if not momentum:
        decay = torch.zeros_like(decay)
    h = torch.randn(batch, heads, 2, dim, dim, generator=generator, dtype=torch.float64)
    edit = torch.zeros(batch, dtype=torch.float64)
    y, memory, surprise = neural_memory(
        q, k, v, retention.log(), decay.log(), step, edit, h[:, :, 0], h[:, :, 1], tile=8
    )
    for b, head in itertools.product(range(batch), range(heads)):
        state = h[b, head]
        for t in range(tokens):
            a, eta, theta = (float(gate[b, head, t]) for gate in (retention, decay, step))
            A = torch.tensor([[a, eta], [0.0, eta]], dtype=torch.float64)
            B = theta * torch.stack([k[b, head, t], k[b, head, t]])  # what x_t = v_t enters by
            state = torch.einsum("ij,jkv->ikv", A, state) + torch.einsum("ik,v->ikv", B, v[b, head, t])
            assert torch.allclose(y[b, head, t], state[0].T @ q[b, head, t], rtol=1e-12, atol=1e-12)
        assert torch.allclose(
            torch.stack([memory[b, head], surprise[b, head]]), state, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
@pytest.mark.parametrize("period", [3, 4])
def test_edit_zero_is_linear_in_the_state_of_every_memory(depth: int, period: int) -> None:
    """Two pasts, the same tokens: what differs afterwards is the decayed difference, and only for λ = 0."""
    from tests.titans_export.test_periods import Case

    form = MemoryForm(depth, momentum=False, period=period)
    position, tokens, carry, (_, *reference) = Case(form, 10, seed=1).inputs()
    other = tuple(x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) for x in carry)
    kept = tokens[3].sum(-1).exp()[..., None, None]  # the product of all retentions
    for strength, linear in ((0.0, True), (1.0, False)):
        edit = torch.full((3,), strength, dtype=torch.float64)
        after = [
            run_core(PeriodicMemory(form), position, tokens, past, (edit, *reference))[1]
            for past in (carry, other)
        ]
        differences = [
            torch.allclose(b - a, kept * (y - x), rtol=1e-9, atol=1e-12)
            for a, b, x, y in zip(*after, carry, other, strict=True)
        ][: max(depth, 1)]
        assert all(differences) if linear else not any(differences)


# --- memory of a long call


class _LargestTensor(TorchDispatchMode):
    """The most elements that any operator's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        del types
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                stored = min(value.numel(), value.untyped_storage().nbytes() // max(value.element_size(), 1))
                self.elements = max(self.elements, stored)
        return result


@torch.no_grad()
@pytest.mark.parametrize("member", MEMBERS)
def test_a_long_forward_builds_nothing_of_tokens_times_memory(member: str) -> None:
    """4,096 tokens; neither tokens × memory nor, where there is attention, tokens × tokens."""
    tokens, config = 4096, dataclasses.replace(_config(member), layers=1, vocab_size=64)
    model = _model(config).float()
    state = model.initial_state(1)
    memory = max(
        math.prod(e.shape) for n, e in state_schema(config).items() if n.startswith("layers.0.memory")
    )
    with _LargestTensor() as largest:
        model.features(_ids(1, tokens, 0) % 64, torch.ones(1, 1), state)
    widest = tokens * max(6 * config.inner, config.d_ff, 3 * config.heads * config.tile)
    scores = config.heads * 512 * (512 + config.window)
    assert largest.elements <= max(widest, scores)
    assert max(widest, scores) < tokens * memory / 1.2
    assert max(widest, scores) < tokens * tokens / 4

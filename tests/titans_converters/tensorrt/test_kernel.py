"""The kernel, interpreted on the CPU, equals the token loop, whatever the gates and sizes."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.titans_converters.tensorrt.interpreter import RunKernel
from tests.titans_export.memory_inputs import MemoryCase, memory_cases, relative_error
from titans_converters import memory_op
from titans_converters.tensorrt.kernel import neural_memory_kernel
from titans_export.memory import token_loop

TILE = 16


def _assert_equals_token_loop(run_kernel: RunKernel, inputs: dict[str, Tensor], block: int = 16) -> None:
    feeds = {name: np.ascontiguousarray(inputs[name].float().numpy()) for name in memory_op.INPUTS}
    expected = token_loop(**inputs)
    for name, actual, exact in zip(memory_op.OUTPUTS, run_kernel(feeds, block), expected, strict=True):
        assert actual.shape == tuple(exact.shape), name
        assert np.isfinite(actual).all(), name
        assert relative_error(torch.from_numpy(actual), exact) <= 1e-4, name


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(case=memory_cases)
def test_kernel_equals_token_loop(run_kernel: RunKernel, case: MemoryCase) -> None:
    _assert_equals_token_loop(run_kernel, case.tensors())


@pytest.mark.parametrize("tokens", [1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 3 * TILE + 1])
@pytest.mark.parametrize("edit", [0.0, 1.0])
def test_repeated_key_at_every_tile_boundary(run_kernel: RunKernel, tokens: int, edit: float) -> None:
    """One key throughout, open gates, full steps: what a Neumann series loses in float32."""
    case = MemoryCase(tokens, 1, "near_one", "random", "one", repeated_keys=True, edit=(edit, 1.0))
    decay = torch.full((2, 3, tokens), 0.9, dtype=torch.float64).log()
    _assert_equals_token_loop(run_kernel, case.tensors() | {"log_momentum": decay})


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.integers(1, 20),
    heads=st.integers(1, 2),
    key_dim=st.sampled_from([1, 5, 16, 24, 64]),
    value_dim=st.sampled_from([1, 16, 33, 64]),
    block=st.sampled_from([16, 32, 64]),
)
def test_widths_and_blocks(
    run_kernel: RunKernel, tokens: int, heads: int, key_dim: int, value_dim: int, block: int
) -> None:
    """Widths that fill no block, and columns cut among programs."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stream = (2, heads, tokens)
    inputs = {
        "query": torch.nn.functional.normalize(normal(*stream, key_dim), dim=-1),
        "key": torch.nn.functional.normalize(normal(*stream, key_dim), dim=-1),
        "value": normal(*stream, value_dim),
        "log_retention": -normal(*stream).abs(),
        "log_momentum": -normal(*stream).abs(),
        "step": normal(*stream).sigmoid(),
        "edit": torch.tensor([1.0, 0.5], dtype=torch.float64),
        "past_memory": normal(2, heads, key_dim, value_dim),
        "past_momentum": normal(2, heads, key_dim, value_dim),
    }
    _assert_equals_token_loop(run_kernel, inputs, block)


@pytest.mark.parametrize("tokens", [1, TILE, TILE + 3])
def test_step_zero_leaves_the_memory_untouched(run_kernel: RunKernel, tokens: int) -> None:
    case = MemoryCase(tokens, 5, "one", "zero", "zero", repeated_keys=False, edit=(1.0, 0.0))
    feeds = {name: tensor.float().numpy() for name, tensor in case.tensors().items()}
    feeds["past_momentum"] = np.zeros_like(feeds["past_momentum"])
    _, memory, momentum = run_kernel(feeds, 16)
    assert np.array_equal(memory, feeds["past_memory"])
    assert np.array_equal(momentum, feeds["past_momentum"])


def test_parameters_follow_the_operator_contract() -> None:
    parameters = list(inspect.signature(neural_memory_kernel.fn).parameters)
    tensors = (*memory_op.INPUTS, "T", *memory_op.OUTPUTS)
    assert tuple(parameters[: len(tensors)]) == tensors

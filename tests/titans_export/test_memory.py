"""The laws of the memory rule: every form equals the token loop, whatever the gates, cuts and tiles."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from tests.titans_export.memory_inputs import INPUTS, TILE, MemoryCase, memory_cases, relative_error
from titans_converters import memory_op
from titans_export.memory import neural_memory, token_loop
from titans_export.memory.linear import segment_products, unit_lower_inverse


@given(memory_cases)
def test_float64_equals_token_loop(case: MemoryCase) -> None:
    inputs = case.tensors()
    for actual, expected in zip(neural_memory(**inputs, tile=TILE), token_loop(**inputs), strict=True):
        assert relative_error(actual, expected) <= 1e-12


@given(memory_cases)
def test_float32_equals_token_loop(case: MemoryCase) -> None:
    inputs = case.tensors()
    single = {name: tensor.float() for name, tensor in inputs.items()}
    for actual, expected in zip(neural_memory(**single, tile=TILE), token_loop(**inputs), strict=True):
        assert torch.isfinite(actual).all()
        assert relative_error(actual, expected) <= 1e-4


@pytest.mark.parametrize("edit", [0.0, 1.0])
def test_repeated_key_in_a_full_tile(edit: float) -> None:
    """One key for 200 tokens at the shipped tile, the case that a Neumann series loses in float32."""
    case = MemoryCase(200, 1, "near_one", "random", "one", repeated_keys=True, edit=(edit, edit))
    inputs = case.tensors() | {"log_momentum": torch.full((2, 3, 200), 0.9, dtype=torch.float64).log()}
    single = {name: tensor.float() for name, tensor in inputs.items()}
    for actual, expected in zip(neural_memory(**single, tile=32), token_loop(**inputs), strict=True):
        assert relative_error(actual, expected) <= 1e-4


@pytest.mark.parametrize("wanted", [(), ("log_momentum", "past_momentum")])
@pytest.mark.parametrize("edit", [0.0, 0.7])
@pytest.mark.parametrize("tokens", [TILE, 2 * TILE + 3])
def test_without_momentum_it_and_its_gradients_equal_the_token_loops(
    tokens: int, edit: float, wanted: tuple[str, ...]
) -> None:
    inputs = MemoryCase(tokens, 1, "near_one", "zero", "random", False, edit=(edit, edit)).tensors()
    names = ("query", "key", "value", "log_retention", "step", "past_memory", *wanted)
    inputs |= {name: inputs[name].requires_grad_() for name in names}
    results = []
    for outputs in (neural_memory(**inputs, tile=TILE), token_loop(**inputs)):
        loss = torch.stack([output.sin().sum() for output in outputs]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, [inputs[name] for name in names])])
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_without_momentum_none_of_its_products_are_taken() -> None:
    def products(momentum: str) -> int:
        case = MemoryCase(2 * TILE, 1, "near_one", momentum, "random", False, edit=(1.0, 1.0))
        return _products(lambda: neural_memory(**case.tensors(), tile=TILE))

    # Before the tiles E's sums, W, r and its correction; in each of two a correction and a read.
    assert products("random") - products("zero") == 4 + 2 * 2


def test_the_inverse_takes_two_products_back() -> None:
    inverse = unit_lower_inverse(torch.randn(4, 32, 32).tril(-1).requires_grad_())
    assert _products(inverse.sum().backward) == 2


class _Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(  # PyTorch's own signature
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        self.count += func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs if isinstance(kwargs, dict) else {}))


def _products(run: Callable[[], object]) -> int:
    with _Products() as products:
        run()
    return products.count


@given(memory_cases, st.integers(1, 3 * TILE))
def test_a_cut_changes_nothing(case: MemoryCase, cut: int) -> None:
    inputs = case.tensors()
    cut = min(cut, case.tokens)
    whole = neural_memory(**inputs, tile=TILE)
    per_token = INPUTS[:6]
    first = neural_memory(**inputs | {name: inputs[name][:, :, :cut] for name in per_token}, tile=TILE)
    if cut == case.tokens:
        return
    rest = {name: inputs[name][:, :, cut:] for name in per_token}
    past = {"past_memory": first[1], "past_momentum": first[2]}
    second = neural_memory(**inputs | rest | past, tile=TILE)
    assert relative_error(torch.cat([first[0], second[0]], dim=2), whole[0]) <= 1e-12
    assert relative_error(second[1], whole[1]) <= 1e-12
    assert relative_error(second[2], whole[2]) <= 1e-12


@given(memory_cases, st.integers(1, 40))
def test_tile_changes_nothing(case: MemoryCase, tile: int) -> None:
    inputs = case.tensors()
    for actual, expected in zip(
        neural_memory(**inputs, tile=tile), neural_memory(**inputs, tile=TILE), strict=True
    ):
        assert relative_error(actual, expected) <= 1e-12


@given(memory_cases)
def test_rows_are_independent(case: MemoryCase) -> None:
    """A row of a batch equals the row alone, whatever the other row's edit strength."""
    inputs = case.tensors()
    together = neural_memory(**inputs, tile=TILE)
    alone = neural_memory(**{name: tensor[1:] for name, tensor in inputs.items()}, tile=TILE)
    for actual, expected in zip(alone, together, strict=True):
        assert relative_error(actual[0], expected[1]) <= 1e-12


@given(memory_cases)
def test_without_editing_it_is_a_state_space_model(case: MemoryCase) -> None:
    """λ = 0, η = 0: ``h_t = a_t h_{t-1} + θ_t k_t v_tᵀ``, written out here on its own."""
    inputs = case.tensors()
    inputs |= {"edit": torch.zeros(2, dtype=torch.float64)}
    inputs |= {"log_momentum": torch.full_like(inputs["log_momentum"], float("-inf"))}
    hidden = inputs["past_memory"]
    outputs = []
    for t in range(case.tokens):
        a = inputs["log_retention"][:, :, t].exp()[..., None, None]
        b = inputs["step"][:, :, t][..., None, None] * inputs["key"][:, :, t][..., None]
        hidden = a * hidden + b * inputs["value"][:, :, t][..., None, :]
        outputs.append((hidden * inputs["query"][:, :, t][..., None]).sum(-2))
    output, memory, _ = neural_memory(**inputs, tile=TILE)
    assert relative_error(output, torch.stack(outputs, dim=2)) <= 1e-12
    assert relative_error(memory, hidden) <= 1e-12


@pytest.mark.parametrize("tokens", [1, TILE, 3 * TILE + 1])
def test_step_zero_leaves_the_memory_untouched(tokens: int) -> None:
    case = MemoryCase(tokens, 5, "one", "zero", "zero", repeated_keys=False, edit=(1.0, 0.0))
    inputs = {name: tensor.float() for name, tensor in case.tensors().items()}
    inputs["past_momentum"].zero_()
    _, memory, momentum = neural_memory(**inputs, tile=TILE)
    assert torch.equal(memory, inputs["past_memory"])
    assert torch.equal(momentum, inputs["past_momentum"])


def test_one_update_is_a_gradient_step_on_the_associative_loss() -> None:
    case = MemoryCase(1, 3, "one", "zero", "random", repeated_keys=False, edit=(1.0, 1.0))
    inputs = case.tensors()
    memory = inputs["past_memory"].clone().requires_grad_()
    read = torch.einsum("bhkv,bhtk->bhtv", memory, inputs["key"])
    loss = 0.5 * (read - inputs["value"]).square().sum()
    (gradient,) = torch.autograd.grad(loss, memory)
    _, updated, _ = neural_memory(**inputs, tile=TILE)
    expected = inputs["past_memory"] - inputs["step"][..., None] * gradient
    assert relative_error(updated, expected) <= 1e-12


def test_arguments_follow_the_operator_contract() -> None:
    names = tuple(inspect.signature(neural_memory).parameters)
    assert names[:-1] == memory_op.INPUTS
    assert names[-1] == "tile"


@pytest.mark.parametrize("tiles", [1, 5])
def test_segment_products_survive_closed_gates(tiles: int) -> None:
    """Of few tiles and of many, whose sums are one product."""
    log_gate = torch.tensor([0.0, -1.0, float("-inf"), -0.5]).reshape(1, 4, 1).repeat(tiles, 1, 1)
    products = segment_products(log_gate)[-1]
    assert torch.isfinite(products).all()
    assert products[3, 2] == pytest.approx(torch.tensor(-0.5).exp().item())
    assert products[3, 1] == 0.0
    assert torch.equal(products.diagonal(), torch.ones(4))


@pytest.mark.parametrize("size", [1, 2, 5, 32, 33, 48, 64])
def test_unit_lower_inverse(size: int) -> None:
    matrix = torch.randn(size, size, dtype=torch.float64).tril(-1) / size**0.5
    identity = torch.eye(size, dtype=torch.float64)
    product = unit_lower_inverse(matrix) @ (identity + matrix)
    assert torch.allclose(product, identity, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 18])
def test_gradients_of_the_inverse(size: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(2, size, size, dtype=torch.float64).tril(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda n: unit_lower_inverse(n.tril(-1)), matrix)
    assert torch.autograd.gradgradcheck(lambda n: unit_lower_inverse(n.tril(-1)), matrix)
    (gradient,) = torch.autograd.grad(unit_lower_inverse(matrix).sum(), matrix)
    assert torch.equal(gradient, gradient.tril(-1))


def test_segment_products_keep_their_digits_where_products_do_not() -> None:
    torch.manual_seed(0)
    log_gate = -4 * torch.rand(40, 32, 1)
    with torch.autocast("cpu", torch.bfloat16):
        products = segment_products(log_gate)
    assert relative_error(products, segment_products(log_gate.double())) < 1e-6
    assert torch.allclose(products.double(), segment_products(log_gate.double()), rtol=1e-4, atol=0)


def test_gradients_of_segment_products() -> None:
    """Of many tiles, a shut gate included, beside those of products one by one."""
    torch.manual_seed(0)
    gate = torch.rand(6, 5, 1, dtype=torch.float64)
    gate[2, 3] = 0.0
    log_gate = gate.log().requires_grad_()
    weights = torch.randn(6, 5, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((segment_products(log_gate) * weights).sum(), log_gate)
    one_by_one = [segment_products(tile[None])[0] for tile in log_gate]
    (expected,) = torch.autograd.grad((torch.stack(one_by_one) * weights).sum(), log_gate)
    assert torch.allclose(gradient, expected, atol=1e-12)
    assert gradient[2, 3] == 0.0

"""Gradients of a memory of one's own are autograd's: where it stops, where values are equal, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from titans_converters import gradient_check
from titans_converters.differentiation import gradient
from titans_converters.memory import memory_gradient

WIDTH = 6
Form = Callable[[Tensor, Tensor], Tensor]


class _Memory:
    """A matrix, whose answers a test's function is given, with the queries."""

    def __init__(self, form: Form, **parameters: tuple[int, ...]) -> None:
        self.parameters: Mapping[str, tuple[int, ...]] = {"w": (WIDTH, WIDTH), **parameters}
        self._form = form

    def forward(self, weights: Mapping[str, Tensor], query: Tensor) -> Tensor:
        return self._form(query @ weights["w"], query)

    def loss(self, weights: Mapping[str, Tensor], key: Tensor, value: Tensor) -> Tensor:
        return (self.forward(weights, key) - value / 3).square().sum((1, 2))


def _session(memory: _Memory) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(memory_gradient(memory, WIDTH).SerializeToString())


def _compare(
    memory: _Memory,
    session: onnxruntime.InferenceSession,
    weights: Mapping[str, Tensor],
    key: Tensor,
    value: Tensor,
) -> None:
    """The graph's loss and gradients with autograd's, both in float32."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    loss = memory.loss(leaves, key, value)
    expected = torch.autograd.grad(loss.sum(), list(leaves.values()))
    given = {f"past.{name}": weight.numpy() for name, weight in weights.items()}
    names = ["loss", *(f"grad.{name}" for name in leaves)]
    found = session.run(names, given | {"key": key.numpy(), "value": value.numpy()})
    for name, own, reference in zip(names, found, (loss.detach(), *expected), strict=True):
        scale = reference.abs().max().item()
        np.testing.assert_allclose(own, reference.numpy(), rtol=1e-4, atol=1e-5 * scale + 1e-6, err_msg=name)


def _no_grad(a: Tensor, _: Tensor) -> Tensor:
    with torch.no_grad():
        constant, view = a.tanh(), a.transpose(-1, -2)
        largest, _ = a.max(-1, keepdim=True)
        with torch.enable_grad():
            learns = a.sin()
    return a * constant + learns * view.transpose(-1, -2) + largest


def _switched(a: Tensor, _: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    constant = a.tanh()
    torch.set_grad_enabled(True)
    return a * constant


# Each of a memory's answers and its queries.
STOPS: dict[str, Form] = {
    "detach": lambda a, _: a * a.detach().sin(),
    "what is behind has no derivative": lambda a, _: a * a.detach().round(),
    "straight through": lambda a, _: a + (a.round() - a).detach(),
    "no_grad": _no_grad,
    "set_grad_enabled": _switched,
}
TIES: dict[str, Form] = {
    "maximum, minimum": lambda a, q: (
        torch.maximum(a, q) * torch.minimum(a, 2 * a) + torch.max(a, a @ q.mT @ q)
    ),
    "maximum and minimum in turn": lambda a, _: torch.minimum(
        torch.maximum(a, torch.zeros(())), torch.ones(())
    ),
    "clamp": lambda a, _: (
        a.clamp(-1, 1) + a.clamp(min=0) * 3 + a.clamp(max=2.0) + a.clamp(0, 2).clamp(1, 3) * 5
    ),
    "clamp by tensors": lambda a, q: a.clamp(min=q) + a.clamp(-q.abs(), q.abs()) * 3 + a.clamp_max(q) * 5,
    "relu and clamp": lambda a, _: F.relu(a).clamp(max=1.0),
    "relu6, hardtanh": lambda a, _: F.relu6(a) + 3 * F.hardtanh(a) + F.hardtanh(a, 0.0, 2.0),
    "max, min": lambda a, _: a + a.max(-1, keepdim=True).values * 3 + a.min(1).values[:, None] * a,
    "amax, amin": lambda a, _: a + a.amax(-1, keepdim=True) * 3 + a.amin((1, 2), keepdim=True) * a + a.max(),
    "norms": lambda a, _: (
        a
        + a.norm(dim=-1, keepdim=True) * 3
        + a.norm(p=1, dim=1)[:, None]
        + a.norm(p=torch.inf, dim=(1, 2), keepdim=True)
    ),
    "normalize": lambda a, _: F.normalize(a, dim=-1),
    "logsumexp": lambda a, _: a * a.logsumexp(-1, keepdim=True) + a.logsumexp((1, 2), keepdim=True),
    "elu, leaky_relu": lambda a, _: F.elu(a) + 3 * F.elu(a, 2.0) + F.leaky_relu(a) * F.leaky_relu(a, 0.3),
    "powers of whole numbers": lambda a, _: a.pow(torch.tensor([0, 1, 2, 3, 2, 1])) + a**3,
    "powers with none": lambda a, _: a.pow(torch.tensor([0.0, 1.0, 2.0, 3.0, 2.0, 1.0])) + 3 * a**0,
    "powers by exponent": lambda a, q: 2**a + (q.abs() + 1) ** (a / 4) + torch.zeros(()) ** a.abs(),
    "steps": lambda a, _: torch.cat([a[..., 1::2].flip(1), a[..., ::3], a[:, :, 5:]], -1) * a.flip(1, 2),
    "gather": lambda a, q: a.gather(-1, (q > 0).long()) * a.gather(1, torch.zeros_like(a).long()),
    "einsum": lambda a, q: (
        torch.einsum("btd,bud,bue->bte", a, q, a)
        + torch.einsum("btd,bue->btd", a, q)
        + torch.einsum("btd->bd", a)[:, None]
    ),
}


@pytest.mark.parametrize("case", [*STOPS, *TIES])
def test_gradients_are_those_of_autograd(case: str) -> None:
    memory = _Memory((STOPS | TIES)[case])
    session = _session(memory)
    generator = torch.Generator().manual_seed(len(case))
    w, key, value = (torch.randn(2, n, WIDTH, generator=generator) for n in (WIDTH, 5, 5))
    _compare(memory, session, {"w": w}, key, value)
    w, key, value = (x.round().clamp(-1, 1) for x in (w, key, value))  # often equal, and sums are exact
    _compare(memory, session, {"w": w}, key, value)
    _compare(memory, session, {"w": torch.zeros_like(w)}, key, value)


def test_norms_learn_their_weights() -> None:
    class Normed(_Memory):
        def forward(self, weights: Mapping[str, Tensor], query: Tensor) -> Tensor:
            scale, shift = weights["scale"][0], weights["shift"].mean(0)
            answer = F.layer_norm(query @ weights["w"], (WIDTH,), scale, shift)
            return F.rms_norm(answer + query, (WIDTH,), shift)

    memory = Normed(lambda a, _: a, scale=(WIDTH,), shift=(WIDTH,))
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(2, *shape, generator=generator) for name, shape in memory.parameters.items()}
    pairs = (torch.randn(2, 5, WIDTH, generator=generator) for _ in range(2))
    _compare(memory, _session(memory), weights, *pairs)


def test_what_is_all_constant_has_a_gradient_of_zeros() -> None:
    session = _session(_Memory(lambda a, _: a.detach()))
    draw = np.random.default_rng(0)
    given = {
        name: draw.standard_normal((2, WIDTH, WIDTH)).astype(np.float32)
        for name in ("past.w", "key", "value")
    }
    (found,) = session.run(["grad.w"], given)
    assert not found.any()


class _Sine(torch.autograd.Function):
    """A sine whose derivative is said to be 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return gradient


def _in_place(a: Tensor, _: Tensor) -> Tensor:
    b = a * 1.0
    with torch.no_grad():
        b.mul_(2)
    return a * b


def _behind(a: Tensor, _: Tensor) -> Tensor:
    b = a * 1.0
    b.detach().mul_(2)
    return a * b


def _autocast(a: Tensor, q: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (a @ q.mT @ q).float()


REFUSED: dict[str, tuple[Form, str]] = {
    "half": (
        lambda a, q: (a.half() @ q.mT.half()).float() @ q,
        "MatMul gives float16, .* compute in float32",
    ),
    "bfloat16": (lambda a, _: a.bfloat16().float(), "Cast gives bfloat16"),
    "autocast": (_autocast, "gives bfloat16"),
    "data": (lambda a, _: a * a.data, r"Tensor.data is not traced; write detach\(\)"),
    "in place": (_in_place, r"aten.mul_.Tensor changes a tensor in place under torch.no_grad\(\)"),
    "in place, behind a detach": (_behind, "loss is not what autograd gives"),
    "a derivative of its own": (lambda a, _: _Sine.apply(a), "grad.w is not what autograd gives"),
    "attention": (
        lambda a, q: F.scaled_dot_product_attention(a, q, q),
        "_Memory.loss: operator aten.scaled_dot_product_attention.default has no form in ONNX",
    ),
    "inverse": (
        lambda a, q: a @ torch.linalg.inv(q.mT @ q + torch.eye(WIDTH)),
        "operator aten.linalg_inv_ex.default has no form in ONNX",
    ),
    "sorted": (lambda a, _: a.sort(-1).values, "operator TopK has no derivative"),
    "a diagonal": (lambda a, q: torch.einsum("btt->bt", q.mT @ a)[:, None] * a, "Einsum btt->bt is not diff"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_cannot_tell_is_refused(case: str) -> None:
    form, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as refused:
        memory_gradient(_Memory(form), WIDTH)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250


def test_a_memory_that_branches_on_its_weights_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"_Memory.loss: no trace: Could not guard on data-dependent"):
        memory_gradient(_Memory(lambda a, _: a if a.sum() > 0 else 2 * a), WIDTH)
    capsys.readouterr()  # what the exporter prints of it


def test_the_comparison_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr("titans_converters.memory.check_gradient", lambda *given: checked.append(given))
    proto = memory_gradient(_Memory(lambda a, _: a.sin()), WIDTH)
    ((same, program),) = checked
    assert same is proto
    gradient_check.check_gradient(proto, program)
    (last,) = (node for node in proto.graph.node if "grad.w" in node.output)
    last.op_type = "Neg"
    with pytest.raises(ValueError, match=r"grad\.w is not what autograd gives"):
        gradient_check.check_gradient(proto, program)


@pytest.mark.parametrize("operator", ["Gelu", "QuickGelu"])
def test_an_operator_of_another_domain_is_named(operator: str) -> None:
    """Shape inference knows no type of its result, and a rule is not found by its name alone."""
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
    case (float[b, 3] past) => (float[b] loss) {{
        y = com.microsoft.{operator}(past)
        axes = Constant<value_ints = [1]>()
        loss = ReduceSum<keepdims = 0>(y, axes)
    }}""")
    model.graph.input[0].name = model.graph.node[0].input[0] = "past.m"
    with pytest.raises(ValueError, match=f"operator com.microsoft.{operator} has no derivative"):
        gradient(model, ["m"], "case")

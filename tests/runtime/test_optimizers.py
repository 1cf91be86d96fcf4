"""Every optimizer beside its PyTorch counterpart, 20 steps from random matrices and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import titans_runtime as tr
from titans_runtime.backends import Array, Arrays
from titans_runtime.optimizers import (
    OPTIMIZERS,
    Adagrad,
    Adam,
    Gates,
    Muon,
    Optimizer,
    Sgd,
    Step,
    Titans,
    orthogonalised,
)

STEPS, SHAPE = 20, (1, 2, 6, 4)
Peer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def _run(optimizer: Optimizer, start: Array, gradients: Array, gates: list[Gates] | None = None) -> Array:
    value, moments = start, {name: np.zeros_like(start) for name in optimizer.moments}
    for count, gradient in enumerate(gradients):
        given = Step(gradient, moments, count, gates[count] if gates else Gates())
        value, moments = optimizer.step(value, given)
        assert value.dtype == np.float32
        assert set(moments) == set(optimizer.moments)
    return value


def _data(seed: int = 0) -> tuple[Array, Array]:
    draw = np.random.default_rng(seed)
    start = draw.standard_normal(SHAPE).astype(np.float32)
    return start, draw.standard_normal((STEPS, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize(
    ("own", "peer"),
    [
        (Sgd(0.1), lambda ps: torch.optim.SGD(ps, 0.1)),
        (Sgd(0.1, momentum=0.9), lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9)),
        (Titans(0.1, momentum=0.9, retention=1.0), lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9)),
        (Adam(0.02), lambda ps: torch.optim.Adam(ps, 0.02)),
        (Adam(0.02, momentum=0.5), lambda ps: torch.optim.Adam(ps, 0.02, betas=(0.5, 0.999))),
        (Adam(0.02, retention=0.998), lambda ps: torch.optim.AdamW(ps, 0.02, weight_decay=0.1)),
        (Muon(0.02), lambda ps: torch.optim.Muon(ps, 0.02, weight_decay=0.0)),
        (Muon(0.02, retention=0.998), lambda ps: torch.optim.Muon(ps, 0.02, weight_decay=0.1)),
        (Adagrad(0.1), lambda ps: torch.optim.Adagrad(ps, 0.1, initial_accumulator_value=1.0, eps=0.0)),
    ],
    ids=lambda one: str(one) if not callable(one) else "",
)
def test_twenty_steps_are_those_of_pytorch(
    own: Optimizer, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon is compared without its rounding to bfloat16, which is all that differs."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    start, gradients = _data()
    flat = start.reshape(-1, *SHAPE[-2:])
    matrices = [torch.nn.Parameter(torch.tensor(matrix)) for matrix in flat]
    optimizer = peer(matrices)
    for gradient in gradients:
        for parameter, own_gradient in zip(matrices, gradient.reshape(flat.shape), strict=True):
            parameter.grad = torch.tensor(own_gradient)
        optimizer.step()
    expected = torch.stack([parameter.detach() for parameter in matrices]).numpy().reshape(SHAPE)
    assert np.abs(expected - start).max() > 0.1
    np.testing.assert_allclose(_run(own, start, gradients), expected, rtol=1e-5, atol=1e-5)


def test_titans_follows_the_gates_that_it_is_given() -> None:
    """``S ← η S - θ g``, ``M ← a M + S``: products of the decays over a step's tokens, mean step size."""
    draw = np.random.default_rng(1)
    start, gradients = _data(1)
    drawn = [draw.uniform(0.2, 1.0, (3, 1, 2, 5)).astype(np.float32) for _ in range(STEPS)]
    gates = [Gates(a, eta, theta) for a, eta, theta in drawn]
    memory, momentum = start.astype(np.float64), np.zeros(SHAPE)
    floored = memory.copy(), momentum.copy()
    for gradient, (a, eta, theta) in zip(gradients, drawn, strict=True):
        kept, decay, size = a.prod(-1), eta.prod(-1), theta.mean(-1)
        for floor, which in ((0.0, 0), (0.9, 1)):
            m, s = (memory, momentum) if which == 0 else floored
            s = decay[..., None, None] * s - 2.0 * size[..., None, None] * gradient
            m = np.maximum(kept, floor)[..., None, None] * m + s
            if which == 0:
                memory, momentum = m, s
            else:
                floored = m, s
    np.testing.assert_allclose(_run(Titans(2.0), start, gradients, gates), memory, rtol=1e-4, atol=1e-5)
    with_floor = _run(Titans(2.0, floor=0.9), start, gradients, gates)
    np.testing.assert_allclose(with_floor, floored[0], rtol=1e-4, atol=1e-5)
    assert np.abs(with_floor).max() > np.abs(memory).max()


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (2, 3, 8)])
def test_newton_schulz_draws_singular_values_towards_one(shape: tuple[int, ...]) -> None:
    matrices = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    values = np.linalg.svd(orthogonalised(matrices), compute_uv=False)
    assert values.min() > 0.3
    assert values.max() < 1.3


@pytest.mark.parametrize("factor", [1e22, 1e37])
def test_matrices_whose_squares_overflow_are_orthogonalised_as_others_are(factor: float) -> None:
    matrices = np.random.default_rng(2).standard_normal((2, 3, 5)).astype(np.float32)
    large = orthogonalised(matrices * np.float32(factor))
    np.testing.assert_allclose(large, orthogonalised(matrices), rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class Sign:
    """A step of one length in every number."""

    size: float = 1.0
    retention: float = 1.0
    moments: tuple[str, ...] = ()

    def step(self, value: Array, given: Step) -> tuple[Array, Arrays]:
        moved = np.float32(self.size) * np.sign(given.gradient)
        return np.float32(self.retention) * value - moved, {}


def test_a_program_adds_an_optimizer(model: tr.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tr.UsageError, match="'sign'"):
        tr.Editor(objective="association", optimizer="sign")
    monkeypatch.setitem(OPTIMIZERS, "sign", Sign)
    with pytest.raises(tr.UsageError, match="momentum: the optimizer sign has none"):
        tr.Editor(objective="association", optimizer="sign", momentum=0.5)
    editor = tr.Editor(objective="association", optimizer="sign", step=0.125, retention=0.5, chunk=4)
    edited, plain = model.session(editor=editor), model.session(editor=None)
    assert editor.to_dict()["optimizer"] == "sign"
    for session in (edited, plain):
        session.append(b"one, two,")
    assert edited.last_edit is not None
    assert [lesson.steps for lesson in edited.last_edit.lessons] == [1, 1]
    assert any(difference.changed for difference in tr.compare(edited, plain))

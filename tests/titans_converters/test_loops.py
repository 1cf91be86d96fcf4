"""Loops over tiles for PyTorch's compiler, as Python runs them: against one token after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.end_to_end.family import MEMORIES
from titans_converters.loops import GradientLoop, OneToken
from titans_converters.program import RecurrenceProgram
from titans_export.config import PRESETS
from titans_export.model import TitansModel
from titans_export.recurrence_programs import exact_program, recurrence_programs

SIZES = [(1, 1), (2, 7), (3, 13)]  # the tile has 8 tokens
SIGNS = {"log_retention": -1.0, "log_momentum": -1.0, "step": 0.1, "edit": 1.0}
"""Of gates; other inputs of a recurrence may be anything small."""


@pytest.fixture(scope="module", params=["exact", "segments"])
def recurrence(request: pytest.FixtureRequest) -> RecurrenceProgram:
    if request.param == "exact":
        return exact_program(PRESETS["tiny"])
    torch.manual_seed(1)
    config = replace(PRESETS["tiny"], architecture="mac", **MEMORIES["MLP of depth 2, period 4"])
    (found,) = recurrence_programs(TitansModel(config).eval())
    return found


def draw(recurrence: RecurrenceProgram, batch: int, tokens: int) -> dict[str, Tensor]:
    """Inputs; rows stand at different positions of their tiles."""
    free = {"batch": batch, "tokens": tokens}
    axes = {name: recurrence.one.input_axes[name] for name in recurrence.one.inputs}
    axes |= {name: recurrence.tiles.input_axes[name] for name in recurrence.tokens}
    sizes = {name: [free.get(str(axis), axis) for axis in shape] for name, shape in axes.items()}
    inputs = {
        name: torch.rand(shape) * SIGNS[name] if name in SIGNS else 0.2 * torch.randn(shape)
        for name, shape in sizes.items()
    }
    if "position" in inputs:
        inputs["position"] = torch.arange(batch) * 5 + 3
    return inputs


def one_by_one(recurrence: RecurrenceProgram, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The read, the state, and what is revealed."""
    now, results = dict(inputs), []
    for place in range(inputs[recurrence.tokens[0]].shape[2]):
        now |= {name: inputs[name][:, :, place : place + 1] for name in recurrence.tokens}
        results.append(recurrence.one.module(*now.values()))
        now |= dict(zip(recurrence.carry, results[-1][1:], strict=False))
        if "position" in now:
            now["position"] = now["position"] + 1
    joined = [0] if recurrence.revealed is None else [0, len(recurrence.carry) + 1]
    return [
        torch.cat([result[i] for result in results], dim=2) if i in joined else last
        for i, last in enumerate(results[-1])
    ]


def test_results_and_gradients(recurrence: RecurrenceProgram) -> None:
    loop, one = GradientLoop(recurrence), OneToken(recurrence)
    torch.manual_seed(0)
    for batch, tokens in SIZES:
        inputs = draw(recurrence, batch, tokens)
        leaves = [inputs[name].requires_grad_() for name in (*recurrence.tokens, *recurrence.carry)]
        expected, found = one_by_one(recurrence, inputs), loop(list(inputs.values()))
        if tokens == 1:
            for same, other in zip(one(list(inputs.values())), expected, strict=False):
                torch.testing.assert_close(same, other)
        weights = [torch.randn_like(x) for x in expected]
        losses = [
            [(x * weight).sum() for x, weight in zip(results, weights, strict=True)]
            for results in (found, expected)
        ]
        gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
        for mine, reference in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
            limit = 1e-4 * max(float(reference.detach().abs().max()), 1e-3)
            torch.testing.assert_close(mine, reference, rtol=0, atol=limit)

"""Loops over tiles for PyTorch's compiler, as Python runs them: against one token after the other."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.end_to_end.family import MEMORIES
from tests.titans_export.importers.cases import TRANSFORMER_BASE
from titans_converters.gradient_loops import GradientLoop, GradientTileLoop
from titans_converters.loops import OneToken, Together
from titans_converters.program import Program, RecurrenceProgram
from titans_export.config import PRESETS
from titans_export.importers.titans_pytorch import stream
from titans_export.importers.titans_pytorch.core import LibraryCore, Streamed
from titans_export.importers.titans_pytorch.exportable import ImportedModel
from titans_export.importers.titans_pytorch.options import TransformerOptions
from titans_export.importers.titans_pytorch.transformer import TransformerModel
from titans_export.model import TitansModel
from titans_export.recurrence import run_core
from titans_export.recurrence_programs import exact_program, recurrence_programs

SIZES = [(1, 1), (2, 7), (3, 13)]  # the tile has 8 tokens
SIGNS = {"log_retention": -1.0, "log_momentum": -1.0, "step": 0.1, "edit": 1.0}
"""Of gates; other inputs of a recurrence may be anything small."""


@pytest.fixture(scope="module", params=["exact", "segments"])
def recurrence(request: pytest.FixtureRequest) -> RecurrenceProgram:
    if request.param == "exact":
        return in_float64(exact_program(PRESETS["tiny"]))
    torch.manual_seed(1)
    config = replace(PRESETS["tiny"], architecture="mac", **MEMORIES["MLP of depth 2, period 4"])
    (found,) = recurrence_programs(TitansModel(config).eval())
    return in_float64(found)


def in_float64(recurrence: RecurrenceProgram) -> RecurrenceProgram:
    """The same recurrence, traced in float64: in float32 gradients of random states are mostly rounding."""
    parts = {name: getattr(recurrence, name) for name in ("one", "tiles", "step", "rows")}
    return replace(recurrence, **{name: _in_float64(part) for name, part in parts.items()})


def _in_float64(part: Program) -> Program:
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in part.inputs.items()}
    dtypes = {
        name: torch.float64 if part.dtype(name).is_floating_point else part.dtype(name)
        for name in part.output_axes
    }
    return replace(part, inputs=inputs, output_dtypes=dtypes)


def draw(recurrence: RecurrenceProgram, batch: int, tokens: int) -> dict[str, Tensor]:
    """Inputs; rows stand at different positions of their tiles."""
    free = {"batch": batch, "tokens": tokens}
    axes = {name: recurrence.one.input_axes[name] for name in recurrence.one.inputs}
    axes |= {name: recurrence.tiles.input_axes[name] for name in recurrence.tokens}
    sizes = {name: [free.get(str(axis), axis) for axis in shape] for name, shape in axes.items()}
    inputs = {
        name: (torch.rand(shape) * SIGNS[name] if name in SIGNS else 0.2 * torch.randn(shape)).double()
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
            limit = 1e-9 * max(float(reference.detach().abs().max()), 1e-3)
            torch.testing.assert_close(mine, reference, rtol=0, atol=limit)


@pytest.fixture(scope="module", params=[1, 99], ids=["chunks at once", "chunk by chunk"])
def imported(request: pytest.FixtureRequest) -> tuple[TransformerModel, Together]:
    """A recurrence that takes all tiles at once, with a loop for each memory."""
    arguments = TRANSFORMER_BASE | {"neural_mem_weight_residual": True, "neural_memory_segment_len": 4}
    model = TransformerModel(TransformerOptions.read(arguments)).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with mock.patch.object(stream, "LEAST_TOGETHER", request.param):
        recurrence, _ = ImportedModel(model, {"tokenizer": "ids"}).recurrences()
        assert recurrence.together
        return model, Together(recurrence, GradientTileLoop)


@pytest.mark.parametrize(("batch", "tokens"), SIZES)
def test_all_tiles_at_once(imported: tuple[TransformerModel, Together], batch: int, tokens: int) -> None:
    """Results and gradients are those of the model itself."""
    model, whole = imported
    streamed = Streamed(model)
    torch.manual_seed(0)
    ids, edit = torch.randint(0, 32, (batch, tokens)), torch.rand(batch, 2)
    with torch.no_grad():
        _, *past = streamed(torch.randint(0, 32, (batch, 11)), edit, *streamed.initial_state(batch))
        weights = dict(model.named_parameters())
        embedded = model.before(ids)[:, None]
    leaves = [x.clone().requires_grad_() for x in past if x.is_floating_point()]
    past[1:] = leaves
    core = LibraryCore(model, tuple(weights))
    output, state = run_core(core, past[0], (embedded,), tuple(past), (edit, *weights.values()))
    expected = [output, *state[1:]]
    found = whole([past[0], embedded, *past, edit, *weights.values()])
    assert torch.equal(found.pop(1), state[0])
    directions = [torch.randn_like(x) for x in expected]
    gradients = [
        torch.autograd.grad(results, leaves, directions, allow_unused=True) for results in (found, expected)
    ]
    for mine, reference in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert (mine is None) == (reference is None)
        if reference is not None:
            limit = 1e-4 * max(float(reference.detach().abs().max()), 1e-3)
            torch.testing.assert_close(mine, reference, rtol=0, atol=limit)

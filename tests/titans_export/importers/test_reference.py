"""The fast forms against the token loop, which knows no tiles; titans-pytorch itself is not needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.titans_export.importers.cases import (
    MEMORY_BASE,
    MEMORY_CASES,
    TRANSFORMER_BASE,
    TRANSFORMER_CASES,
)
from tests.titans_export.importers.library import MEMORY, TRANSFORMER, sequence_for, streamed
from titans_export.importers.titans_pytorch import goldens, stream
from titans_export.importers.titans_pytorch.core import Streamed
from titans_export.importers.titans_pytorch.keys import LibraryModel, build_model
from titans_export.importers.titans_pytorch.options import MemoryOptions, TransformerOptions
from titans_export.importers.titans_pytorch.reference import Loop, TransformerLoop, loop

_TRANSFORMERS = (
    "several chunks a segment",
    "sliding window with long-term tokens",
    "chunks across long-term tokens",
    "weight residual",
)


def _random(kind: str, arguments: dict[str, Any]) -> LibraryModel:
    read = MemoryOptions.read if kind == MEMORY else TransformerOptions.read
    model = build_model(kind, read(arguments)).double().eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(params=[1, 99], ids=["chunks at once", "chunk by chunk"])
def least(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to take gradients, whatever the chunks' size."""
    monkeypatch.setattr(stream, "LEAST_TOGETHER", request.param)


_CASES = [
    *((MEMORY, MEMORY_BASE | case, name) for name, case in MEMORY_CASES.items()),
    *((TRANSFORMER, TRANSFORMER_BASE | TRANSFORMER_CASES[name], name) for name in _TRANSFORMERS),
]


@pytest.mark.usefixtures("least")
@pytest.mark.parametrize(("kind", "arguments"), [pytest.param(k, a, id=name) for k, a, name in _CASES])
def test_streams_answer_as_the_token_loop_does(kind: str, arguments: dict[str, Any]) -> None:
    model = _random(kind, arguments)
    sequence = sequence_for(model, 1, 29)
    edit = torch.tensor([[0.7] * model.edit_layers]).double()
    row = loop(model, edit[0])
    expected = torch.stack([row.see(token) for token in sequence[0]])
    found = streamed(model, sequence, [1, 5, 1, 1, 9, 3], edit)[0]
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.usefixtures("least")
@pytest.mark.parametrize(("kind", "arguments"), [pytest.param(k, a, id=name) for k, a, name in _CASES])
def test_the_state_is_that_of_the_token_loop(kind: str, arguments: dict[str, Any]) -> None:
    model = _random(kind, arguments)
    sequence = sequence_for(model, 1, 23)
    edit = torch.tensor([[0.7] * model.edit_layers]).double()
    row = loop(model, edit[0])
    for token in sequence[0]:
        row.see(token)
    streamed_model = Streamed(model)
    with torch.no_grad():
        _, *state = streamed_model(sequence[:, :7], edit, *streamed_model.initial_state(1))
        _, *state = streamed_model(sequence[:, 7:], edit, *state)
    for (name, expected), found in zip(row.state().items(), state, strict=True):
        assert torch.allclose(found[0], expected, rtol=1e-9, atol=1e-9), name


@pytest.mark.usefixtures("least")
def test_rows_stand_at_positions_of_their_own() -> None:
    model = _random(TRANSFORMER, TRANSFORMER_BASE | TRANSFORMER_CASES["sliding window with long-term tokens"])
    whole = Streamed(model)
    sequence = sequence_for(model, 2, 40)
    edit = torch.tensor([[1.0, 0.2], [0.0, 1.0]]).double()
    apart, states = [], []
    with torch.no_grad():
        for row, begun in ((0, 7), (1, 12)):
            own, strength = sequence[row : row + 1], edit[row : row + 1]
            _, *state = whole(own[:, :begun], strength, *whole.initial_state(1))
            states.append(state)
            apart.append(whole(own[:, begun : begun + 20], strength, *state)[0])
        together = [torch.cat(tensors) for tensors in zip(*states, strict=True)]
        parts = torch.cat([sequence[:1, 7:27], sequence[1:, 12:32]])
        found = whole(parts, edit, *together)[0]
        single = whole(parts[:, :1], edit, *together)[0]
    assert torch.allclose(found, torch.cat(apart), rtol=1e-9, atol=1e-9)
    assert torch.allclose(single, torch.cat(apart)[:, :1], rtol=1e-9, atol=1e-9)


def test_without_editing_the_memory_stays_as_it_began_bit_for_bit() -> None:
    model = _random(MEMORY, MEMORY_BASE | MEMORY_CASES["gradient norm"])
    whole = Streamed(model)
    with torch.no_grad():
        _, *state = whole(sequence_for(model, 2, 19), torch.zeros(2, 1).double(), *whole.initial_state(2))
    for name, tensor in zip(model.state(), state, strict=True):
        if name.startswith("memory."):
            assert torch.equal(tensor, model.learned_state()[name].expand_as(tensor))


def test_goldens_tell_of_every_token_that_their_loops_see(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _random(TRANSFORMER, TRANSFORMER_BASE | TRANSFORMER_CASES["sliding window with long-term tokens"])
    rows, told = [], []

    def kept(own: LibraryModel, edit: torch.Tensor) -> Loop:
        rows.append(loop(own, edit))
        return rows[-1]

    monkeypatch.setattr(goldens, "loop", kept)
    goldens.make_goldens(model, watch=told.append)
    assert sum(told) == sum(row.tokens for row in rows if isinstance(row, TransformerLoop)) > 0
    assert max(told) == 1

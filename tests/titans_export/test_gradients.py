"""The exported gradient graphs of every member of the family against PyTorch autograd in float64.

The first member always; the others, which take up to a minute each to trace, in the suite ``family``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.end_to_end.family import MEMBERS, config_of
from titans_converters.gradients import gradient_graphs
from titans_converters.onnx.autodiff import subgraphs
from titans_converters.onnx.trace import trace
from titans_export.exportable import load_exportable
from titans_export.gradients import association, editable, prediction
from titans_export.model import State, TitansModel
from titans_export.training.checkpoint import load_checkpoint, save_checkpoint

TOKENS = (1, 9, 26)
"""Within a tile, a period and a segment, and across their ends."""


class Member(NamedTuple):
    """One of the family."""

    model: TitansModel
    graphs: dict[str, onnx.ModelProto]
    sessions: dict[str, onnxruntime.InferenceSession]


def _marked(member: str) -> object:
    return pytest.param(member, marks=[] if member == MEMBERS[0] else pytest.mark.suite("family"))


@pytest.fixture(scope="module", params=[_marked(member) for member in MEMBERS])
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    """A model in float64, and the graphs that its bundle would have."""
    torch.manual_seed(2)
    model = TitansModel(config_of(request.param))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("member")
    save_checkpoint(model, folder)
    exportable = load_exportable(folder)
    program = next(program for program in exportable.programs() if program.name == "model")
    found = gradient_graphs(trace(program, exportable.recurrences()), editable(model))
    graphs = {name: ir.to_proto(graph) for name, graph in found.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(graph.SerializeToString(), options)
        for name, graph in graphs.items()
    }
    return Member(load_checkpoint(folder).double(), graphs, sessions)


@torch.no_grad()
def _state(model: TitansModel, edit: torch.Tensor, seen: int) -> State:
    """As after ``seen`` random tokens, with memories moved at random, in numbers that float32 holds."""
    ids = torch.randint(model.config.vocab_size, (1, seen))
    state = model.initial_state(1) | model(ids, edit, model.initial_state(1)).state
    for name in editable(model):
        state[name] = state[name] + 0.05 * torch.randn_like(state[name])
    return {
        name: tensor.float().double() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("objective", ["prediction", "association"])
def test_gradients_are_those_of_autograd(member: Member, objective: str, tokens: int) -> None:
    model = member.model
    torch.manual_seed(tokens)
    edit = torch.rand(1, model.config.layers).double().float().double()
    state = _state(model, edit, seen=int(torch.randint(3, 40, ())))
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    targets = torch.randint(model.config.vocab_size, (1, tokens))
    targets[0, : tokens // 4] = -1
    if objective == "prediction":
        expected = prediction(model, ids, targets, edit, state)
    else:
        expected = association(model, ids, edit, state)
    given = {"input_ids": ids, "target_ids": targets, "edit": edit.float()} | {
        f"past.{name}": tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    graph = member.sessions[f"gradient.{objective}"]
    names = [output.name for output in graph.get_outputs()]
    inputs = {value.name: given[value.name].numpy() for value in graph.get_inputs()}
    found = dict(zip(names, graph.run(None, inputs), strict=True))
    assert {name for name in names if not name.startswith("gate.")} == expected.keys()
    for name, tensor in expected.items():
        error, scale = float(np.abs(found[name] - tensor.numpy()).max()), float(tensor.abs().max())
        assert scale > 0, name
        assert error <= 1e-5 * scale, name


def test_no_gradient_looks_for_sizes_while_it_runs(member: Member) -> None:
    """All sizes of what is broadcast are known when the graph is written, within loops, too."""
    graph = member.graphs["gradient.prediction"].graph
    assert not [node.output[0] for node in _nodes(graph) if node.op_type == "NonZero"]


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _nodes(inner)

"""A transformer of titans-pytorch, exported: streamed, restored, and its gradient graph against autograd."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import titans_runtime as tr
from tests.runtime.streams import run_graph
from tests.titans_export.importers.cases import TRANSFORMER_BASE
from titans_export.importers.titans_pytorch import stream
from titans_export.importers.titans_pytorch.association import Association
from titans_export.importers.titans_pytorch.checkpoint import LIBRARY, save_imported
from titans_export.importers.titans_pytorch.core import Streamed
from titans_export.importers.titans_pytorch.options import TransformerOptions, to_dict
from titans_export.importers.titans_pytorch.transformer import TransformerModel
from titans_export.pipeline import export_bundle
from titans_runtime.backends import Array

pytestmark = pytest.mark.suite("titans-pytorch")

_ARGUMENTS = TRANSFORMER_BASE | {"sliding_window_attn": True}
_FORMS = {
    "chunk by chunk": {"num_longterm_mem_tokens": 2},
    "segmented windows": {"num_longterm_mem_tokens": 2, "sliding_window_attn": False},
    "chunks at once": {
        "num_longterm_mem_tokens": 4,
        "neural_memory_segment_len": 4,
        "neural_mem_weight_residual": True,
    },
}


@pytest.fixture(scope="module", params=_FORMS)
def trained(request: pytest.FixtureRequest) -> Iterator[TransformerModel]:
    least = 1 if request.param == "chunks at once" else 99
    with mock.patch.object(stream, "LEAST_TOGETHER", least):
        yield _random(_ARGUMENTS | _FORMS[request.param])


def _random(arguments: dict[str, Any]) -> TransformerModel:
    model = TransformerModel(TransformerOptions.read(arguments)).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model(trained: TransformerModel, tmp_path_factory: pytest.TempPathFactory) -> tr.Model:
    folder = tmp_path_factory.mktemp("imported")
    config: dict[str, Any] = {"library": LIBRARY, "class": "MemoryAsContextTransformer", "tokenizer": "ids"}
    save_imported(trained, config | {"options": to_dict(trained.options)}, folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")  # fails unless the token loop's goldens are met
    return tr.load(folder / "bundle", threads=1)


def _ids(*shape: int, seed: int = 0) -> Array:
    ids: Array = np.random.default_rng(seed).integers(0, 32, shape)
    return ids


@pytest.mark.parametrize("lengths", [[60], [1] * 60, [7, 1, 1, 12, 3, 36]])
def test_a_stream_cut_anywhere(trained: TransformerModel, model: tr.Model, lengths: list[int]) -> None:
    ids, session, start, logits = _ids(60), model.session(), 0, []
    for length in lengths:
        logits.append(session.append(ids[start : start + length]))
        start += length
    stream = Streamed(trained)
    with torch.no_grad():
        expected = stream(torch.tensor(ids)[None], torch.ones(1, 2), *stream.initial_state(1))[0][0].numpy()
    assert np.abs(np.concatenate(logits) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("position", [5, 8, 9, 17])
def test_a_session_is_saved_wherever_it_stands(model: tr.Model, tmp_path: Path, position: int) -> None:
    session = model.session()
    session.append(_ids(position))
    session.save(tmp_path / "memory")
    again, following = model.load_session(tmp_path / "memory"), _ids(21, seed=1)
    assert np.array_equal(again.append(following), session.append(following))


@pytest.mark.parametrize("tokens", [1, 5, 8, 13])
def test_the_gradient_of_prediction_is_autograds(
    trained: TransformerModel, model: tr.Model, tokens: int
) -> None:
    """Of calls shorter than a segment, as long, and longer, which begin in the middle of one.

    Autograd in float64: at these random weights its own float32 is up to 3e-4 away, and ours, by processor,
    up to 1.1e-4.
    """
    ids, targets = _ids(2, tokens), _ids(2, tokens, seed=1)
    targets[0, tokens // 2] = -1
    stream, edit = Streamed(trained), torch.ones(2, 2)
    with torch.no_grad():
        _, *state = stream(torch.tensor(_ids(2, 11, seed=2)), edit, *stream.initial_state(2))
    past = dict(zip(trained.state(), state, strict=True))
    memories = [name for name, entry in trained.state().items() if entry.role == "memory"]
    exact = {name: x.double() if x.is_floating_point() else x for name, x in past.items()}
    leaves = {name: exact[name].clone().requires_grad_() for name in memories}
    oracle = Streamed(copy.deepcopy(trained).double())
    logits = oracle(torch.tensor(ids), edit.double(), *(exact | leaves).values())[0].log_softmax(-1)
    known = torch.tensor(targets) >= 0
    chosen = logits.gather(-1, torch.tensor(targets).clamp(min=0)[..., None])[..., 0]
    loss = -(chosen * known).sum(-1)
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))

    given = {"input_ids": ids, "target_ids": targets, "edit": edit.numpy()}
    given |= {f"past.{name}": tensor.detach().contiguous().numpy() for name, tensor in past.items()}
    found = run_graph(model, "gradient.prediction", given, tokens)
    assert np.allclose(found["loss"], loss.detach().numpy(), rtol=1e-4)
    for name, gradient in zip(memories, gradients, strict=True):
        error = np.abs(found[f"grad.{name}"] - gradient.numpy()).max()
        assert error <= 2e-4 * max(float(gradient.abs().max()), 1e-3), name


def test_the_gradient_of_association_is_autograds(trained: TransformerModel, model: tr.Model) -> None:
    """Whatever the calls stand in: rows begin in the middle of chunks, and long-term tokens come between."""
    tokens, ids, stream, edit = 13, _ids(2, 13), Streamed(trained), torch.rand(2, 2)
    with torch.no_grad():
        _, *state = stream(torch.tensor(_ids(2, 11, seed=2)), edit, *stream.initial_state(2))
        stored = Association(trained)._stored(torch.tensor(ids), (edit, *state))
    past = dict(zip(trained.state(), state, strict=True))
    given = {"input_ids": ids, "edit": edit.numpy()}
    given |= {f"past.{name}": tensor.detach().numpy() for name, tensor in past.items()}
    found, total = run_graph(model, "gradient.association", given, tokens), np.zeros(2)
    for (prefix, memory), own in zip(trained.memories.items(), stored, strict=True):
        names = [name for name in past if name.startswith(f"{prefix}memory.")]
        leaves = [past[name].detach().clone().requires_grad_() for name in names]
        key, value, _ = (x.detach() for x in memory.taught(own))
        loss = 0.5 * (memory.network.read(tuple(leaves), key) - value).square().sum((1, 2, 3))
        total += loss.detach().numpy()
        np.testing.assert_allclose(found[f"loss.{prefix}memory"], loss.detach().numpy(), rtol=1e-4)
        for name, gradient in zip(names, torch.autograd.grad(loss.sum(), leaves), strict=True):
            error = np.abs(found[f"grad.{name}"] - gradient.numpy()).max()
            assert error <= 1e-5 * float(gradient.abs().max()), name
    np.testing.assert_allclose(found["loss"], total, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 8, 17, None])
def test_the_editor_takes_chunks_of_any_length(model: tr.Model, chunk: int | None) -> None:
    session = model.session(edit=0.0)
    own = {} if chunk is None else {"chunk": chunk}
    report = session.observe(_ids(26, seed=4), editor=tr.Editor(objective="prediction", step=0.05, **own))
    losses = [lesson.loss for lesson in report.lessons if lesson.learnt]  # the last token has no target yet
    assert np.isfinite(losses).all()
    assert session.position == 26


def test_learning_from_a_text_makes_it_likelier(model: tr.Model) -> None:
    text = _ids(24, seed=3)
    plain, learned = (model.session(edit=0.0, editor=None) for _ in range(2))
    plain.append(text)
    learned.observe(text, editor=tr.Editor(objective="prediction", step=0.05, chunk=24))

    def loss(session: tr.Session) -> float:
        """Of the text once more, from the same place."""
        scores = session.append(text).astype(np.float64)
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        return float(-scores[np.arange(23), text[1:]].mean())

    assert loss(learned) < loss(plain)

"""A memory of titans-pytorch, exported: a model without a vocabulary, streamed, saved, restored, batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import titans_runtime as tr
from tests.runtime.streams import run_graph
from tests.titans_export.importers.cases import MEMORY_BASE
from titans_export.importers.titans_pytorch.checkpoint import LIBRARY, save_imported
from titans_export.importers.titans_pytorch.core import Streamed
from titans_export.importers.titans_pytorch.neural_memory import NeuralMemoryModel
from titans_export.importers.titans_pytorch.options import MemoryOptions, to_dict
from titans_export.pipeline import export_bundle
from titans_runtime.backends import Array
from titans_runtime.cli import main

_ARGUMENTS = MEMORY_BASE | {
    "batch_size": 8,
    "gated_transition": True,
    "momentum_order": 2,
    "qk_rmsnorm": True,
}


@pytest.fixture(scope="module")
def trained() -> NeuralMemoryModel:
    return _random(_ARGUMENTS)


def _random(arguments: dict[str, Any]) -> NeuralMemoryModel:
    options = MemoryOptions.read(arguments)
    model = NeuralMemoryModel(options).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def bundle(trained: NeuralMemoryModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _exported(trained, tmp_path_factory.mktemp("imported"))


def _exported(trained: NeuralMemoryModel, folder: Path) -> Path:
    config: dict[str, Any] = {"library": LIBRARY, "class": "NeuralMemory", "tokenizer": "vectors"}
    save_imported(trained, config | {"options": to_dict(trained.options)}, folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")  # fails unless the token loop's goldens are met
    return folder / "bundle"


@pytest.fixture(scope="module")
def model(bundle: Path) -> tr.Model:
    return tr.load(bundle, threads=1)


def _vectors(tokens: int, seed: int = 0) -> Array:
    vectors: Array = np.random.default_rng(seed).standard_normal((tokens, 16)).astype(np.float32)
    return vectors


def _expected(trained: NeuralMemoryModel, vectors: Array, edit: float = 1.0) -> Array:
    stream = Streamed(trained)
    with torch.no_grad():
        answers = stream(torch.tensor(vectors)[None], torch.full((1, 1), edit), *stream.initial_state(1))[0]
    array: Array = answers[0].numpy()
    return array


@pytest.mark.parametrize("lengths", [[40], [1] * 40, [3, 1, 1, 9, 26]])
def test_a_stream_of_vectors_cut_anywhere(
    trained: NeuralMemoryModel, model: tr.Model, lengths: list[int]
) -> None:
    vectors, session, start, answers = _vectors(40), model.session(), 0, []
    for length in lengths:
        answers.append(session.append(vectors[start : start + length]))
        start += length
    expected = _expected(trained, vectors)
    assert np.abs(np.concatenate(answers) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert session.position == 40
    assert session.edit == (1.0,)


def test_chunks_whose_gradients_are_taken_at_once(tmp_path: Path) -> None:
    trained = _random(MEMORY_BASE | {"chunk_size": 16})
    vectors, model = _vectors(70), tr.load(_exported(trained, tmp_path), threads=1)
    expected = _expected(trained, vectors)
    for lengths in ([70], [15, 1, 1, 33, 20]):
        session, start, answers = model.session(), 0, []
        for length in lengths:
            answers.append(session.append(vectors[start : start + length]))
            start += length
        assert np.abs(np.concatenate(answers) - expected).max() <= 1e-4 * np.abs(expected).max()
    session = model.session(edit=0.0)
    session.append(vectors)
    assert np.abs(session.append(vectors[:1]) - _expected(trained, vectors[:1], edit=0.0)).max() <= 1e-5


def test_three_views_are_answered_in_one_and_what_is_zero_has_a_length(tmp_path: Path) -> None:
    """Chunks that are not complete teach zero, which is then divided by its length."""
    options = {"qkv_receives_diff_views": True, "spectral_norm_surprises": True, "max_grad_norm": 0.5}
    trained = _random(MEMORY_BASE | options)
    vectors = np.concatenate([_vectors(30, seed) for seed in range(3)], axis=1)
    model = tr.load(_exported(trained, tmp_path), threads=1)
    for edit in (0.0, 1.0):
        session = model.session(edit=edit)
        found = np.concatenate([session.append(part) for part in np.split(vectors, [3, 4, 13])])
        expected = _expected(trained, vectors, edit)
        assert found.shape == (30, 16)
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_session_is_saved_and_goes_on_bit_for_bit(model: tr.Model, tmp_path: Path) -> None:
    session = model.session()
    session.append(_vectors(11))
    session.save(tmp_path / "memory")
    again, twin = model.load_session(tmp_path / "memory"), session.fork()
    following = _vectors(9, seed=1)
    expected = session.append(following)
    assert np.array_equal(again.append(following), expected)
    assert np.array_equal(twin.append(following), expected)
    assert again.last_logits is not None
    assert again.last_logits.shape == (16,)


def test_sessions_side_by_side_answer_as_alone(model: tr.Model) -> None:
    sessions, alone = [], []
    for row, tokens in enumerate((0, 3, 8)):
        session = model.session(edit=1.0 if row else 0.5)
        if tokens:
            session.append(_vectors(tokens, seed=row))
        sessions.append(session)
        alone.append(session.fork())
    parts = [_vectors(tokens, seed=9) for tokens in (1, 6, 13)]
    with model.batch(sessions) as batch:
        found = batch.append(parts)
    for one, session, part in zip(found, alone, parts, strict=True):
        assert np.abs(one - session.append(part)).max() <= 1e-5


def test_without_editing_the_memory_does_not_change(trained: NeuralMemoryModel, model: tr.Model) -> None:
    session = model.session(edit=0.0)
    session.append(_vectors(30))
    last = session.append(_vectors(1, seed=5))
    expected = _expected(trained, _vectors(1, seed=5), edit=0.0)
    assert np.abs(last - expected).max() <= 1e-5


def test_what_needs_a_vocabulary_says_so(
    bundle: Path, model: tr.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    session = model.session()
    session.append(_vectors(2))
    with pytest.raises(tr.UsageError, match="the model takes vectors; it has no tokens to draw"):
        next(session.generate(3))
    with pytest.raises(tr.TokenError, match=r"expected floats, \(T, 16\)"):
        session.append(b"text")
    assert main(["run", str(bundle), __file__]) == 2
    assert "the bundle's tokenizer is 'vectors', which no text goes into" in capsys.readouterr().err
    assert main(["inspect", str(bundle)]) == 0
    assert "vectors" in capsys.readouterr().out


def test_the_gradient_of_association_is_autograds(trained: NeuralMemoryModel, model: tr.Model) -> None:
    vectors, tokens = _vectors(26).reshape(2, 13, 16), 13
    weights = [
        torch.randn(2, *w.shape).mul(0.3).requires_grad_() for w in trained.memory.memory_model_parameters
    ]
    key, value, step = trained.memory.taught(torch.tensor(vectors))
    answer = trained.memory.network.read(tuple(weights), key.detach())
    loss = 0.5 * (answer - value.detach()).square().sum((1, 2, 3))
    gradients = torch.autograd.grad(loss.sum(), weights)
    given = {"inputs": vectors} | {f"past.memory.{i}": w.detach().numpy() for i, w in enumerate(weights)}
    found = run_graph(model, "gradient.association", given, tokens)
    np.testing.assert_allclose(found["loss"], loss.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(found["loss.memory"], found["loss"])
    for index, gradient in enumerate(gradients):
        error = np.abs(found[f"grad.memory.{index}"] - gradient.numpy()).max()
        assert error <= 1e-5 * float(gradient.abs().max())
    np.testing.assert_allclose(
        found["gate.memory.0.step"], step.detach().numpy() * 2 / 8, rtol=1e-5, err_msg="θ, for a mean over 8"
    )


@pytest.mark.parametrize("optimizer", ["sgd,step=0.02", "titans,step=1"])
def test_lessons_in_association_lower_their_loss(model: tr.Model, optimizer: str) -> None:
    vectors, session = _vectors(40), model.session(edit=0.0, editor=None)
    editor = tr.Editor.parse(f"association:optimizer={optimizer},chunk=8")
    losses = [report.loss for report in session.prepare(vectors, passes=4, editor=editor)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_lessons_of_no_step_report_each_tokens_surprise(trained: NeuralMemoryModel, model: tr.Model) -> None:
    """What the library's `return_surprises` gives, times half a head's width and summed over heads."""
    vectors, session = _vectors(4), model.session(editor=None)  # a chunk: nothing is written yet
    report = session.observe(vectors, tr.Editor("association", step=0.0, chunk=1))
    memory = trained.memory
    with torch.no_grad():
        key, value, _ = memory.taught(torch.tensor(vectors)[None])
        weights = tuple(w[None] for w in memory.memory_model_parameters)
        error = (memory.network.read(weights, key) - value).square().mean(-1)  # (1, H, T)
    found = [lesson.loss for lesson in report.lessons]
    np.testing.assert_allclose(found, error[0].sum(0).numpy()[: len(found)] * 8 / 2, rtol=1e-5)
    assert len(found) == 4

"""Streams and steps chosen to break a memory: it equals the oracle, or is refused by name and as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import titans_runtime as tr
from tests.runtime.streams import Array, assert_same_snapshot, relative_error
from titans_export.goldens import _token_loop_rule
from titans_export.memory.reference import reference_recurrence
from titans_export.model import Rules, TitansModel
from titans_export.pipeline import export_bundle
from titans_export.training.checkpoint import load_checkpoint, save_checkpoint

LENGTH = 300
STREAMS = {
    "one byte": b"\x00" * LENGTH,
    "the last byte": b"\xff" * LENGTH,
    "two bytes": b"ab" * (LENGTH // 2),
    "every byte": bytes(range(256)) + bytes(range(LENGTH - 256)),
    "noise": np.random.default_rng(0).bytes(LENGTH),
}


def _oracle(checkpoint: Path, dtype: torch.dtype = torch.float64) -> Callable[[bytes, float], Array]:
    """Logits of the token loop, in float64 unless told otherwise."""
    model = load_checkpoint(checkpoint)
    reference = TitansModel(model.config, Rules(_token_loop_rule, reference_recurrence))
    reference.load_state_dict(model.state_dict())
    reference = reference.to(dtype).eval()

    @torch.no_grad()
    def run(text: bytes, edit: float) -> Array:
        strength = torch.full((1, model.config.layers), edit, dtype=dtype)
        output = reference(torch.tensor([list(text)]), strength, reference.initial_state(1))
        return output.logits[0].numpy()

    return cache(run)


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint: Path) -> Callable[[bytes, float], Array]:
    return _oracle(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> tr.Model:
    return tr.load(tiny_bundle, threads=1)


@pytest.mark.parametrize("text", STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize("edit", [0.0, 1.0])
def test_a_stream_that_repeats_equals_the_oracle(
    model: tr.Model, oracle: Callable[[bytes, float], Array], text: bytes, edit: float
) -> None:
    """Keys that are all equal are the hardest case of a tile's triangular system."""
    assert relative_error(model.session(edit, None).append(text), oracle(text, edit)) <= 1e-4


@pytest.mark.parametrize("edit", [0.0, 1.0])
def test_a_stream_that_repeats_token_by_token_equals_the_oracle(
    model: tr.Model, oracle: Callable[[bytes, float], Array], edit: float
) -> None:
    text, session = STREAMS["one byte"], model.session(edit, None)
    logits = np.concatenate([session.append(text[i : i + 1]) for i in range(len(text))])
    assert relative_error(logits, oracle(text, edit)) <= 1e-4


@pytest.mark.suite("soak")
@pytest.mark.parametrize("edit", [0.0, 1.0])
@pytest.mark.parametrize("editor", [None, tr.Editor(step=0.5, chunk=8)], ids=["fused", "readout"])
def test_one_byte_a_million_times(
    model: tr.Model, oracle: Callable[[bytes, float], Array], edit: float, editor: tr.Editor | None
) -> None:
    """The oracle has settled long before; so must the stream, at the same logits."""
    settled = oracle(b"a" * 4000, edit)
    assert relative_error(settled[-2:-1], settled[-1:]) <= 1e-6, "the oracle has settled"
    session = model.session(edit, editor)
    for _ in range(2000):
        logits = session.append(b"a" * 500)
    assert session.position == 1_000_000
    assert np.isfinite(logits).all()
    if editor is None:
        assert relative_error(logits[-1:], settled[-1:]) <= 1e-4
    else:
        assert int(logits[-1].argmax()) == ord("a"), "what it has learnt"
    assert session._buffers.not_finite() is None


_GATES = {  # added to the biases of (retention, momentum, step), before the sigmoid
    "steps of one": (0.0, 0.0, 30.0),
    "nothing forgotten": (30.0, 0.0, 0.0),
    "everything forgotten": (-30.0, 0.0, 0.0),
    "no momentum lost": (0.0, 30.0, 0.0),
    "all at once": (30.0, 30.0, 30.0),
    "no steps": (0.0, 0.0, -30.0),
}


@pytest.mark.suite("soak")
@pytest.mark.parametrize("gates", _GATES)
def test_extreme_gates_equal_the_oracle_or_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, gates: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To 1e-4, or ten times what float32 costs the token loop itself (five were seen).

    A momentum that nothing damps lets the memory grow by a factor a token, to 1e22 here, and no float32
    program follows float64 there.
    """
    trained = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        for block in trained.blocks:
            bias = next(p for name, p in block.named_parameters() if name.endswith("gates.bias"))
            bias.add_(torch.tensor(_GATES[gates]).repeat_interleave(len(bias) // 3))
    save_checkpoint(trained, tmp_path / "checkpoint")
    try:
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    except tr.errors.CheckFailed as error:  # the goldens are not reproduced, so that nothing is exported
        assert not (tmp_path / "bundle").exists()
        with capsys.disabled():
            print(f"\n{gates}: refused by the export: {error}")
        return
    model, oracle = tr.load(tmp_path / "bundle", threads=1), _oracle(tmp_path / "checkpoint")
    in_float32 = _oracle(tmp_path / "checkpoint", torch.float32)
    for name, text in STREAMS.items():
        for edit in (0.0, 0.5, 1.0):
            session = model.session(edit, None)
            session.append(text[:1])
            before, refused, error = session.snapshot(), "", 0.0
            try:
                error = relative_error(session.append(text[1:]), oracle(text, edit)[1:])
            except tr.NumericsError as refusal:
                refused = str(refusal)
                assert_same_snapshot(session.snapshot(), before)
            with capsys.disabled():
                largest = np.abs(oracle(text, edit)).max()
                print(f"{gates}, {name}, {edit}: {refused or f'{error:.1e}'}, largest logit {largest:.1e}")
            assert error <= max(1e-4, 10 * relative_error(in_float32(text, edit), oracle(text, edit)))
            assert not refused or refused.endswith("the session is as it was before the call")

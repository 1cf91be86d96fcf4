"""Streams and steps chosen to break a memory: it equals the oracle, or is refused by name and as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import titans_runtime as tr
from tests.runtime.streams import Array, assert_same_snapshot, relative_error
from tests.titans_export.open_editing import OpenOracle, token_loop
from titans_export.model import TitansModel
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
    reference = token_loop(checkpoint, dtype)

    @torch.no_grad()
    def run(text: bytes, edit: float) -> Array:
        strength = torch.full((1, reference.config.layers), edit, dtype=dtype)
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


EDITORS = {  # objective, step, chunk
    "readout": ("readout", 0.5, 16),
    "prediction": ("prediction", 0.05, 16),
    "association": ("association", 0.1, 16),
    "prediction, a step of one": ("prediction", 1.0, 16),
    "association, a step of one": ("association", 1.0, 16),
}


def _editor(name: str) -> tr.Editor:
    objective, step, chunk = EDITORS[name]
    return tr.Editor(objective, step=step, chunk=chunk)


def _moved(checkpoint: Path, run: Callable[[TitansModel], Array]) -> float:
    """How far float64 moves if every weight is off by half a unit in float32's last place.

    No float32 program can be asked for less: its weights are known no better.
    """
    exact, most = run(token_loop(checkpoint)), 0.0
    for seed in range(3):
        model, generator = token_loop(checkpoint), torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1 + (2 * noise - 1) * 2.0**-24)
        most = max(most, relative_error(run(model), exact))
    return most


def _assert_open_editing_equals_the_oracle(
    model: tr.Model, checkpoint: Path, name: str, text: bytes, edit: float
) -> tuple[float, float]:
    """To 1e-4, or ten times what rounding the weights does; returns both errors.

    Refused is what only a memory beyond float32's squares would go through: float64 has it, too.
    """

    def run(reference: TitansModel) -> Array:
        return OpenOracle(reference, *EDITORS[name], edit).run(text)

    session = model.session(edit, _editor(name))
    before, refused = session.snapshot(), ""
    try:
        found = session.append(text)
    except tr.NumericsError as refusal:
        refused = str(refusal)
    if refused:
        assert "too large for float32; the session is as it was" in refused
        assert_same_snapshot(session.snapshot(), before)
        oracle = OpenOracle(token_loop(checkpoint), *EDITORS[name], edit)
        oracle.run(text)
        assert oracle.largest > float(np.sqrt(np.finfo(np.float32).max)) / 2
        return np.inf, np.inf
    error = relative_error(found, run(token_loop(checkpoint)))
    moved = _moved(checkpoint, run) if error > 1e-4 else 0.0
    assert error <= max(1e-4, 10 * moved)
    return error, moved


@pytest.mark.parametrize("name", ["readout", "prediction", "association"])
def test_open_editing_of_noise_equals_the_oracle(model: tr.Model, tiny_checkpoint: Path, name: str) -> None:
    error, _ = _assert_open_editing_equals_the_oracle(
        model, tiny_checkpoint, name, STREAMS["noise"][:100], 0.5
    )
    assert error <= 1e-4


@pytest.mark.suite("soak")
@pytest.mark.parametrize("name", EDITORS)
def test_open_editing_of_streams_that_repeat(
    model: tr.Model, tiny_checkpoint: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One byte again and again turns a read around where it is all but zero, and is normalised then."""
    for stream, text in STREAMS.items():
        for edit in (0.0, 0.5, 1.0):
            error, moved = _assert_open_editing_equals_the_oracle(model, tiny_checkpoint, name, text, edit)
            with capsys.disabled():
                print(f"{name}, {stream}, {edit}: {error:.1e}, rounded weights move float64 by {moved:.1e}")


# --- a million times


def _append_million(session: tr.Session) -> Array:
    for _ in range(2000):
        logits = session.append(b"a" * 500)
    assert session.position == 1_000_000
    assert np.isfinite(logits).all()
    assert session._buffers.fault() == ""
    return logits


@pytest.mark.suite("soak")
@pytest.mark.parametrize("edit", [0.0, 0.5, 1.0])
def test_one_byte_a_million_times(
    model: tr.Model, oracle: Callable[[bytes, float], Array], edit: float
) -> None:
    """The oracle has settled long before; so must the stream, at the same logits."""
    settled = oracle(b"a" * 4000, edit)
    assert relative_error(settled[-2:-1], settled[-1:]) <= 1e-6, "the oracle has settled"
    logits = _append_million(model.session(edit, None))
    assert relative_error(logits[-1:], settled[-1:]) <= 1e-4


@pytest.mark.suite("soak")
@pytest.mark.parametrize("edit", [0.0, 0.5, 1.0])
def test_one_byte_a_million_times_with_the_readout_editor(
    model: tr.Model, tiny_checkpoint: Path, edit: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once the key has settled, each period moves the logits by the same few numbers, in float64 as well.

    The memory grows for ever, as the logarithm of time: `p` of all other bytes falls as `1/t`. Its
    increments fall likewise, until they change no float32 of the memory any more: from there on float64
    alone goes on. So what is left of the loss differs, and the logits by the logarithm of that.
    """
    text, chunk, step = b"a" * 4000, 8, 0.5
    reference = OpenOracle(token_loop(tiny_checkpoint), "readout", step, chunk, edit)
    logits = reference.run(text)[-1]
    with torch.no_grad():
        output = reference.model(torch.tensor([[ord("a")]]), reference.edit, reference.state)
    counts = np.unique(output.readout_rows[0, 0].numpy(), return_counts=True)[1]
    scale = reference.model.config.readout_context_scale
    length = float(output.readout_key[0, 0].square().sum()) + scale**2 * float((counts**2).sum())
    target = np.zeros(256)
    target[ord("a")] = 1
    for _ in range((1_000_000 - len(text)) // chunk):
        p = np.exp(logits - logits.max())
        logits = logits - step * chunk * length * (p / p.sum() - target)
    found = _append_million(model.session(edit, tr.Editor(step=step, chunk=chunk)))[-1]
    error = relative_error(found, logits)
    with capsys.disabled():
        print(f"readout, {edit}: {error:.1e}, largest logit {np.abs(logits).max():.2f}")
    assert error <= 1e-2
    assert int(found.argmax()) == ord("a"), "what it has learnt"


@pytest.mark.suite("soak")
@pytest.mark.parametrize(("objective", "step"), [("prediction", 1e-5), ("association", 2e-3)])
@pytest.mark.parametrize("edit", [0.0, 0.5, 1.0])
def test_one_byte_a_million_times_with_layers_edited(
    model: tr.Model,
    tiny_checkpoint: Path,
    objective: str,
    step: float,
    edit: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every period becomes like the one before it, with steps that do not throw the memory about.

    Steps of 1e-3 by `prediction` let periods alternate without end, in float64 as well.
    """
    settled = OpenOracle(token_loop(tiny_checkpoint), objective, step, 500, edit).run(b"a" * 10_000)
    assert relative_error(settled[-1000:-500], settled[-500:]) <= 1e-6, "the oracle has settled"
    found = _append_million(model.session(edit, tr.Editor(objective, step=step, chunk=500)))
    error = relative_error(found, settled[-500:])
    unedited = OpenOracle(token_loop(tiny_checkpoint), objective, 0.0, 500, edit).run(b"a" * 10_000)
    effect = relative_error(unedited[-500:], settled[-500:])
    with capsys.disabled():
        print(f"{objective}, {edit}: {error:.1e}, editing moves {effect:.1e}")
    assert error <= 1e-4


# --- gates


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
    """To 1e-4, or as many times what float32 costs the token loop itself as a tile has tokens.

    A momentum that nothing damps lets the memory grow by a factor a token, to 1e22 here, and no float32
    program follows float64 there. Where it does not grow, nothing damps rounding either: the weights ``W``
    of a tile's writes count the tokens since, up to the tile's length, and sums of terms that much larger
    than their result lose as much more; see the test below.
    """
    trained = _with_gates(tiny_checkpoint, gates)
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
            loop = relative_error(in_float32(text, edit), oracle(text, edit))
            assert error <= max(1e-4, trained.config.tile * loop)
            assert not refused or refused.endswith("the session is as it was before the call")


def _with_gates(checkpoint: Path, gates: str) -> TitansModel:
    trained = load_checkpoint(checkpoint)
    with torch.no_grad():
        for block in trained.blocks:
            bias = next(p for name, p in block.named_parameters() if name.endswith("gates.bias"))
            bias.add_(torch.tensor(_GATES[gates]).repeat_interleave(len(bias) // 3))
    return trained


@pytest.mark.suite("soak")
@pytest.mark.parametrize("stream", ["one byte", "the last byte", "two bytes"])
def test_where_nothing_damps_a_tile_costs_what_its_length_is(
    tiny_checkpoint: Path, tmp_path: Path, stream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tile of one token is the token loop, and longer ones lose in proportion: rounding, and no mistake."""
    trained, text = _with_gates(tiny_checkpoint, "all at once"), STREAMS[stream]
    save_checkpoint(trained, tmp_path)
    expected = _oracle(tmp_path)(text, 1.0)
    loop = relative_error(_oracle(tmp_path, torch.float32)(text, 1.0), expected)
    for tile in (1, 2, 4, 8, 16, 32):
        model = TitansModel(dataclasses.replace(trained.config, tile=tile)).eval()
        model.load_state_dict(trained.state_dict())
        with torch.no_grad():
            strength = torch.ones(1, model.config.layers)
            logits = model(torch.tensor([list(text)]), strength, model.initial_state(1)).logits[0].numpy()
        error = relative_error(logits, expected)
        with capsys.disabled():
            print(f"{stream}, tile {tile}: {error:.1e}, token loop {loop:.1e}")
        assert error <= 2 * tile * loop

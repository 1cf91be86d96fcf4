"""What the README claims of the shipped model, on text that it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import titans_runtime as tr
from tests.end_to_end.conftest import ROOT
from titans_export.training.data import load_corpus, split_of

TRAINING = json.loads((ROOT / "checkpoints" / "nano" / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(nano_bundle: Path) -> tr.Model:
    return tr.load(nano_bundle, threads=1)


FILES = ("multiprocessing/managers.py", "urllib/parse.py", "http/client.py")
"""Long held-out ones that every distribution of Python has; some leave out the longest."""


def _held_out(least: int, name: str = FILES[0]) -> bytes:
    (source,) = (source for source in load_corpus(["stdlib"]).held_out if source.name == name)
    assert len(source.data) >= least
    return source.data[:least]


def _bits(session: tr.Session, text: bytes) -> float:
    return tr.score(session, text).bits_per_token


def test_checkpoint_is_small_and_good_enough() -> None:
    weights = ROOT / "checkpoints" / "nano" / "weights.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert 1_000_000 <= TRAINING["parameters"] <= 2_000_000
    assert TRAINING["bits_per_byte"]["held_out"] <= 1.75
    assert TRAINING["training"]["edit"] == 0.0


def test_held_out_files_were_held_out() -> None:
    assert TRAINING["held_out_files"]
    for name in TRAINING["held_out_files"]:
        assert split_of(name) == "held_out"


def test_unedited_bits_per_byte_are_as_recorded(model: tr.Model) -> None:
    """Through ONNX Runtime, on one held-out file; the recorded figure is the mean of all."""
    bits = _bits(model.session(edit=0.0, editor=None), _held_out(16_384))
    assert bits == pytest.approx(TRAINING["bits_per_byte"]["held_out"], rel=0.25)


def test_editing_helps_on_held_out_python(model: tr.Model) -> None:
    texts = [_held_out(32_768, name) for name in FILES]
    off, on = (
        sum(_bits(model.session(**settings), text) for text in texts)
        for settings in ({"edit": 0.0, "editor": None}, {})
    )
    assert on <= 0.78 * off


def test_editing_helps_on_a_log(model: tr.Model) -> None:
    text = (ROOT / "benchmarks" / "data" / "dpkg.log").read_bytes()[:16_384]
    assert _bits(model.session(), text) <= 0.30 * _bits(model.session(edit=0.0, editor=None), text)


def test_changing_future_bytes_changes_no_earlier_score(model: tr.Model) -> None:
    """Every prediction is scored before the memory sees its target."""
    text = _held_out(3_000)
    cut = 1_537
    changed = text[:cut] + bytes(byte ^ 1 for byte in text[cut:])
    before, after = (tr.score(model.session(), version).bits for version in (text, changed))
    assert np.array_equal(before[:cut], after[:cut])
    assert not np.array_equal(before[cut:], after[cut:])


def test_a_memory_survives_a_process_and_keeps_what_it_learnt(model: tr.Model, tmp_path: Path) -> None:
    text = _held_out(8_192)
    session = model.session()
    session.append(text[:4_096])
    session.save(tmp_path / "user.memory")
    restored = model.load_session(tmp_path / "user.memory")
    assert np.array_equal(session.append(text[4_096:]), restored.append(text[4_096:]))
    assert _bits(restored, text[:4_096]) < _bits(model.session(), text[:4_096])

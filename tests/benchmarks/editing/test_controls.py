"""Controls edit the readout memory, by keys that cannot know what the model's keys know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import titans_runtime as tr
from benchmarks.editing.controls import BiasOnly, ShuffledKeys

EDITOR = tr.Editor("readout", step=0.5, chunk=4)
IDS = np.random.default_rng(0).integers(0, 256, 24)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> tr.Model:
    return tr.load(tiny_bundle, threads=1)


def edit(model: tr.Model) -> tuple[float, ...]:
    return (0.0,) * model.manifest.edit_layers


def test_one_key_for_all_moves_all_positions_of_a_period_alike(model: tr.Model) -> None:
    plain = model.session(edit=0.0, editor=None).append(IDS)
    moved = BiasOnly(model, edit(model), EDITOR).append(IDS) - plain
    assert np.abs(moved[:4]).max() < 1e-5  # nothing is learnt before the first period ends
    for start in range(4, len(IDS), 4):
        period = moved[start : start + 4]
        assert np.abs(period - period[:1]).max() < 1e-4
        assert np.abs(period).max() > 1e-2


def test_shuffled_keys_learn_something_else_than_the_models_own(model: tr.Model) -> None:
    session = ShuffledKeys(model, edit(model), EDITOR)
    session.append(IDS)  # keys of another segment come from this one
    plain, own = model.session(edit=0.0, editor=None), model.session(edit=0.0, editor=EDITOR)
    for other in (plain, own):
        other.append(IDS)
    shuffled, without, with_own = (one.append(IDS) for one in (session, plain, own))
    assert np.abs(shuffled - without).max() > 1e-2
    assert np.abs(shuffled - with_own).max() > 1e-2

"""The benchmarks' controls do what they claim: real keys give the real result, other keys another."""

from __future__ import annotations

import numpy as np
import pytest

import titans_runtime as tr
from benchmarks.editing.controls import BiasOnly, ShuffledKeys, _OtherKeys
from titans_runtime.readout import Keys

TEXT = b"the same words, and again the same words, " * 30


class _SameKeys(_OtherKeys):
    def replace(self, keys: Keys) -> Keys:
        return keys


@pytest.fixture(scope="module")
def model(tiny_bundle: str) -> tr.Model:
    return tr.load(tiny_bundle, threads=1)


def _bits(session: tr.Session) -> np.ndarray:
    return np.asarray(tr.score(session, TEXT).bits)


def test_keys_replaced_by_themselves_change_nothing(model: tr.Model) -> None:
    editor, edit = tr.Editor(step=0.5), (0.0, 0.0)
    real = _bits(model.session(edit=0.0, editor=editor))
    np.testing.assert_allclose(_bits(_SameKeys(model, edit, editor)), real, atol=1e-3)
    for control in (ShuffledKeys, BiasOnly):
        assert _bits(control(model, edit, editor)).mean() > real.mean() + 0.1

"""Two memories side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import titans_runtime as tr


def test_distances_are_those_of_the_tensors(model: tr.Model) -> None:
    session = model.session(0.5, None)
    session.append(b"one")
    one = session.snapshot()
    session.append(b" and more")
    other = session.snapshot()
    found = {difference.name: difference for difference in tr.compare(one, other)}
    assert found.keys() == one.arrays.keys()
    for name, difference in found.items():
        first, second = (np.asarray(x.arrays[name], np.float64) for x in (one, other))
        assert difference.norms == pytest.approx((np.linalg.norm(first), np.linalg.norm(second)))
        assert difference.distance == pytest.approx(np.linalg.norm(first - second))
        assert difference.changed == pytest.approx((first != second).mean())
    assert found["state.layers.0.memory"].relative > 0.01
    assert found["state.readout"].relative == found["state.readout"].changed == 0  # nobody edits it


def test_pending_positions_of_other_lengths_are_compared(model: tr.Model) -> None:
    sessions = [model.session(0.5, tr.Editor(chunk=8)) for _ in range(2)]
    for session, text in zip(sessions, (b"ab", b"abcde"), strict=True):
        session.append(text)
    found = {one.name: one for one in tr.compare(sessions[0].snapshot(), sessions[1].snapshot())}
    assert found["pending.logits"].norms[0] < found["pending.logits"].norms[1]


def test_memories_of_two_bundles_are_refused(model: tr.Model) -> None:
    snapshot = model.session().snapshot()
    with pytest.raises(tr.StateError, match="memories of two bundles"):
        tr.compare(snapshot, replace(snapshot, bundle="0" * 64))


def test_sessions_are_compared_as_they_are(model: tr.Model) -> None:
    session = model.session(0.5, None)
    session.append(b"one")
    twin = session.fork()
    assert not any(difference.changed for difference in tr.compare(session, twin))
    twin.append(b" more")
    assert tr.compare(session, twin) == tr.compare(session.snapshot(), twin.snapshot())
    assert any(difference.changed for difference in tr.compare(session, twin))
    with pytest.raises(tr.UsageError, match="not a str"):
        tr.compare("a.memory", session)  # type: ignore[arg-type]

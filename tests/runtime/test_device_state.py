"""State that stays on a device. Memory that ONNX Runtime allocates on the CPU stands in for one.

Nothing here can pass by accident: twins are other memory than the arrays, so what is not moved is missed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.streams import assert_same_everywhere, every_way
from titans_runtime.backends import Array
from titans_runtime.backends.mirror import Mirrors
from titans_runtime.backends.onnxruntime import OnnxRuntimeBackend

TEXT = b"a memory that moves only when it must, and is the same wherever it is. " * 9


@pytest.fixture
def on_device(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tr.Model]:
    """A model whose state has twins."""
    create = OnnxRuntimeBackend.__init__
    monkeypatch.setattr(
        OnnxRuntimeBackend, "__init__", lambda self, *args: create(self, *args[:3], device="cpu")
    )
    model = tr.load(tiny_bundle, threads=1)
    assert isinstance(model.backend.residence, Mirrors)
    return model


class CountingDevice:
    """Notes what is copied."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, int]] = []

    def allocate(self, like: Array) -> Array:
        return np.full_like(like, -1)

    def upload(self, twin: Array, array: Array) -> None:
        self.moves.append(("up", array.size))
        np.copyto(twin, array)

    def download(self, twin: Array, array: Array) -> None:
        self.moves.append(("down", array.size))
        np.copyto(array, twin)


def test_every_way_through_a_session_gives_what_the_host_gives(model: tr.Model, on_device: tr.Model) -> None:
    assert_same_everywhere(every_way(model), every_way(on_device))


def test_a_call_that_fails_leaves_the_session_as_it_was(
    on_device: tr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = on_device.session()
    session.append(TEXT[:50])
    before = session.snapshot().arrays

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "_conclude", fail)
        for tokens in (TEXT[:1], TEXT[:20], TEXT * 2):
            with pytest.raises(KeyboardInterrupt):
                session.append(tokens)
    after = session.snapshot().arrays
    assert all(np.array_equal(array, after[name]) for name, array in before.items())


def test_sessions_join_and_leave_there(model: tr.Model, on_device: tr.Model) -> None:
    """Vacant rows are computed along; whoever moves to another row takes its state along."""

    def run(model: tr.Model) -> list[Array]:
        sessions = [model.session() for _ in range(3)]
        seen = []
        with model.batch(sessions[:2], room=4) as batch:
            seen += batch.append([b"abc", b"de"])
            batch.join(sessions[2])
            seen += batch.append([b"f", b"g", b"h"])
            batch.leave(sessions[0])
            seen += batch.append([b"i", b"j"])
        return [*seen, *(session.append(b"k") for session in sessions)]

    for ours, host in zip(run(on_device), run(model), strict=True):
        assert np.abs(ours - host).max() <= 1e-5 * np.abs(host).max()


def test_goldens_are_replayed_there(tiny_bundle: Path, on_device: tr.Model) -> None:
    assert tr.verify(tiny_bundle).passed


def test_decoding_moves_tokens_and_logits_alone(tiny_bundle: Path, on_device: tr.Model) -> None:
    mirrors = on_device.backend.residence
    assert isinstance(mirrors, Mirrors)
    session = on_device.session(editor=None)
    session.append(b"ab")
    session.append(b"c")
    session.append(b"d")  # both sets have been on the device
    uploads: list[int] = []
    device = mirrors.device
    upload = device.upload

    def count(twin: object, array: Array) -> None:
        uploads.append(array.size)
        upload(twin, array)

    device.upload = count  # type: ignore[method-assign]
    for token in (b"e", b"f", b"g"):
        session.append(token)
    layers = on_device.manifest.edit_layers
    assert sorted(uploads) == sorted([1, layers] * 3)


def test_an_array_moves_once_in_each_direction() -> None:
    device = CountingDevice()
    mirrors = Mirrors(device)
    array = np.zeros(4, np.float32)
    mirror = mirrors.of(array)
    mirror.to_device()
    mirror.to_device()
    assert device.moves == [("up", 4)]
    mirror.written_by_device()
    mirrors.fetch([array[:2]])
    mirrors.fetch([array])
    assert device.moves == [("up", 4), ("down", 4)]
    mirrors.changed([array[1:]])
    mirror.to_device()
    assert device.moves[2:] == [("up", 4)]


def test_a_twin_goes_with_its_array() -> None:
    mirrors = Mirrors(CountingDevice())
    array = np.zeros(4, np.float32)
    mirrors.of(array)
    assert len(mirrors._found) == 1
    del array
    gc.collect()
    assert not mirrors._found

"""Memory files that are damaged, or another's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import titans_runtime as tr
from tests.runtime.bad_input.support import Titans, Trap
from tests.runtime.command import TEXT
from titans_runtime.state import describe_snapshot, save_snapshot


def _memory(change: Callable[[tr.Snapshot], tr.Snapshot], message: str) -> Callable[..., str]:
    """A memory with something else in it, under a digest that fits."""

    def harm(path: Path, snapshot: tr.Snapshot, monkeypatch: pytest.MonkeyPatch) -> str:
        with monkeypatch.context() as patch:
            patch.setattr("titans_runtime.state.check_finite", lambda arrays: None)
            save_snapshot(change(snapshot), path)
        return f"{path}: {message}"

    return harm


def _array(name: str, change: Callable[[np.ndarray], np.ndarray], message: str) -> Callable[..., str]:
    return _memory(
        lambda snapshot: replace(snapshot, arrays=snapshot.arrays | {name: change(snapshot.arrays[name])}),
        message,
    )


def _bytes(change: Callable[[bytes], bytes], message: str) -> Callable[..., str]:
    def harm(path: Path, snapshot: tr.Snapshot, monkeypatch: pytest.MonkeyPatch) -> str:
        path.write_bytes(change(path.read_bytes()))
        return f"{path}: {message}"

    return harm


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed.reshape(-1)[0] = value
        return changed

    return change


def _newer(path: Path, snapshot: tr.Snapshot, monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr("titans_runtime.state.FORMAT_VERSION", 99)
        save_snapshot(snapshot, path)
    return f"{path}: memory format 99; this runtime reads 1; install a newer titans-runtime"


_NO_MEMORY = "no memory file of this project, or damaged"
_FINITE = "holds values that are not finite; restore an older snapshot"
_DIGEST = "its content does not match its digest; restore the file from a copy"
MEMORIES = {
    "another bundle's": _memory(
        lambda snapshot: replace(snapshot, bundle="ab" * 32),
        "the memory of bundle abababababab…, not of {identity}…; open it with the bundle it was saved under",
    ),
    "wrong shape": _array(
        "state.readout",
        lambda array: array[:, :5],
        "state.readout is float32 (1, 5, 256); expected float32 (1, 128, 256)",
    ),
    "wrong batch": _array(
        "state.readout",
        lambda array: np.repeat(array, 2, 0),
        "state.readout is float32 (2, 128, 256); expected float32 (1, 128, 256)",
    ),
    "wrong dtype": _array(
        "state.readout",
        lambda array: array.astype(np.float64),
        "state.readout is float64 (1, 128, 256); expected float32 (1, 128, 256)",
    ),
    "NaN": _array("state.layers.0.memory", _with(np.nan), f"state.layers.0.memory {_FINITE}"),
    "infinity": _array("state.readout", _with(-np.inf), f"state.readout {_FINITE}"),
    "one bit flipped": _bytes(lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], _DIGEST),
    "truncated": _bytes(
        lambda data: data[: len(data) // 2], "damaged or truncated; restore the file from a copy"
    ),
    "truncated in its header": _bytes(lambda data: data[:100], _NO_MEMORY),
    "empty": _bytes(lambda data: b"", _NO_MEMORY),
    "a pickle": _bytes(lambda data: pickle.dumps(Trap()), _NO_MEMORY),
    "a newer format": _newer,
}


def _steps(path: Path, snapshot: tr.Snapshot, monkeypatch: pytest.MonkeyPatch) -> str:
    return _array("memories.steps", _with(-1), "memories.steps is below zero")(path, snapshot, monkeypatch)


_MEAN, _SQUARE = "memories.mean.layers.0.memory", "memories.square.layers.0.memory"
LAYERS = {
    "moment missing": _memory(
        lambda snapshot: replace(
            snapshot, arrays={name: array for name, array in snapshot.arrays.items() if name != _MEAN}
        ),
        f"{_MEAN} is missing, or not float32 (1, 2, 16, 16)",
    ),
    "moment of another shape": _array(
        _MEAN, lambda array: array[:, :1], f"{_MEAN} is missing, or not float32 (1, 2, 16, 16)"
    ),
    "sum of squares below zero": _array(_SQUARE, _with(-1), f"{_SQUARE} is below zero"),
    "steps below zero": _steps,
    "moment not finite": _array(_SQUARE, _with(np.inf), f"{_SQUARE} {_FINITE}"),
    "tokens beyond": _array(
        "memories.sequence", _with(256), "memories.sequence holds ids outside the vocabulary"
    ),
    "tokens too many": _array(
        "memories.sequence",
        lambda array: np.concatenate([array, array]),
        "memories.targets do not fit the editor {editor}",
    ),
    "anchor of another shape": _array(
        "memories.anchor.layers.0.memory",
        lambda array: array[..., 0],
        "memories.anchor.layers.0.memory is missing, or not float32 (1, 2, 16, 16)",
    ),
    "editor of memories that are not there": _memory(
        lambda snapshot: replace(snapshot, editor={**_dict(snapshot), "memories": ["layers.9.*"]}),
        "editor memories: 'layers.9.*' fits none of layers.0.memory, layers.1.memory",
    ),
    "second editor that is none": _memory(
        lambda snapshot: replace(snapshot, editor={**_dict(snapshot), "also": [1]}),
        "editor also is [1]; it must be an object",
    ),
    "editor without a graph": _memory(
        lambda snapshot: replace(snapshot, editor={**_dict(snapshot), "objective": "guess"}),
        "the bundle cannot be edited by 'guess'; known: readout, prediction, association",
    ),
}
"""What an editor of the layers' memories has left, damaged."""


def _dict(snapshot: tr.Snapshot) -> dict[str, Any]:
    assert snapshot.editor is not None
    return snapshot.editor


_WITHOUT_BUNDLE = (
    "one bit flipped",
    "truncated",
    "truncated in its header",
    "empty",
    "a pickle",
    "a newer format",
)
"""What is wrong with the file itself, so that `inspect` sees it, too."""


@pytest.mark.parametrize("row", [*MEMORIES, *LAYERS])
def test_a_bad_memory(
    model: tr.Model,
    tiny_bundle: Path,
    text: Path,
    tmp_path: Path,
    titans: Titans,
    monkeypatch: pytest.MonkeyPatch,
    row: str,
) -> None:
    path = tmp_path / "memory"
    layers = tr.Editor("prediction", step=0.01, chunk=8, optimizer="adam")
    session = model.session(0.5, layers if row in LAYERS else tr.Editor(step=0.5, chunk=4))
    session.append(TEXT)
    session.save(path)
    sound = tmp_path / "sound"
    session.save(sound)
    harm = (MEMORIES | LAYERS)[row]
    known = {"identity": model.manifest.identity[:12], "editor": layers.to_dict()}
    message = harm(path, session.snapshot(), monkeypatch).format(**known)
    before = path.read_bytes()
    with pytest.raises(tr.StateError) as caught:
        model.load_session(path)
    assert str(caught.value) == message
    state = ("--state-in", path, "--state-out", path)
    assert titans("run", tiny_bundle, text, *state) == (3, f"titans: {message}\n")
    assert titans("generate", tiny_bundle, "--prompt", "a", *state) == (3, f"titans: {message}\n")
    if row in _WITHOUT_BUNDLE:
        with pytest.raises(tr.StateError) as caught:
            describe_snapshot(path)
        assert str(caught.value) == message
        assert titans("inspect", path) == (3, f"titans: {message}\n")
    if row in _WITHOUT_BUNDLE or message.endswith(_FINITE):
        for pair in ((path, sound), (sound, path)):
            assert titans("inspect", *pair) == (3, f"titans: {message}\n")
    if row == "another bundle's":
        names = f"{model.manifest.identity[:12]}… and abababababab…"
        expected = f"titans: memories of two bundles, {names}; compare those of one\n"
        assert titans("inspect", sound, path) == (3, expected)
    assert path.read_bytes() == before

"""What a fuzzer does with what is read from disk: valid inputs, changes to them, and what must hold for any.

The first byte of an input says whether the rest is sealed (its identity or digest made to fit), so that both
sides of that check are reached.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from titans_runtime import bundle, json_reader, manifest, state
from titans_runtime.backends import ON_HOST
from titans_runtime.buffers import StateBuffers
from titans_runtime.compare import compare
from titans_runtime.editing import Editing
from titans_runtime.editor import Editor, chosen_memories
from titans_runtime.errors import BundleError, DataError, StateError, UsageError
from titans_runtime.report import EditLog, EditReport, Lesson
from titans_runtime.snapshot import ENERGY, Snapshot

_STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    2**31,
    2**63,
    2**64,
    1e308,
    "",
    "batch",
    "../x",
    "\0",
    [],
    {},
    "é",
]
_FOLDER = Path(tempfile.mkdtemp())


def small_manifest() -> manifest.Manifest:
    """A manifest with a readout memory, two gradient graphs, and everything else as small as it can be."""
    state_specs = (
        manifest.StateSpec("memory", "float32", ("batch", 2, 2), 0.0, "memory"),
        manifest.StateSpec("position", "int64", ("batch",), 0.0, "position"),
        manifest.StateSpec("readout", "float32", ("batch", 3, 4), 0.0, "memory"),
    )
    tensor = manifest.TensorSpec
    past = tuple(tensor(f"past.{spec.name}", spec.dtype, spec.shape) for spec in state_specs)
    graph = manifest.GraphSpec(
        "model.onnx",
        (tensor("input_ids", "int64", ("batch", "tokens")), tensor("edit", "float32", ("batch", 1)), *past),
        (
            tensor("logits", "float32", ("batch", "tokens", 4)),
            tensor("readout_key", "float32", ("batch", "tokens", 2)),
            tensor("readout_rows", "int64", ("batch", "tokens", 1)),
            tensor("present.memory", "float32", state_specs[0].shape),
            tensor("present.position", "int64", ("batch",)),
        ),
    )
    past_memory, row = past[0], ("batch", "tokens")
    prediction = manifest.GraphSpec(
        "gradient.prediction.onnx",
        (*graph.inputs, tensor("target_ids", "int64", row)),
        (tensor("loss", "float32", ("batch",)), tensor("grad.memory", "float32", past_memory.shape)),
    )
    readout = manifest.GraphSpec(
        "gradient.readout.onnx",
        (
            tensor("input_ids", "int64", row),
            past[2],
            tensor("readout_key", "float32", (*row, 2)),
            tensor("readout_rows", "int64", (*row, 1)),
            tensor("base_logits", "float32", (*row, 4)),
        ),
        (
            tensor("logits", "float32", (*row, 4)),
            tensor("loss", "float32", row),
            tensor("grad.readout", "float32", ("batch", 2, 4)),
            tensor("grad.readout_rows", "float32", (*row, 4)),
        ),
    )
    return manifest.Manifest.create(
        producer={"nobody": "1"},
        requires={"onnxruntime": "1.25", "ir_version": 10, "opset": 23},
        model={"layers": 1},
        tokenizer="bytes",
        vocab_size=4,
        edit_layers=1,
        graphs={"model": graph, "gradient.prediction": prediction, "gradient.readout": readout},
        state=state_specs,
        tolerances={"atol": 1e-4, "rtol": 1e-4},
        recommended={"edit": 0.5, "editor": Editor(chunk=4).to_dict()},
        files={one.file: manifest.FileEntry("0" * 64, 3) for one in (graph, prediction, readout)},
    )


MANIFEST = small_manifest()


def read_manifest(data: bytes) -> None:
    """Anything but a manifest is refused by a ValueError of the JSON or a BundleError of its fields."""
    with contextlib.suppress(ValueError):
        content = json_reader.parse_object(data[1:], "titans.json")
        if data[0] & 1:
            with contextlib.suppress(KeyError, TypeError):
                _seal_manifest(content)
        with contextlib.suppress(BundleError):
            read = manifest.Manifest.from_dict(content)
            assert manifest.Manifest.from_dict(json.loads(json.dumps(read.to_dict()))) == read
            assert read.state_bytes <= 4 * 2**30
            for name in read.graphs:
                with contextlib.suppress(UsageError):
                    chosen = chosen_memories(Editor(name.removeprefix("gradient.")), read)
                    assert set(chosen) <= {entry.name for entry in read.state} or name == "gradient.readout"
            for name in read.files:
                bundle._check_name(_FOLDER, name)
                assert (_FOLDER / name).resolve().is_relative_to(_FOLDER.resolve())


def read_memory(data: bytes) -> None:
    """Anything but a memory of the bundle is refused by a StateError."""
    content = _sealed_memory(data[1:]) if data[0] & 1 else data[1:]
    path = _FOLDER / "memory"
    path.write_bytes(content)
    with contextlib.suppress(StateError):
        json.dumps(state.describe_snapshot(path))
    with contextlib.suppress(StateError):
        alone = state.read_snapshot(path)
        assert all(one.distance == 0 for one in compare(alone, alone))
    with contextlib.suppress(StateError):
        snapshot = state.load_snapshot(path, MANIFEST)
        editor = None if snapshot.editor is None else Editor.from_dict(snapshot.editor)
        _take_up(editor, snapshot)
        state.save_snapshot(snapshot, _FOLDER / "again")
        again = state.load_snapshot(_FOLDER / "again", MANIFEST)
        assert again.arrays.keys() == snapshot.arrays.keys()


def _take_up(editor: Editor | None, snapshot: Snapshot) -> None:
    """What a session does with a memory that was read: its editors go on from it."""
    initial = {entry.name: np.zeros((1, *entry.row_shape), entry.dtype) for entry in MANIFEST.state}
    edit = np.zeros((1, MANIFEST.edit_layers), np.float32)
    buffers = StateBuffers(MANIFEST, initial)
    buffers.restore(snapshot.arrays)
    editing = Editing(editor, _Unbound(), buffers, edit)
    editing.take_up(snapshot.arrays, snapshot.position)
    again = editing.arrays(snapshot.position)
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: snapshot.arrays[name].tobytes() for name in again
    }


class _Unbound:
    """A backend whose graphs can be bound and do nothing."""

    manifest, residence, placements = MANIFEST, ON_HOST, {}

    def graph(self, name: str) -> _Unbound:
        del name
        return self

    def bind(self, inputs: object, outputs: object) -> _Unbound:
        del inputs, outputs
        return self

    def run(self) -> None:
        pass


def read_log(data: bytes) -> None:
    """Anything but lines of lessons is refused by a DataError."""
    path = _FOLDER / "log"
    path.write_bytes(data[1:])
    with contextlib.suppress(DataError):
        log = EditLog.load(path)
        log.save(_FOLDER / "log again")
        assert len(EditLog.load(_FOLDER / "log again")) == len(log)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": read_manifest,
    "memory": read_memory,
    "log": read_log,
}


def seeds(target: str) -> list[bytes]:
    """Valid inputs, sealed and not."""
    if target == "log":
        return [b"\0" + _log()]
    if target == "manifest":
        text = json.dumps(MANIFEST.to_dict()).encode()
        return [b"\0" + text, b"\1" + text]
    return [bytes([flag]) + content for flag in (0, 1) for content in _memories()]


def _memories() -> list[bytes]:
    arrays = {f"state.{spec.name}": np.zeros((1, *spec.row_shape), spec.dtype) for spec in MANIFEST.state}
    pending = {
        "pending.targets": np.array([1, -1]),
        "pending.readout_key": np.ones((2, 2), np.float32),
        "pending.readout_rows": np.ones((2, 1), np.int64),
        "pending.logits": np.ones((2, 4), np.float32),
    }
    last = {"last_logits": np.ones(4, np.float32)}
    found = []
    layers = {
        "memories.sequence": np.array([1, 2]),
        "memories.targets": np.array([2, -1]),
        "memories.taught": np.array([1, 1]),
        "memories.steps": np.array([3]),
        "memories.anchor.memory": np.ones((1, 2, 2), np.float32),
        "memories.anchor.position": np.zeros(1, np.int64),
    }
    beside = {"memories.anchor.readout": np.ones((1, 3, 4), np.float32)}
    moments = {f"memories.{kind}.memory": np.ones((1, 2, 2), np.float32) for kind in ("mean", "square")}
    adam = Editor("prediction", optimizer="adam", chunk=4)
    for editor, more in (
        (None, {}),
        (None, {name: array[-1:] for name, array in pending.items()} | last),  # left by a lent editor
        (adam, layers | moments | last),
        (Editor(chunk=4, also=Editor("prediction", chunk=4)), layers | beside | pending | last),
        (Editor(chunk=4), pending | last),
        (Editor(chunk=4, optimizer="adagrad"), pending | last | {ENERGY: np.ones(3, np.float32)}),
    ):
        snapshot = Snapshot(MANIFEST.identity, 2, (0.5,), editor.to_dict() if editor else None, arrays | more)
        state.save_snapshot(snapshot, _FOLDER / "seed")
        found.append((_FOLDER / "seed").read_bytes())
    return found


def _log() -> bytes:
    log = EditLog()
    norms = {"memory": 1.5}
    lesson = Lesson("prediction", 0, 4, 3, 2.5, math.nan, norms, {"layer": 0.5}, 1, "loss rose", 0.1)
    log.add(EditReport(4, [1.0], [lesson, Lesson("readout", 4, 4)]))
    log.save(_FOLDER / "log seed")
    return (_FOLDER / "log seed").read_bytes()


def _seal_manifest(content: dict[str, Any]) -> None:
    names = ("model", "graphs", "state", "files")
    canonical = json_reader.canonical({name: content[name] for name in names})
    content["identity"] = hashlib.sha256(canonical).hexdigest()


def _sealed_memory(data: bytes) -> bytes:
    """The file with the digest that its content asks for, if it can be read that far."""
    with contextlib.suppress(Exception):
        table = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header = json.loads(table["__metadata__"]["titans"])
        del header["digest"]
        header["digest"] = state._digest(header, state.load_arrays(data))
        return _with_table(data, table | {"__metadata__": {"titans": json.dumps(header)}})
    return data


def _with_table(data: bytes, table: Any) -> bytes:  # noqa: ANN401 - JSON
    text = json.dumps(table).encode()
    end = 8 + int.from_bytes(data[:8], "little")
    return len(text).to_bytes(8, "little") + text + data[end:]


def changed(data: bytes, target: str, choice: random.Random) -> bytes:
    """The input with one change to its JSON.

    Raises:
        Exception: it is no JSON any more.
    """
    return bytes([choice.randrange(2)]) + _mutated_json(data[1:], target, choice)


def _mutated_json(data: bytes, target: str, choice: random.Random) -> bytes:
    if target == "manifest":
        return json.dumps(_changed(json.loads(data), choice)).encode()
    if target == "log":
        lines = data.splitlines()
        number = choice.randrange(len(lines))
        lines[number] = json.dumps(_changed(json.loads(lines[number]), choice)).encode()
        return b"\n".join(lines)
    table = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if choice.random() < 0.5:
        header = _changed(json.loads(table["__metadata__"]["titans"]), choice)
        return _with_table(data, table | {"__metadata__": {"titans": json.dumps(header)}})
    return _with_table(data, _changed(table, choice))


def _changed(content: Any, choice: random.Random) -> Any:  # noqa: ANN401 - JSON
    """One value somewhere replaced, removed, doubled or moved."""
    places = [(content, key) for key in _keys(content)]
    for place, key in places:
        places.extend((place[key], inner) for inner in _keys(place[key]))
    place, key = choice.choice(places)
    other, other_key = choice.choice(places)
    match choice.randrange(4):
        case 0:
            place[key] = choice.choice(_STRANGE)
        case 1:
            del place[key]
        case 2:
            place[key] = json.loads(json.dumps(other[other_key]))
        case _:
            new = choice.choice(("extra", "../extra", "state.memory", "editor", "\ud800"))
            place[new if isinstance(place, dict) else slice(0, 0)] = [place[key]]
    return content


def _keys(content: object) -> list[Any]:
    if isinstance(content, dict):
        return list(content)
    return list(range(len(content))) if isinstance(content, list) else []

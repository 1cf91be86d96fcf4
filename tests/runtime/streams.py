"""Streams, cuts and comparisons that the tests of sessions share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from titans_runtime import Model, Session, Snapshot
from titans_runtime.bundle import MANIFEST_NAME, file_entry
from titans_runtime.editor import Editor
from titans_runtime.forward import SEGMENT
from titans_runtime.manifest import FileEntry, Manifest
from titans_runtime.manifest.document import identity_of as _identity_of
from titans_runtime.manifest.reading import graph_spec, state_spec
from titans_runtime.report import Lesson

Array = npt.NDArray[Any]

EDITORS = [None, Editor(step=0.5, chunk=1), Editor(step=0.5, chunk=4), Editor(step=0.5, chunk=7)]
LONG = bytes(np.random.default_rng(0).integers(0, 256, SEGMENT + 90, dtype=np.uint8))

streams = st.binary(min_size=2, max_size=40)


def cuts(length: int) -> st.SearchStrategy[list[int]]:
    """Places to cut a stream of ``length`` tokens at, in order."""
    return st.sets(st.integers(1, length - 1), max_size=6).map(sorted)


def parts(text: bytes, places: list[int]) -> Iterator[bytes]:
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        yield text[start:end]


def append_parts(session: Session, text: bytes, places: list[int]) -> Array:
    return np.concatenate([session.append(part) for part in parts(text, places)])


def relative_error(actual: Array, expected: Array) -> float:
    """Largest difference, relative to the largest expected value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_same_snapshot(one: Snapshot, other: Snapshot) -> None:
    """Equal bit for bit."""
    assert (one.bundle, one.position, one.edit, one.editor) == (
        other.bundle,
        other.position,
        other.edit,
        other.editor,
    )
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.tobytes() == other.arrays[name].tobytes(), name


def change_manifest(
    folder: Path, change: Callable[[dict[str, Any]], object], identify: bool = True, rehash: bool = False
) -> str:
    """Change a bundle's manifest; its files' hashes and its identity follow where wanted."""
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text("utf-8"))
    change(content)
    if rehash:
        content["files"] = {name: vars(file_entry(folder / name)) for name in content["files"]}
    if identify:
        content["identity"] = identity_of(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(content["identity"])


def identity_of(content: dict[str, Any]) -> str:
    return _identity_of(
        content["model"],
        {name: graph_spec(graph, name) for name, graph in content["graphs"].items()},
        tuple(state_spec(entry, "state") for entry in content["state"]),
        {name: FileEntry(**entry) for name, entry in content["files"].items()},
    )


def manifest_of(folder: Path) -> Manifest:
    return Manifest.from_dict(json.loads((folder / MANIFEST_NAME).read_text("utf-8")))


def run_graph(model: Model, name: str, given: dict[str, Array], tokens: int) -> dict[str, Array]:
    """Outputs of one of a bundle's graphs; inputs that it does not take are left out."""
    spec = model.manifest.graphs[name]
    sizes = {"batch": len(next(iter(given.values()))), "tokens": tokens}
    found: dict[str, Array] = {
        tensor.name: np.zeros([sizes.get(str(axis), axis) for axis in tensor.shape], np.float32)
        for tensor in spec.outputs
    }
    inputs = {tensor.name: np.ascontiguousarray(given[tensor.name]) for tensor in spec.inputs}
    model.backend.graph(name).bind(inputs, found).run()
    return found


_TEXT = b"a memory that moves only when it must, and is the same wherever it is. " * 9


def every_way(model: Model) -> tuple[list[Array], dict[str, Array]]:
    """What a model answers on every way through a session and a batch, and the state at the end."""
    session = model.session()
    seen = [session.append(_TEXT[:100])]
    mark = session.snapshot()
    seen += [session.append(_TEXT[i : i + 1]) for i in range(100, 109)]
    twin = session.fork()
    seen += [twin.append(_TEXT[120:180])]
    session.restore(mark)
    seen += [session.append(_TEXT)]
    with model.batch([session, twin, model.session(edit=0.0, editor=None)]) as batch:
        seen += batch.append([_TEXT[:30], _TEXT[3:20], _TEXT[:40]])
        seen += batch.append([_TEXT[:1], _TEXT[1:2], _TEXT[2:3]])
    seen += [session.append(_TEXT[:5])]
    return seen, session.snapshot().arrays


def assert_same_everywhere(
    expected: tuple[list[Array], dict[str, Array]], actual: tuple[list[Array], dict[str, Array]]
) -> None:
    """Bit for bit."""
    for first, second in zip(expected[0], actual[0], strict=True):
        assert np.array_equal(first, second)
    for name, array in expected[1].items():
        assert np.array_equal(array, actual[1][name]), name


def continuation(session: Session) -> list[bytes]:
    """Everything that a session does next, as bytes."""
    return [
        session.append(b"n").tobytes(),
        session.append(b"ext, in two").tobytes(),
        bytes(session.generate(9, 0.8, seed=3)),
        session.append(b" and more of it").tobytes(),
        bytes(session.generate(9, 0.8, seed=4, learn=True)),
        session.append(b".").tobytes(),
    ]


def lesson_of(model: Model, editor: Editor, text: bytes) -> tuple[Lesson, dict[str, Array]]:
    """The only lesson of a text of one period and a token, and the whole state after it."""
    session = model.session(edit=0.0, editor=editor)
    session.append(text)
    assert session.last_edit is not None
    (lesson,) = session.last_edit.lessons
    return lesson, dict(session.snapshot().arrays)


def check_rollback(model: Model, editor: Editor, text: bytes, sizes: Iterable[float]) -> None:
    """With rollback, the step that raised the loss is taken back and those before it are kept.

    The losses that it goes by are those without rollback, which are the same bit for bit. Among the sizes
    must be one that leads up again, but not as far as where it began.
    """
    telling = 0
    for size in sizes:
        plain = replace(editor, step=size, rollback=False)
        first, *rest = (
            lesson_of(model, replace(plain, steps=steps + 2), text)[0] for steps in range(editor.steps)
        )
        losses = [first.loss, first.loss_after, *(lesson.loss_after for lesson in rest)]
        kept = next((n for n in range(editor.steps) if not losses[n + 1] <= losses[n]), editor.steps)
        lesson, states = lesson_of(model, replace(plain, rollback=True), text)
        assert (lesson.steps, lesson.refused) == (kept, "loss rose" if kept < editor.steps else "")
        np.testing.assert_equal(lesson.loss_after, losses[kept] if kept else np.nan)
        other = replace(plain, steps=kept) if kept else replace(plain, threshold=1e3)
        expected = lesson_of(model, other, text)[1]
        assert all(np.array_equal(states[name], expected[name]) for name in expected)
        telling += 0 < kept < editor.steps and losses[kept + 1] < losses[0]
    assert telling


CODE = b"def f(x):\n    return [y * y for y in x if y % 2]\n" * 2
"""A text that repeats itself."""


def edited_session(model: Model, editor: str, edit: float = 0.0) -> Session:
    """A session with the editor that a text describes."""
    return model.session(edit=edit, editor=Editor.parse(editor))

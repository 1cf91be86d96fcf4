"""Whether what a memory file holds is the state of a session of the bundle at hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from titans_runtime.backends import DTYPES, Array, Arrays
from titans_runtime.editor import MAX_CHUNK, Editor, chosen_memories, decays
from titans_runtime.errors import StateError, UsageError
from titans_runtime.json_reader import MAX_BYTES
from titans_runtime.manifest import Manifest
from titans_runtime.optimizers import OPTIMIZERS
from titans_runtime.snapshot import ENERGY, PREFIX, Snapshot

Expected = dict[str, tuple[tuple[int, ...], type[np.generic]]]
"""Shapes and dtypes by name."""

_PENDING = ("targets", "readout_key", "readout_rows", "logits")


def most_bytes(manifest: Manifest) -> int:
    """More than any memory of the bundle takes: memory is taken for nothing larger.

    State and what an optimizer keeps beside it, the pending positions of the longest period, the header.
    """
    outputs = {tensor.name: tensor.shape for tensor in manifest.graphs["model"].outputs}
    position = 8 * (manifest.width + _last(outputs, "readout_key") + _last(outputs, "readout_rows") + 1)
    return 2 * MAX_BYTES + 4 * manifest.state_bytes + MAX_CHUNK * position


def check_finite(arrays: Mapping[str, Array]) -> None:
    """Whether all numbers are finite.

    Raises:
        StateError: an array holds others; the message names it.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise StateError(f"{name} holds values that are not finite; restore an older snapshot")


def check_fits(snapshot: Snapshot, manifest: Manifest) -> None:
    """Whether edit strength, editor and tensors are those of a session of the bundle.

    Raises:
        StateError: a tensor is missing, unknown, of another shape or dtype, or holds what it cannot.
    """
    edit = snapshot.edit
    if len(edit) != manifest.edit_layers or not all(type(x) in (int, float) and 0 <= x <= 1 for x in edit):
        raise StateError(f"edit must be {manifest.edit_layers} numbers between 0 and 1")
    readout, layers = _editors(snapshot)
    _check_state(snapshot.arrays, manifest)
    expected = _of_layers(snapshot, manifest, layers) | _of_readout(snapshot, manifest, readout)
    if readout is not None and f"{PREFIX}sequence" in expected and layers is not None:
        graph = manifest.graphs[layers.graph]
        if any(tensor.name == "past.readout" for tensor in graph.inputs):
            expected[f"{PREFIX}anchor.readout"] = ((1, *_readout_shape(manifest)), np.float32)
    if "last_logits" in snapshot.arrays:
        expected["last_logits"] = ((manifest.width,), np.float32)
    state = {f"state.{entry.name}" for entry in manifest.state}
    unknown = sorted(snapshot.arrays.keys() - state - expected.keys())
    if unknown:
        raise StateError(f"tensor {unknown[0]} is unknown")
    for name, (shape, dtype) in expected.items():
        array = snapshot.arrays.get(name)
        if array is None or array.shape != shape or array.dtype != dtype:
            raise StateError(f"{name} is missing, or not {np.dtype(dtype).name} {shape}")
    _check_values(snapshot.arrays, manifest)


def _editors(snapshot: Snapshot) -> tuple[Editor | None, Editor | None]:
    """The editor of the readout memory, and that of the layers' memories."""
    try:
        parts = Editor.from_dict(snapshot.editor).parts if snapshot.editor is not None else ()
    except UsageError as error:
        raise StateError(str(error)) from None
    readout = next((part for part in parts if part.is_readout), None)
    return readout, next((part for part in parts if not part.is_readout), None)


def _check_state(arrays: Arrays, manifest: Manifest) -> None:
    for entry in manifest.state:
        array = arrays.get(f"state.{entry.name}")
        if array is None:
            raise StateError(f"tensor state.{entry.name} is missing")
        if array.shape != (1, *entry.row_shape) or array.dtype != DTYPES[entry.dtype]:
            raise StateError(
                f"state.{entry.name} is {array.dtype.name} {array.shape}; "
                f"expected {entry.dtype} {(1, *entry.row_shape)}"
            )


def _of_readout(snapshot: Snapshot, manifest: Manifest, editor: Editor | None) -> Expected:
    """What an editor of the readout memory has left.

    Without one a single position may be pending: the last that another editor was given for one call.
    """
    arrays, expected = snapshot.arrays, Expected()
    if editor is not None and editor.optimizer == "adagrad":
        expected[ENERGY] = ((_readout_rows(manifest),), np.float32)
    if not any(name.startswith("pending.") for name in arrays):
        return expected
    targets = arrays.get("pending.targets", np.empty(0))
    seen = min(snapshot.position, 1) if editor is None else _seen_of_period(snapshot.position, editor)
    if not (1 <= targets.size <= seen and -1 <= targets.min() <= targets.max() < manifest.vocab_size):
        raise StateError(f"pending.targets do not fit the editor {snapshot.editor}")
    outputs = {tensor.name: tensor.shape for tensor in manifest.graphs["model"].outputs}
    shapes = ((), (_last(outputs, "readout_key"),), (_last(outputs, "readout_rows"),), (manifest.vocab_size,))
    dtypes: tuple[type[np.generic], ...] = (np.int64, np.float32, np.int64, np.float32)
    return expected | {
        f"pending.{name}": ((targets.size, *shape), dtype)
        for name, shape, dtype in zip(_PENDING, shapes, dtypes, strict=True)
    }


def _of_layers(snapshot: Snapshot, manifest: Manifest, editor: Editor | None) -> Expected:
    """What an editor of the layers' memories has left."""
    if editor is None:
        return {}
    arrays = snapshot.arrays
    try:
        memories = chosen_memories(editor, manifest)
    except UsageError as error:
        raise StateError(str(error)) from None
    entries = {entry.name: entry for entry in manifest.state}
    expected: Expected = {f"{PREFIX}steps": ((1,), np.int64)}
    for memory in memories:
        for kind in OPTIMIZERS[editor.optimizer](size=editor.step, **decays(editor)).moments:
            expected[f"{PREFIX}{kind}.{memory}"] = ((1, *entries[memory].row_shape), np.float32)
    sequence = arrays.get(f"{PREFIX}sequence")
    if sequence is None:
        return expected
    count, seen = sequence.shape[0] if sequence.ndim else 0, _seen_of_period(snapshot.position, editor)
    targets, taught = (arrays.get(f"{PREFIX}{name}", np.zeros(0)) for name in ("targets", "taught"))
    width = [axis for axis in manifest.sequence.shape if isinstance(axis, int)]
    fits = 1 <= count <= seen and targets.size == taught.size == count
    if not fits or not -1 <= targets.min() <= targets.max() < max(manifest.vocab_size, 1):
        raise StateError(f"{PREFIX}targets do not fit the editor {snapshot.editor}")
    expected[f"{PREFIX}sequence"] = ((count, *width), DTYPES[manifest.sequence.dtype])
    expected |= {f"{PREFIX}{name}": ((count,), np.int64) for name in ("targets", "taught")}
    changed = {tensor.name.removeprefix("present.") for tensor in manifest.graphs["model"].outputs}
    return expected | {
        f"{PREFIX}anchor.{name}": ((1, *entry.row_shape), DTYPES[entry.dtype])
        for name, entry in entries.items()
        if name in changed
    }


def _check_values(arrays: Arrays, manifest: Manifest) -> None:
    """Ids, rows, counts and sums of squares: what indexes, and what is drawn the root of."""
    ids, vocab = arrays.get(f"{PREFIX}sequence", np.empty(0)), manifest.vocab_size
    if vocab and ids.size and not 0 <= ids.min() <= ids.max() < vocab:
        raise StateError(f"{PREFIX}sequence holds ids outside the vocabulary")
    rows, height = arrays.get("pending.readout_rows", np.empty(0)), _readout_rows(manifest)
    if rows.size and not 0 <= rows.min() <= rows.max() < height:
        raise StateError(f"pending.readout_rows lie outside the readout memory of {height} rows")
    for name, array in arrays.items():
        sums = name in (ENERGY, f"{PREFIX}steps", f"{PREFIX}taught") or name.startswith(f"{PREFIX}square.")
        if sums and array.size and array.min() < 0:
            raise StateError(f"{name} is below zero")


def _readout_rows(manifest: Manifest) -> int:
    return next(iter(_readout_shape(manifest)), 0)


def _readout_shape(manifest: Manifest) -> tuple[int, ...]:
    return next((entry.row_shape for entry in manifest.state if entry.name == "readout"), ())


def _last(outputs: Mapping[str, tuple[int | str, ...]], name: str) -> int:
    size = outputs[name][-1] if name in outputs else 0
    return size if isinstance(size, int) else 0


def _seen_of_period(position: int, editor: Editor) -> int:
    """Positions of the last period that the stream has reached: the most that can be pending."""
    return (position - 1) % editor.chunk + 1 if position else 0

"""The state of one stream at one moment: snapshots, and the memory file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from titans_runtime.backends import DTYPES, Array, Arrays
from titans_runtime.editor import MAX_CHUNK, Editor, chosen_memories, decays
from titans_runtime.errors import EnvironmentProblem, StateError, UsageError
from titans_runtime.files import open_without_waiting, write_atomically
from titans_runtime.json_reader import MAX_BYTES, canonical, parse_object
from titans_runtime.manifest import Manifest
from titans_runtime.optimizers import OPTIMIZERS

FORMAT_VERSION = 1
PREFIX = "memories."
"""Of everything that an editor of the layers' memories adds to a snapshot."""

ENERGY = "editor.energy"
"""Name of the optimizer's sums in a snapshot, ``(Dr,)`` float32."""

_METADATA_KEY = "titans"
_MAX_BYTES = 4 * 2**30
_FIELDS = ("format_version", "bundle", "position", "edit", "editor", "digest")


@dataclass(frozen=True)
class Snapshot:
    """A session's whole state at one moment; restoring it continues bit for bit.

    Attributes:
        bundle: identity of the bundle that it belongs to.
        position: tokens seen.
        edit: edit strength per layer.
        editor: specification of the session's editor, or None.
        arrays: copies, by name: ``state.<name>``, ``pending.<name>`` and, once a token was seen,
            ``last_logits``.
    """

    bundle: str
    position: int
    edit: tuple[float, ...]
    editor: dict[str, Any] | None
    arrays: Arrays = field(repr=False)


def save_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Write a memory file, atomically.

    Raises:
        StateError: a value is not finite; nothing is written.
        EnvironmentProblem: the file cannot be written; an older one is untouched.
    """
    _check_finite(snapshot.arrays, "the session")
    header = {
        "format_version": FORMAT_VERSION,
        "bundle": snapshot.bundle,
        "position": snapshot.position,
        "edit": list(snapshot.edit),
        "editor": snapshot.editor,
    }
    header["digest"] = _digest(header, snapshot.arrays)
    content = save_arrays(snapshot.arrays, {_METADATA_KEY: json.dumps(header)})
    write_atomically(path, content)


def load_snapshot(path: Path, manifest: Manifest) -> Snapshot:
    """Read a memory file for the bundle of ``manifest``.

    Raises:
        StateError: no memory file, damaged, of another format version, of another bundle, or its
            tensors do not fit.
    """
    with _opened(path) as (file, header):
        if header["bundle"] != manifest.identity:
            raise StateError(
                f"{path}: the memory of bundle {str(header['bundle'])[:12]}…, not of "
                f"{manifest.identity[:12]}…; open it with the bundle it was saved under"
            )
        arrays = _arrays(path, file, header, _most_bytes(manifest))
    _check_shapes(path, arrays, manifest)
    _check_pending(path, arrays, manifest, header)
    _check_finite(arrays, str(path))
    edit = header["edit"]
    if len(edit) != manifest.edit_layers or not all(type(x) in (int, float) and 0 <= x <= 1 for x in edit):
        raise StateError(f"{path}: edit must be {manifest.edit_layers} numbers between 0 and 1")
    return Snapshot(header["bundle"], header["position"], tuple(edit), header["editor"], arrays)


def read_snapshot(path: Path) -> Snapshot:
    """Read a memory file by itself: what it says is consistent, whatever its bundle.

    Raises:
        StateError: no memory file, or damaged.
    """
    with _opened(path) as (file, header):
        arrays = _arrays(path, file, header, _MAX_BYTES)
    return Snapshot(header["bundle"], header["position"], tuple(header["edit"]), header["editor"], arrays)


def with_memories_of(snapshot: Snapshot, learnt: Snapshot, manifest: Manifest) -> Snapshot:
    """A snapshot with the memories of another one, and with what its editors' optimizers have summed up."""
    taken = {f"state.{entry.name}" for entry in manifest.state if entry.role == "memory"} | {ENERGY}
    pending = ("sequence", "targets", "taught", "anchor")
    for name in learnt.arrays:
        kind = name.removeprefix(PREFIX).partition(".")[0]
        if name.startswith(PREFIX) and kind not in pending:
            taken.add(name)
    own = {
        name: array
        for name, array in snapshot.arrays.items()
        if not name.startswith(("pending.", PREFIX)) and name != ENERGY
    }
    arrays = own | {name: learnt.arrays[name] for name in taken if name in learnt.arrays}
    return Snapshot(snapshot.bundle, snapshot.position, snapshot.edit, snapshot.editor, arrays)


def describe_snapshot(path: Path) -> dict[str, Any]:
    """Header and tensor shapes of a memory file, after its digest has been checked.

    Raises:
        StateError: no memory file, or damaged.
    """
    with _opened(path) as (file, header):
        arrays = _arrays(path, file, header, _MAX_BYTES)
        size = file.tell()
    shapes = {name: list(array.shape) for name, array in sorted(arrays.items())}
    return header | {"tensors": shapes, "bytes": size}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    """A memory file, of which the header alone has been read, and that header."""
    try:
        file = open_without_waiting(path)
    except OSError as error:
        raise StateError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise StateError(f"{path}: cannot be read (no plain file)")
        yield file, _header(path, file)


def _header(path: Path, file: BinaryIO) -> dict[str, Any]:
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        tensors = parse_object(file.read(min(length, MAX_BYTES + 1)), str(path))
        header = parse_object(tensors["__metadata__"][_METADATA_KEY].encode(), str(path))
    except OSError as error:
        raise StateError(f"{path}: cannot be read ({error.strerror})") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise StateError(f"{path}: no memory file of this project, or damaged") from None
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        newer = type(version) is int and version > FORMAT_VERSION
        fix = "install a newer titans-runtime" if newer else "open it with the titans-runtime that saved it"
        raise StateError(f"{path}: memory format {version}; this runtime reads {FORMAT_VERSION}; {fix}")
    position = header.get("position")
    if sorted(header) != sorted(_FIELDS) or type(position) is not int or not 0 <= position < 2**63:
        raise StateError(f"{path}: the header is damaged; restore the file from a copy")
    if not isinstance(header["edit"], list) or not isinstance(header["editor"], dict | None):
        raise StateError(f"{path}: the header is damaged; restore the file from a copy")
    return header


def _most_bytes(manifest: Manifest) -> int:
    """More than any memory of the bundle takes: memory is taken for nothing larger.

    State and what an optimizer keeps beside it, the pending positions of the longest period, the header.
    """
    outputs = {tensor.name: tensor.shape for tensor in manifest.graphs["model"].outputs}
    position = 8 * (manifest.width + _last(outputs, "readout_key") + _last(outputs, "readout_rows") + 1)
    return min(_MAX_BYTES, 2 * MAX_BYTES + 4 * manifest.state_bytes + MAX_CHUNK * position)


def _arrays(path: Path, file: BinaryIO, header: Mapping[str, Any], most: int) -> Arrays:
    size = file.seek(0, os.SEEK_END)
    if size > most:
        raise StateError(f"{path}: {size} bytes; a memory file has at most {most} here")
    file.seek(0)
    try:
        arrays: Arrays = load_arrays(file.read(size))
    except OSError as error:
        raise StateError(f"{path}: cannot be read ({error.strerror})") from None
    except MemoryError:
        raise EnvironmentProblem(f"{path}: {size} bytes do not fit into this machine's memory") from None
    except Exception:  # noqa: BLE001 - safetensors raises a type of its own
        raise StateError(f"{path}: damaged or truncated; restore the file from a copy") from None
    content = {name: value for name, value in header.items() if name != "digest"}
    if _digest(content, arrays) != header["digest"]:
        raise StateError(f"{path}: its content does not match its digest; restore the file from a copy")
    return arrays


def _digest(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(canonical(dict(header)))
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(canonical([name, array.dtype.name, list(array.shape)]))
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _check_shapes(path: Path, arrays: Arrays, manifest: Manifest) -> None:
    for entry in manifest.state:
        array = arrays.get(f"state.{entry.name}")
        if array is None:
            raise StateError(f"{path}: tensor state.{entry.name} is missing")
        if array.shape != (1, *entry.row_shape) or array.dtype != DTYPES[entry.dtype]:
            raise StateError(
                f"{path}: state.{entry.name} is {array.dtype.name} {array.shape}; "
                f"expected {entry.dtype} {(1, *entry.row_shape)}"
            )


def _check_pending(path: Path, arrays: Arrays, manifest: Manifest, header: Mapping[str, Any]) -> None:
    """What comes after the state: pending positions, all or none, and the last logits."""
    vocab = manifest.vocab_size
    allowed = {f"state.{entry.name}" for entry in manifest.state}
    allowed |= {ENERGY, "last_logits", "pending.logits"}
    allowed |= {"pending.targets", "pending.readout_key", "pending.readout_rows"}
    expected = _editors_arrays(path, arrays, manifest, header)
    unknown = sorted(arrays.keys() - allowed - expected.keys())
    if unknown:
        raise StateError(f"{path}: tensor {unknown[0]} is unknown")
    expected |= {"last_logits": ((manifest.width,), np.float32)}
    readout = next((entry.row_shape for entry in manifest.state if entry.name == "readout"), (0,))
    outputs = {tensor.name: tensor.shape for tensor in manifest.graphs["model"].outputs}
    own = _editor_of(header, readout=True)
    if (own.get("optimizer") == "adagrad") or ENERGY in arrays:
        expected[ENERGY] = ((readout[0],), np.float32)
    if any(name.startswith("pending.") for name in arrays):
        targets = arrays.get("pending.targets", np.empty(0))
        seen = _seen_of_period(header["position"], own)
        if not (1 <= targets.size <= seen and -1 <= targets.min() <= targets.max() < vocab):
            raise StateError(f"{path}: pending.targets do not fit the editor {header['editor']}")
        expected["pending.targets"] = ((targets.size,), np.int64)
        expected["pending.readout_key"] = ((targets.size, _last(outputs, "readout_key")), np.float32)
        expected["pending.readout_rows"] = ((targets.size, _last(outputs, "readout_rows")), np.int64)
        expected["pending.logits"] = ((targets.size, vocab), np.float32)
    for name, (shape, dtype) in expected.items():
        array = arrays.get(name)
        if array is None and name == "last_logits":
            continue
        if array is None or array.shape != shape or array.dtype != dtype:
            raise StateError(f"{path}: {name} is missing, or not {np.dtype(dtype).name} {shape}")
    rows = arrays.get("pending.readout_rows", np.empty(0))
    if rows.size and not 0 <= rows.min() <= rows.max() < readout[0]:
        raise StateError(f"{path}: pending.readout_rows lie outside the readout memory of {readout[0]} rows")


def _last(outputs: Mapping[str, tuple[int | str, ...]], name: str) -> int:
    size = outputs[name][-1] if name in outputs else 0
    return size if isinstance(size, int) else 0


def _editor_of(header: Mapping[str, Any], readout: bool) -> dict[str, Any]:
    """The specification of the editor of the readout memory, or of the other; empty where there is none."""
    editor = header["editor"] or {}
    parts = [editor, editor.get("also") or {}]
    found = (part for part in parts if part and (part.get("objective", "readout") == "readout") == readout)
    return next(found, {})


def _editors_arrays(
    path: Path, arrays: Arrays, manifest: Manifest, header: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shapes and dtypes of what an editor of the layers' memories has left."""
    content = _editor_of(header, readout=False)
    if not content:
        return {}
    try:
        editor = Editor.from_dict({name: value for name, value in content.items() if name != "also"})
        memories = chosen_memories(editor, manifest)
    except (UsageError, TypeError) as error:
        raise StateError(f"{path}: {error}") from None
    entries = {entry.name: entry for entry in manifest.state}
    expected: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {f"{PREFIX}steps": ((1,), np.int64)}
    for memory in memories:
        for kind in OPTIMIZERS[editor.optimizer](size=editor.step, **decays(editor)).moments:
            expected[f"{PREFIX}{kind}.{memory}"] = ((1, *entries[memory].row_shape), np.float32)
    sequence = arrays.get(f"{PREFIX}sequence")
    if sequence is None:
        return expected
    count, seen = len(sequence), _seen_of_period(header["position"], content)
    targets, taught = (arrays.get(f"{PREFIX}{name}", np.zeros(0)) for name in ("targets", "taught"))
    width = [axis for axis in manifest.sequence.shape if isinstance(axis, int)]
    fits = 1 <= count <= seen and targets.size == taught.size == count
    if not fits or not -1 <= targets.min() <= targets.max() < max(manifest.vocab_size, 1):
        raise StateError(f"{path}: {PREFIX}targets do not fit the editor {header['editor']}")
    if manifest.vocab_size and not 0 <= sequence.min() <= sequence.max() < manifest.vocab_size:
        raise StateError(f"{path}: {PREFIX}sequence holds ids outside the vocabulary")
    expected[f"{PREFIX}sequence"] = ((count, *width), DTYPES[manifest.sequence.dtype])
    expected |= {f"{PREFIX}{name}": ((count,), np.int64) for name in ("targets", "taught")}
    changed = {tensor.name.removeprefix("present.") for tensor in manifest.graphs["model"].outputs}
    return expected | {
        f"{PREFIX}anchor.{name}": ((1, *entry.row_shape), DTYPES[entry.dtype])
        for name, entry in entries.items()
        if name in changed
    }


def _seen_of_period(position: int, editor: Mapping[str, Any]) -> int:
    """Positions of the last period that the stream has reached: the most that can be pending."""
    chunk = editor.get("chunk")
    return (position - 1) % chunk + 1 if type(chunk) is int and chunk > 0 and position > 0 else 0


def _check_finite(arrays: Mapping[str, Array], where: str) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise StateError(f"{where}: {name} holds values that are not finite; restore an older snapshot")

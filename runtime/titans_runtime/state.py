"""The memory file: a snapshot on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import load as load_arrays

from titans_runtime.backends import Array, Arrays
from titans_runtime.errors import EnvironmentProblem, StateError
from titans_runtime.files import open_without_waiting, write_output
from titans_runtime.json_reader import MAX_BYTES, canonical, parse_object
from titans_runtime.manifest import Manifest
from titans_runtime.snapshot import Snapshot
from titans_runtime.snapshot_checks import check_finite, check_fits, most_bytes
from titans_runtime.tensors import tensor_bytes

FORMAT_VERSION = 1
_METADATA_KEY = "titans"
_MAX_BYTES = 4 * 2**30
_FIELDS = ("format_version", "bundle", "position", "edit", "editor", "digest")


def save_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Write a memory file, atomically.

    Raises:
        StateError: a value is not finite; nothing is written.
        UsageError: ``path`` names a pipe, a device or the like.
        EnvironmentProblem: the file cannot be written; an older one is untouched.
    """
    write_output(path, snapshot_bytes(snapshot))


def snapshot_bytes(snapshot: Snapshot) -> bytes:
    """The content of a memory file.

    Raises:
        StateError: a value is not finite.
    """
    try:
        check_finite(snapshot.arrays)
    except StateError as error:
        raise StateError(f"the session: {error}") from None
    header = {
        "format_version": FORMAT_VERSION,
        "bundle": snapshot.bundle,
        "position": snapshot.position,
        "edit": list(snapshot.edit),
        "editor": snapshot.editor,
    }
    header["digest"] = _digest(header, snapshot.arrays)
    return tensor_bytes(snapshot.arrays, {_METADATA_KEY: json.dumps(header)})


def load_snapshot(path: Path, manifest: Manifest) -> Snapshot:
    """Read a memory file for the bundle of ``manifest``.

    Raises:
        StateError: no memory file, damaged, of another format version, of another bundle, or its
            tensors do not fit.
    """
    with _opened(path) as (file, header):
        return _fitting(path, file, header, manifest)


def snapshot_from_bytes(content: bytes, where: Path, manifest: Manifest) -> Snapshot:
    """Read the content of a memory file for the bundle of ``manifest``.

    Raises:
        StateError: as for :func:`load_snapshot`; ``where`` names the content.
    """
    file = io.BytesIO(content)
    return _fitting(where, file, _header(where, file), manifest)


def _fitting(path: Path, file: BinaryIO, header: Mapping[str, Any], manifest: Manifest) -> Snapshot:
    """The rest of a memory file whose header has been read, if it fits the bundle."""
    if header["bundle"] != manifest.identity:
        raise StateError(
            f"{path}: the memory of bundle {str(header['bundle'])[:12]}…, not of "
            f"{manifest.identity[:12]}…; open it with the bundle it was saved under"
        )
    arrays = _arrays(path, file, header, min(_MAX_BYTES, most_bytes(manifest)))
    snapshot = _snapshot(header, arrays)
    try:
        check_fits(snapshot, manifest)
        check_finite(arrays)
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    return snapshot


def read_snapshot(path: Path) -> Snapshot:
    """Read a memory file by itself: what it says is consistent, whatever its bundle.

    Raises:
        StateError: no memory file, or damaged.
    """
    with _opened(path) as (file, header):
        arrays = _arrays(path, file, header, _MAX_BYTES)
    try:
        check_finite(arrays)
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    return _snapshot(header, arrays)


def _snapshot(header: Mapping[str, Any], arrays: Arrays) -> Snapshot:
    return Snapshot(header["bundle"], header["position"], tuple(header["edit"]), header["editor"], arrays)


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

"""A bundle on disk: the only code that opens a bundle's files, to read and to write them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_arrays

from titans_runtime.backends import DTYPES, Arrays
from titans_runtime.errors import BundleError, EnvironmentProblem
from titans_runtime.files import open_without_waiting, write_atomically
from titans_runtime.json_reader import MAX_BYTES, parse_object
from titans_runtime.manifest import INITIAL_NAME, FileEntry, GraphSpec, Manifest, StateSpec, TensorSpec

MANIFEST_NAME = "titans.json"
WEIGHTS_NAME = "weights.bin"
GOLDENS_NAME = "goldens.safetensors"
_CHUNK = 2**20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest. Files are verified as they are read."""

    folder: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """The content of a listed file, after its size and hash have been checked.

        Raises:
            BundleError: the file is not listed, missing, a link, or differs from the manifest.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.folder}: {name!r} is not listed in {MANIFEST_NAME}")
        data = _read_regular(self.folder / name, entry.size)
        self._check_digest(name, hashlib.sha256(data).hexdigest())
        return data

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Check a listed file without taking it into memory, and that it stays the same until the end.

        For a library that opens the file itself, and whose result is used only after the end. What it has
        opened is what was checked: a file that takes its place, or is written to, differs in its inode or in
        the time of its last change.

        Raises:
            BundleError: as :meth:`read`; or the file changed in between.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.folder}: {name!r} is not listed in {MANIFEST_NAME}")
        from concurrent.futures import ThreadPoolExecutor

        path = self.folder / name
        with _open_regular(path, entry.size) as file, ThreadPoolExecutor(1) as beside:
            before = _mark(os.fstat(file.fileno()))
            digest = beside.submit(hashlib.file_digest, file, "sha256")  # while the other one loads
            try:
                yield
            finally:  # a load that fails, too, may have failed over what was altered
                self._check_digest(name, digest.result().hexdigest())
            if not path.exists() or _mark(path.lstat()) != before:
                raise BundleError(f"{path}: changed while it was loaded; load the bundle again")

    def _check_digest(self, name: str, digest: str) -> None:
        expected = self.manifest.files[name].sha256
        if digest != expected:
            raise BundleError(
                f"{self.folder / name}: SHA-256 {digest[:12]}… where {MANIFEST_NAME} says "
                f"{expected[:12]}…; the file was altered, export or copy the bundle again"
            )


def initial_state(bundle: Bundle) -> Arrays:
    """The state before the first token, one row of it; read, never written.

    Raises:
        BundleError: the file of learned memories is damaged, or does not fit the manifest.
    """
    learned = _learned(bundle) if INITIAL_NAME in bundle.manifest.files else {}
    state: Arrays = {}
    for entry in bundle.manifest.state:
        shape, dtype = (1, *entry.row_shape), np.dtype(DTYPES[entry.dtype])
        if not isinstance(entry.initial, str):
            state[entry.name] = np.full(shape, entry.initial, dtype)
            continue
        array = learned.get(entry.name)
        if array is None or array.shape != entry.row_shape or array.dtype != dtype:
            expected = f"{dtype.name} {entry.row_shape}"
            raise BundleError(f"{bundle.folder / INITIAL_NAME}: {entry.name} is missing, or not {expected}")
        if not np.isfinite(array).all():
            raise BundleError(f"{bundle.folder / INITIAL_NAME}: {entry.name} holds what is not finite")
        state[entry.name] = array[None]
    return state


def _learned(bundle: Bundle) -> Arrays:
    try:
        arrays: Arrays = load_arrays(bundle.read(INITIAL_NAME))
    except BundleError:
        raise
    except Exception as error:  # noqa: BLE001 - safetensors raises a type of its own
        raise BundleError(f"{bundle.folder / INITIAL_NAME}: damaged ({error})") from None
    return arrays


def open_bundle(folder: str | Path) -> Bundle:
    """Open a bundle: check the manifest and that exactly the listed files are there.

    Reads no weights: sizes are compared now, hashes when a file is read.

    Raises:
        BundleError: no bundle, a damaged manifest, or a missing, extra, linked or truncated file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise BundleError(f"{root}: no bundle; expected a folder with {MANIFEST_NAME}")
    path = root / MANIFEST_NAME
    if not path.exists():
        raise BundleError(f"{root}: no bundle; {MANIFEST_NAME} is missing")
    try:
        content = parse_object(_read_regular(path, None), str(path))
    except ValueError as error:
        raise BundleError(str(error)) from None
    manifest = Manifest.from_dict(content)
    _check_folder(root, manifest)
    return Bundle(root, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``titans.json``, the last file of a bundle, atomically."""
    write_atomically(folder / MANIFEST_NAME, (json.dumps(manifest.to_dict(), indent=1) + "\n").encode())


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file that was just written."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(digest.hexdigest(), size)


def _check_folder(root: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        _check_name(root, name)
        size = _regular_size(root / name)
        if size != entry.size:
            raise BundleError(
                f"{root / name}: {size} bytes where {MANIFEST_NAME} says {entry.size}; "
                "the file is truncated or altered, export or copy the bundle again"
            )
    listed = {*manifest.files, MANIFEST_NAME}
    for found in sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if _is_file(path)):
        if found not in listed:
            raise BundleError(f"{root / found}: not listed in {MANIFEST_NAME}; remove it from the bundle")


def _is_file(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def _check_name(root: Path, name: str) -> None:
    """A listed name must stay inside the folder: plain parts, no links on the way."""
    parts = name.split("/")
    if "\\" in name or not name.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise BundleError(f"{root}: file name {name!r} leaves the bundle or is not plain")
    for depth in range(1, len(parts)):
        if (root / "/".join(parts[:depth])).is_symlink():
            raise BundleError(f"{root / name}: a folder on its path is a symbolic link; copy the files in")


def _regular_size(path: Path) -> int:
    try:
        status = path.lstat()
    except OSError:
        raise BundleError(f"{path}: missing; export or copy the bundle again") from None
    _refuse_links(path, status)
    return status.st_size


def _refuse_links(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: a link or special file; a bundle holds plain files only, copy it in")
    if status.st_nlink > 1:
        raise BundleError(
            f"{path}: has {status.st_nlink} hard links, so it could change from outside; copy the bundle"
        )


def _mark(status: os.stat_result) -> tuple[int, ...]:
    """Changes when a file is replaced or written to."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _read_regular(path: Path, size: int | None) -> bytes:
    """Read a plain file through one descriptor, so that what was checked is what is read."""
    try:
        with _open_regular(path, size) as file:
            return file.read(os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
    except MemoryError:
        raise EnvironmentProblem(f"{path}: does not fit into this machine's memory") from None


@contextlib.contextmanager
def _open_regular(path: Path, size: int | None) -> Iterator[io.BufferedReader]:
    try:
        file = open_without_waiting(path, follow=False)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        status = os.fstat(file.fileno())
        _refuse_links(path, status)
        limit = MAX_BYTES if size is None else size
        if status.st_size > limit or (size is not None and status.st_size != size):
            raise BundleError(f"{path}: {status.st_size} bytes where {limit} were expected")
        yield file


__all__ = [
    "GOLDENS_NAME",
    "INITIAL_NAME",
    "MANIFEST_NAME",
    "WEIGHTS_NAME",
    "Bundle",
    "FileEntry",
    "GraphSpec",
    "Manifest",
    "StateSpec",
    "TensorSpec",
    "file_entry",
    "initial_state",
    "open_bundle",
    "write_manifest",
]

"""A reader of both formats, written from ``docs/format.md`` alone. It shares no code with the runtime."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}


class Refused(Exception):
    """The document is not what it says it is."""


def read_bundle(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and every listed file, checked against it."""
    manifest = _json((folder / "titans.json").read_bytes())
    _require(manifest["format_version"] == 1, "format version")
    content = {name: manifest[name] for name in ("model", "graphs", "state", "files")}
    _require(hashlib.sha256(_canonical(content)).hexdigest() == manifest["identity"], "identity")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    _require(found == {"titans.json", *manifest["files"]}, "list of files")
    files = {}
    for name, entry in manifest["files"].items():
        path = folder / name
        _require(not path.is_symlink() and path.stat().st_nlink == 1, f"link {name}")
        files[name] = path.read_bytes()
        _require(len(files[name]) == entry["size"], f"size of {name}")
        _require(hashlib.sha256(files[name]).hexdigest() == entry["sha256"], f"hash of {name}")
    return manifest, files


def initial_state(manifest: dict[str, Any], files: dict[str, bytes]) -> Arrays:
    """One row of every state entry before the first token."""
    learned = read_tensors(files["initial.safetensors"])[1] if "initial.safetensors" in files else {}
    state = {}
    for entry in manifest["state"]:
        shape = (1, *entry["shape"][1:])
        known = isinstance(entry["initial"], str)
        array = learned[entry["name"]][None] if known else np.full(shape, entry["initial"])
        _require(array.shape == shape, f"shape of {entry['name']}")
        state[entry["name"]] = array.astype(entry["dtype"])
    return state


def read_memory(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Header and tensors of a memory file, under a digest that fits."""
    metadata, arrays = read_tensors(path.read_bytes())
    header = _json(metadata["titans"].encode())
    _require(header["format_version"] == 1, "format version")
    stated = header.pop("digest")
    digest = hashlib.sha256(_canonical(header))
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(_canonical([name, array.dtype.name, list(array.shape)]) + array.tobytes())
    _require(digest.hexdigest() == stated, "digest")
    return header, arrays


def read_tensors(data: bytes) -> tuple[dict[str, str], Arrays]:
    """Metadata and tensors of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    table = _json(data[8 : 8 + length])
    metadata = table.pop("__metadata__", {})
    arrays = {}
    for name, entry in table.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        _require(end <= len(data), "length")
        arrays[name] = np.frombuffer(data[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return metadata, arrays


def _json(data: bytes) -> dict[str, Any]:
    content = json.loads(data)
    _require(isinstance(content, dict), "JSON object")
    return content


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Refused(what)

"""JSON Schemas of the manifest and of a memory file's header, from the dataclasses that hold them.

``python -m titans_runtime.schema FOLDER`` writes them. A schema says what a document looks like; what its
fields must be to each other (hashes, shapes that follow from others) is in ``docs/format.md``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from titans_runtime.editor import MAX_CHUNK, MAX_STEP, Editor
from titans_runtime.files import write_atomically
from titans_runtime.manifest import (
    DTYPES,
    FORMAT_VERSION,
    FORMATS,
    INITIAL_NAME,
    MAX_TOKENS,
    ONNX,
    ROLES,
    TOKENIZERS,
    FileEntry,
    GraphSpec,
    LengthSpec,
    Manifest,
    StateSpec,
    TensorSpec,
)
from titans_runtime.optimizers import OPTIMIZERS
from titans_runtime.snapshot import Snapshot
from titans_runtime.state import FORMAT_VERSION as MEMORY_VERSION

Schema = dict[str, Any]

_SCALARS: dict[object, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    types.NoneType: {"type": "null"},
    Any: {},
}
_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_STRENGTH: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_SIZE: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_AXES: Schema = {"type": "array", "items": {"anyOf": [_SIZE, {"type": "string"}]}}
_ROWS: Schema = {"type": "array", "prefixItems": [{"const": "batch"}], "items": _SIZE, "minItems": 1}


def _object(properties: dict[str, Schema], optional: tuple[str, ...] = ()) -> Schema:
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


# What a type alone does not say.
_FIELDS: dict[type, dict[str, Schema]] = {
    Manifest: {
        "format_version": {"const": FORMAT_VERSION},
        "identity": _SHA256,
        "producer": {"type": "object"},
        "requires": _object(
            {
                "onnxruntime": {"type": "string", "pattern": r"^\d+(\.\d+)*$"},
                "ir_version": _COUNT,
                "opset": _COUNT,
            }
        ),
        "tokenizer": {"enum": list(TOKENIZERS)},
        "vocab_size": _COUNT,
        "edit_layers": _COUNT,
        "tolerances": _object({"atol": {"type": "number"}, "rtol": {"type": "number"}}),
        "recommended": _object(
            {"edit": _STRENGTH, "editor": {"anyOf": [{"$ref": "#/$defs/Editor"}, {"type": "null"}]}},
            optional=("editor",),
        ),
    },
    StateSpec: {
        "dtype": {"enum": list(DTYPES)},
        "role": {"enum": list(ROLES)},
        "shape": _ROWS,
        "initial": {"anyOf": [{"type": "number"}, {"const": INITIAL_NAME}]},
    },
    TensorSpec: {"dtype": {"enum": list(DTYPES)}, "shape": _AXES},
    GraphSpec: {
        "formats": _object(dict.fromkeys(FORMATS, _SCALARS[str]), optional=FORMATS),
    },
    LengthSpec: {
        "tokens": {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
        "format": {"enum": [ONNX, *FORMATS]},
    },
    FileEntry: {"sha256": _SHA256, "size": _COUNT},
    Editor: {
        "objective": {"type": "string", "pattern": "^[a-z][a-z0-9_]*$"},
        "optimizer": {"enum": list(OPTIMIZERS)},
        "step": {"type": "number", "minimum": 0, "maximum": MAX_STEP},
        "chunk": {"type": "integer", "minimum": 1, "maximum": MAX_CHUNK},
    },
    Snapshot: {
        "bundle": _SHA256,
        "position": _COUNT,
        "edit": {"type": "array", "items": _STRENGTH},
        "editor": {"anyOf": [{"$ref": "#/$defs/Editor"}, {"type": "null"}]},
        "arrays": {},  # the file's tensors, which are no JSON
    },
}


def manifest_schema() -> Schema:
    """Of ``titans.json``."""
    return _document(f"titans:manifest:{FORMAT_VERSION}", _properties(Manifest), Manifest)


def memory_schema() -> Schema:
    """Of the JSON object under the key ``titans`` of a memory file's metadata."""
    properties = _properties(Snapshot)
    del properties["arrays"]
    fields = {"format_version": {"const": MEMORY_VERSION}, **properties, "digest": _SHA256}
    return _document(f"titans:memory:{MEMORY_VERSION}", fields, Snapshot)


def _document(name: str, properties: dict[str, Schema], root: type) -> Schema:
    kinds = _dataclasses(root) - {root} | {Editor}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{name}",
        "description": _summary(root),
        **_object(properties),
        "$defs": {kind.__name__: _definition(kind) for kind in sorted(kinds, key=lambda kind: kind.__name__)},
    }


def _dataclasses(hint: Any, known: frozenset[type] = frozenset()) -> frozenset[type]:  # noqa: ANN401
    """All dataclasses that a type is made of, and those in ``known``. One may hold another of its kind."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint in known:
            return known
        known, parts = known | {hint}, tuple(get_type_hints(hint).values())
    else:
        parts = get_args(hint)
    for part in parts:
        known = _dataclasses(part, known)
    return known


def _definition(kind: type) -> Schema:
    optional = [
        item.name
        for item in dataclasses.fields(kind)
        if item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
    ]
    return {"description": _summary(kind), **_object(_properties(kind), tuple(optional))}


def _properties(kind: type) -> dict[str, Schema]:
    hints, special = get_type_hints(kind), _FIELDS.get(kind, {})
    return {
        item.name: special[item.name] if item.name in special else _of_type(hints[item.name])
        for item in dataclasses.fields(kind)
    }


def _of_type(hint: Any) -> Schema:  # noqa: ANN401 - a type, or what stands for one
    if hint in _SCALARS:
        return _SCALARS[hint]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return {"$ref": f"#/$defs/{hint.__name__}"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of_type(argument) for argument in arguments]}
    if origin in (tuple, list):
        return {"type": "array", "items": _of_type(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_type(arguments[1])}
    raise TypeError(f"no JSON Schema for {hint}")


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").splitlines()[0].replace("``", "")


def main(folder: Path) -> None:
    """Write both schemas."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in (("manifest", manifest_schema()), ("memory", memory_schema())):
        write_atomically(folder / f"{name}.schema.json", (json.dumps(schema, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

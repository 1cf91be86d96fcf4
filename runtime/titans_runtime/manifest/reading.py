"""The parts of a manifest from parsed JSON, each field checked for its type and range."""

from __future__ import annotations

import math
from typing import Any

from titans_runtime.editor import Editor
from titans_runtime.errors import BundleError, UsageError
from titans_runtime.manifest.fields import Fields
from titans_runtime.manifest.specs import (
    DTYPES,
    FORMATS,
    INITIAL_NAME,
    MAX_TOKENS,
    ONNX,
    ROLES,
    FileEntry,
    GraphSpec,
    LengthSpec,
    StateSpec,
    TensorSpec,
)

_MAX_AXIS = 2**31 - 1
_MAX_TENSOR = 2**30  # elements of a tensor, at one batch row and as many tokens as a call takes at once
_MOST = {"tokens": MAX_TOKENS}


def requires(reader: Fields) -> dict[str, Any]:
    """Least versions."""
    fields = Fields(reader.mapping("requires"), "requires")
    onnxruntime = fields.string("onnxruntime")
    content = {
        "onnxruntime": onnxruntime,
        "ir_version": fields.integer("ir_version", 1),
        "opset": fields.integer("opset", 1),
    }
    if not all(part.isdecimal() for part in onnxruntime.split(".")):
        raise BundleError(f"titans.json: requires: onnxruntime is {onnxruntime!r}; no version")
    fields.end()
    return content


def tolerances(reader: Fields) -> dict[str, float]:
    """Of the goldens."""
    fields = Fields(reader.mapping("tolerances"), "tolerances")
    content = {"atol": fields.number("atol"), "rtol": fields.number("rtol")}
    fields.end()
    return content


def recommended(reader: Fields) -> dict[str, Any]:
    """The editing that development data favoured."""
    fields = Fields(reader.mapping("recommended"), "recommended")
    edit = fields.number("edit")
    if not 0 <= edit <= 1:
        raise BundleError(f"titans.json: recommended: edit is {edit}; it must lie between 0 and 1")
    editor = fields.optional("editor")
    if editor is not None and not isinstance(editor, dict):
        raise BundleError("titans.json: recommended: editor must be an object or null")
    fields.end()
    if editor is not None:
        try:
            Editor.from_dict(editor)
        except UsageError as error:
            raise BundleError(f"titans.json: recommended: {error}") from None
    return {"edit": edit, "editor": editor}


def graph_spec(value: object, where: str) -> GraphSpec:
    """One of ``graphs``."""
    fields = Fields(value, where)
    graph = GraphSpec(
        file=fields.string("file"),
        inputs=tuple(_tensor(item, f"{where}.inputs[{i}]") for i, item in enumerate(fields.array("inputs"))),
        outputs=tuple(
            _tensor(item, f"{where}.outputs[{i}]") for i, item in enumerate(fields.array("outputs"))
        ),
        formats=_formats(fields, where),
        lengths=_lengths(fields, where),
    )
    fields.end()
    return graph


def _lengths(fields: Fields, where: str) -> tuple[LengthSpec, ...]:
    if fields.optional("lengths") is None:
        return ()
    found = []
    for index, item in enumerate(fields.array("lengths")):
        one = Fields(item, f"{where}.lengths[{index}]")
        tokens = one.integer("tokens", 1, MAX_TOKENS)
        found.append(LengthSpec(tokens, one.choice("format", (ONNX, *FORMATS)), one.string("file")))
        one.end()
    return tuple(found)


def _formats(fields: Fields, where: str) -> dict[str, str]:
    if fields.optional("formats") is None:
        return {}
    formats = Fields(fields.mapping("formats"), f"{where}.formats")
    found = {kind: formats.string(kind) for kind in FORMATS if formats.optional(kind) is not None}
    formats.end()
    return found


def _tensor(value: object, where: str) -> TensorSpec:
    fields = Fields(value, where)
    spec = TensorSpec(fields.string("name"), fields.choice("dtype", DTYPES), _shape(fields, where))
    fields.end()
    sizes = [axis if isinstance(axis, int) else _MOST.get(axis, 1) for axis in spec.shape]
    if math.prod(sizes) > _MAX_TENSOR:
        raise BundleError(f"titans.json: {where}: shape {list(spec.shape)} is beyond {_MAX_TENSOR} elements")
    return spec


def state_spec(value: object, where: str) -> StateSpec:
    """One of ``state``."""
    fields = Fields(value, where)
    spec = StateSpec(
        name=fields.string("name"),
        dtype=fields.choice("dtype", DTYPES),
        shape=_shape(fields, where),
        initial=_initial(fields),
        role=fields.choice("role", ROLES),
    )
    fields.end()
    if not spec.shape or spec.shape[0] != "batch" or len(spec.row_shape) != len(spec.shape) - 1:
        raise BundleError(f"titans.json: {where}: shape must be 'batch' followed by sizes")
    return spec


def _initial(fields: Fields) -> float | str:
    if isinstance(fields.optional("initial"), str):
        return fields.choice("initial", (INITIAL_NAME,))
    return fields.number("initial")


def _shape(fields: Fields, where: str) -> tuple[int | str, ...]:
    shape = fields.array("shape")
    for axis in shape:
        if not isinstance(axis, str) and (type(axis) is not int or not 0 <= axis <= _MAX_AXIS):
            raise BundleError(f"titans.json: {where}: shape {shape} must hold sizes and axis names")
    return tuple(shape)


def file_entry(value: object, where: str) -> FileEntry:
    """One of ``files``."""
    fields = Fields(value, where)
    entry = FileEntry(sha256=fields.digest("sha256"), size=fields.integer("size", 0))
    fields.end()
    return entry

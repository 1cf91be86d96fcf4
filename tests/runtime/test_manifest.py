"""The manifest's fields: each is checked, and the identity follows from the content."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import titans_runtime as tr
from tests.runtime.streams import change_manifest, identity_of
from titans_runtime.bundle import MANIFEST_NAME
from titans_runtime.manifest import Manifest


@pytest.fixture(scope="module")
def content(tiny_bundle: Path) -> dict[str, Any]:
    return json.loads((tiny_bundle / MANIFEST_NAME).read_text("utf-8"))


def test_a_manifest_survives_the_way_to_json_and_back(content: dict[str, Any]) -> None:
    manifest = Manifest.from_dict(content)
    assert json.loads(json.dumps(manifest.to_dict())) == content
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest


def test_create_gives_the_identity_that_from_dict_asks_for(content: dict[str, Any]) -> None:
    manifest = Manifest.from_dict(content)
    fields = {
        name: value for name, value in vars(manifest).items() if name not in ("format_version", "identity")
    }
    assert Manifest.create(**fields) == manifest


def _set(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:  # noqa: ANN401 - JSON
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def _drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:  # noqa: ANN401 - JSON
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


_PREDICTION = ("graphs", "gradient.prediction")
BAD = [
    (_set("format_version", value=2), "format version 2; this runtime reads 1"),
    (_set("format_version", value=0), "format_version is 0; at least 1"),
    (_set("format_version", value="1"), "format_version must be of type int"),
    (_set("format_version", value=True), "format_version must be of type int"),
    (_set("extra", value=1), "unknown field 'extra'"),
    (_set("requires", "cuda", value="12"), "requires: unknown field 'cuda'"),
    (_set("recommended", "pace", value=1), "recommended: unknown field 'pace'"),
    (_set("state", 0, "note", value=""), r"state\[0\]: unknown field 'note'"),
    (_set("files", "model.onnx", "mode", value=7), "files.model.onnx: unknown field 'mode'"),
    (_drop("vocab_size"), "field 'vocab_size' is missing"),
    (_drop("graphs", "model"), "graphs has no 'model'"),
    (_drop("files", "model.onnx"), "'model.onnx' is not among the files"),
    (_set("vocab_size", value="256"), "vocab_size must be of type int"),
    (_set("vocab_size", value=-1), "vocab_size is -1; at least 0"),
    (_set("vocab_size", value=0), "vocab_size is 0, which the tokenizer 'bytes' cannot have"),
    (_set("tokenizer", value="vectors"), "vocab_size is 256, which the tokenizer 'vectors' cannot have"),
    (_set("vocab_size", value=300), "logits has shape .*256.*; the other fields ask for .*300"),
    (_set("edit_layers", value=3), "edit has shape"),
    (_set(*_PREDICTION, "inputs", 0, "name", value="other"), "the input other is none of the model's"),
    (_set(*_PREDICTION, "inputs", 0, "shape", value=["batch"]), "input_ids has shape"),
    (_set(*_PREDICTION, "outputs", 0, "name", value="total"), "loss has shape None"),
    (_set(*_PREDICTION, "outputs", -1, "name", value="grad.other"), "grad.other is the gradient of no state"),
    (_set(*_PREDICTION, "outputs", -1, "shape", value=["batch", 1]), "grad.layers.1.memory has shape"),
    (_set(*_PREDICTION, "outputs", 1, "shape", value=["heads"]), "has an axis of unknown size"),
    (_set("graphs", "gradient.readout", "inputs", 0, "name", value="ids"), "has other inputs or outputs"),
    (_set("model", value=[]), "model must be of type dict"),
    (_set("state", value={}), "state must be of type list"),
    (_set("state", 0, value=3), r"state\[0\] must be an object"),
    (_set("state", 0, "dtype", value="float8"), "dtype is 'float8'; known: float32, float16, int64"),
    (_set("state", 0, "role", value="other"), "role is 'other'"),
    (_set("state", 0, "initial", value=None), r"initial must be a number of at most 3e\+38"),
    (_set("state", 0, "initial", value="0"), r"initial is '0'; known: initial.safetensors"),
    (_set("state", 0, "initial", value="initial.safetensors"), "is not among the files"),
    (_set("state", 0, "shape", value=[3, 96]), "shape must be 'batch' followed by sizes"),
    (_set("state", 0, "shape", value=["batch", "tokens"]), "shape must be 'batch' followed by sizes"),
    (_set("state", 0, "shape", value=["batch", -1]), "must hold sizes and axis names"),
    (_set("state", 0, "shape", value=["batch", 1.5]), "must hold sizes and axis names"),
    (_set("state", 0, "shape", value=["batch", 2**40]), "must hold sizes and axis names"),
    (_set("state", 0, "shape", value=["batch", 4, 96]), "past.layers.0.conv has shape"),
    (_set("state", 0, "name", value="other"), "do not follow from the state schema"),
    (_set("state", 0, "name", value="readout"), "two state entries have the same name"),
    (_set("tokenizer", value="words"), "tokenizer is 'words'; known: bytes"),
    (_set("requires", "onnxruntime", value="new"), "onnxruntime is 'new'; no version"),
    (_set("requires", "onnxruntime", value="²"), "no version"),
    (_set("requires", "opset", value="23"), "opset must be of type int"),
    (_set("tolerances", "atol", value=None), r"atol must be a number of at most 3e\+38"),
    (_set("recommended", "edit", value=1.5), "edit is 1.5; it must lie between 0 and 1"),
    (_set("recommended", "editor", value="readout"), "editor must be an object or null"),
    (_set("recommended", "editor", value={"chunk": 0}), "recommended: editor chunk is 0"),
    (_set("recommended", "editor", value={"pace": 1}), "recommended: editor field 'pace' is unknown"),
    (_set("files", "model.onnx", "sha256", value="ABC"), "sha256 is no SHA-256"),
    (_set("files", "model.onnx", "size", value=-1), "size is -1; at least 0"),
    (_set("identity", value="no"), "identity is no SHA-256"),
    (_set("edit_layers", value=2**16 + 1), "edit_layers is 65537; at most 65536"),
    (_set("files", "model.onnx", "size", value=2**63), "size is 9223372036854775808; at most"),
    (
        _set("state", 0, "shape", value=["batch", 2**31 - 1, 2]),
        "state takes .* bytes a session; the limit",
    ),
    (
        _set("graphs", "model", "outputs", 0, "shape", value=["batch", "tokens", 2**22]),
        "is beyond 1073741824 elem",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_a_field_that_cannot_be_meant_is_refused(
    content: dict[str, Any], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    changed = copy.deepcopy(content)
    change(changed)
    if "graphs" in changed and "model" in changed["graphs"] and "identity is no" not in message:
        with contextlib.suppress(tr.BundleError, TypeError):  # refused before the identity is looked at
            changed["identity"] = identity_of(changed)
    with pytest.raises(tr.BundleError, match=message) as caught:
        Manifest.from_dict(changed)
    assert str(caught.value).startswith("titans.json: ")


@pytest.mark.parametrize(
    "change",
    [
        _set("identity", value="0" * 64),
        _set("model", "layers", value=3),
        _set("model", "new", value=None),
        _set("state", 0, "initial", value=1.0),
        _set("graphs", "model", "file", value="weights.bin"),
        _set("files", "weights.bin", "sha256", value="0" * 64),
    ],
)
def test_content_and_identity_belong_together(
    content: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    changed = copy.deepcopy(content)
    change(changed)
    with pytest.raises(tr.BundleError, match=r"does not belong to the content .*; the manifest was altered"):
        Manifest.from_dict(changed)


def test_an_altered_identity_is_refused_on_disk(bundle_copy: Path) -> None:
    change_manifest(bundle_copy, _set("identity", value="0" * 64), identify=False)
    with pytest.raises(tr.BundleError, match="identity 000000000000…"):
        tr.load(bundle_copy)


def test_a_newer_onnxruntime_is_asked_for(bundle_copy: Path) -> None:
    change_manifest(bundle_copy, _set("requires", "onnxruntime", value="99.0"), identify=False)
    with pytest.raises(tr.EnvironmentProblem, match=r"too old for this bundle; install 99\.0 or newer"):
        tr.load(bundle_copy)


def test_the_editor_may_be_none_or_left_out(content: dict[str, Any]) -> None:
    for change in (_set("recommended", "editor", value=None), _drop("recommended", "editor")):
        changed = copy.deepcopy(content)
        change(changed)
        assert Manifest.from_dict(changed).recommended == {"edit": 0.5, "editor": None}

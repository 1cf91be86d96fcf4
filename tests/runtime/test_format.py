"""The published formats: the schemas are up to date, and a second reader finds what the runtime finds."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import titans_runtime as tr
from tests.runtime import second_reader
from tests.runtime.streams import Array, change_manifest
from tests.runtime.test_manifest import BAD
from titans_runtime.bundle import INITIAL_NAME, MANIFEST_NAME, initial_state, open_bundle
from titans_runtime.schema import main, manifest_schema, memory_schema
from titans_runtime.state import load_snapshot

ROOT = Path(__file__).parents[2]
EDITORS = [None, tr.Editor(step=0.5, chunk=4), tr.Editor(step=1.5, chunk=8, optimizer="adagrad")]


def _accepts(schema: dict[str, Any], document: object) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(document))


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_NAME).read_text("utf-8"))


@pytest.fixture(params=EDITORS, ids=["no editor", "sgd", "adagrad"])
def session(request: pytest.FixtureRequest, model: tr.Model) -> tr.Session:
    session = model.session(0.5, request.param)
    session.append(b"something to remember")
    return session


# --- the schemas


@pytest.mark.parametrize("name", ["manifest", "memory"])
def test_the_published_schema_is_that_of_the_code(tmp_path: Path, name: str) -> None:
    main(tmp_path)
    published = (ROOT / "docs" / "schema" / f"{name}.schema.json").read_text("utf-8")
    assert published == (tmp_path / f"{name}.schema.json").read_text("utf-8"), "run `make schema`"


@pytest.mark.parametrize("schema", [manifest_schema(), memory_schema()], ids=["manifest", "memory"])
def test_a_schema_is_a_schema(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


def test_an_exported_manifest_fits_its_schema(tiny_bundle: Path) -> None:
    jsonschema.validate(_manifest(tiny_bundle), manifest_schema())


def test_a_saved_memory_fits_its_schema(session: tr.Session, tmp_path: Path) -> None:
    session.save(tmp_path / "memory")
    metadata, _ = second_reader.read_tensors((tmp_path / "memory").read_bytes())
    jsonschema.validate(json.loads(metadata["titans"]), memory_schema())


_BEYOND_A_SCHEMA = (  # what fields must be to each other
    "has no 'model'", "is not among the files", "has shape", "the other fields ask for", "the same name",
    "do not follow", "bytes a session", "is beyond", "at most 65536", "vocab_size is 0", "cannot have",
    "is none of the model's", "is the gradient of no state", "has an axis of unknown size",
    "has other inputs or outputs",
)  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_a_schema_refuses_what_it_can_see(
    tiny_bundle: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = _manifest(tiny_bundle)
    change(content)
    beyond = any(words in message for words in _BEYOND_A_SCHEMA)
    assert _accepts(manifest_schema(), content) == beyond


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**64) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), value=_values)
def test_what_the_runtime_reads_fits_the_schema(
    tiny_bundle: Path, data: st.DataObject, value: object
) -> None:
    """One value anywhere in a manifest replaced by any other: who goes by the schema is never stricter."""
    content = _manifest(tiny_bundle)
    place: Any = content
    for _ in range(data.draw(st.integers(0, 4))):
        inner = [key for key in _keys(place) if isinstance(place[key], dict | list) and place[key]]
        if inner:
            place = place[data.draw(st.sampled_from(inner))]
    place[data.draw(st.sampled_from(_keys(place)))] = value
    try:
        tr.bundle.Manifest.from_dict(content)
    except tr.BundleError:
        return
    assert _accepts(manifest_schema(), content)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_has_not_is_refused(tiny_bundle: Path, number: float) -> None:
    content = _manifest(tiny_bundle)
    content["model"]["architecture"] = [number]
    with pytest.raises(tr.BundleError, match="a number that is not finite"):
        tr.bundle.Manifest.from_dict(content)


def _keys(place: Any) -> list[Any]:  # noqa: ANN401 - JSON
    return list(place) if isinstance(place, dict) else list(range(len(place)))


# --- a second reader


def test_the_second_reader_is_short_and_a_stranger_to_the_runtime() -> None:
    source = Path(second_reader.__file__).read_text("utf-8")
    assert len(source.splitlines()) < 100
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported == {"__future__", "hashlib", "json", "pathlib", "typing", "numpy"}


def _same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


def test_a_second_reader_reads_a_bundle(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    manifest, files = second_reader.read_bundle(tiny_bundle)
    assert manifest == json.loads(json.dumps(bundle.manifest.to_dict()))
    assert files == {name: bundle.read(name) for name in bundle.manifest.files}
    assert _same(second_reader.initial_state(manifest, files), initial_state(bundle))


def test_a_second_reader_reads_learned_memories(bundle_copy: Path) -> None:
    entry = _manifest(bundle_copy)["state"][0]
    learned = np.random.default_rng(0).normal(size=entry["shape"][1:]).astype(np.float32)
    save_file({entry["name"]: learned}, bundle_copy / INITIAL_NAME)

    def learn(content: dict[str, Any]) -> None:
        content["state"][0]["initial"] = INITIAL_NAME
        content["files"][INITIAL_NAME] = {}

    change_manifest(bundle_copy, learn, rehash=True)
    manifest, files = second_reader.read_bundle(bundle_copy)
    state = second_reader.initial_state(manifest, files)
    assert np.array_equal(state[entry["name"]][0], learned)
    assert _same(state, initial_state(open_bundle(bundle_copy)))


def test_a_second_reader_reads_a_memory(session: tr.Session, tmp_path: Path) -> None:
    session.save(tmp_path / "memory")
    snapshot = load_snapshot(tmp_path / "memory", session.model.manifest)
    header, arrays = second_reader.read_memory(tmp_path / "memory")
    assert _same(arrays, snapshot.arrays)
    assert header == {
        "format_version": 1,
        "bundle": snapshot.bundle,
        "position": snapshot.position,
        "edit": list(snapshot.edit),
        "editor": snapshot.editor,
    }


@pytest.mark.parametrize("place", [0.3, 0.6, 0.99])
def test_a_second_reader_finds_a_flipped_bit(session: tr.Session, tmp_path: Path, place: float) -> None:
    session.save(tmp_path / "memory")
    data = bytearray((tmp_path / "memory").read_bytes())
    data[int(place * len(data))] ^= 1
    (tmp_path / "memory").write_bytes(data)
    with pytest.raises(second_reader.Refused, match="digest"):
        second_reader.read_memory(tmp_path / "memory")


# --- what was written once is read for ever


def test_documents_of_format_1_are_still_read() -> None:
    """Written when format 1 was new, and not to be written again: a newer format must read them, too."""
    data = Path(__file__).parent / "data"
    manifest = tr.bundle.Manifest.from_dict(json.loads((data / "manifest-1.json").read_text("utf-8")))
    assert manifest.format_version == 1
    snapshot = load_snapshot(data / "memory-1.safetensors", manifest)
    assert (snapshot.position, snapshot.edit) == (2, (0.5,))
    assert snapshot.editor == {"objective": "readout", "step": 1.0, "chunk": 4, "optimizer": "adagrad"}
    assert snapshot.arrays["pending.targets"].tolist() == [1, -1]
    assert snapshot.arrays["editor.energy"].tolist() == [1, 1, 1]
    assert snapshot.arrays["state.readout"].shape == (1, 3, 4)

"""A bundle opens only when it is exactly what its manifest says. Every refusal names the file."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import titans_runtime as tr
from tests.runtime.streams import change_manifest
from titans_runtime.bundle import (
    INITIAL_NAME,
    MANIFEST_NAME,
    Bundle,
    file_entry,
    initial_state,
    open_bundle,
)

FILES = ["weights.bin", "model.onnx", "gradient.readout.onnx", "goldens.safetensors"]


def _refused(folder: Path, *words: str) -> str:
    with pytest.raises(tr.BundleError) as caught:
        tr.load(folder, threads=1)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert len(message.splitlines()) <= 2
    return message


def _read(folder: Path, name: str) -> bytes:
    return open_bundle(folder).read(name)


def test_a_whole_bundle_opens_and_reads(tiny_bundle: Path) -> None:
    for name in FILES:
        assert _read(tiny_bundle, name) == (tiny_bundle / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_refused(bundle_copy: Path, name: str, kept: float) -> None:
    path = bundle_copy / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    _refused(bundle_copy, str(path), "truncated or altered")


@pytest.mark.parametrize("name", FILES)
def test_a_longer_file_is_refused(bundle_copy: Path, name: str) -> None:
    with (bundle_copy / name).open("ab") as file:
        file.write(b"\0")
    _refused(bundle_copy, name, "bytes where")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_refused(bundle_copy: Path, name: str, place: float) -> None:
    path = bundle_copy / name
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with pytest.raises(tr.BundleError, match=rf"{name}: SHA-256 .* the file was altered"):
        _read(bundle_copy, name)
    if name in ("weights.bin", "model.onnx"):
        _refused(bundle_copy, name, "SHA-256")
    elif name == "gradient.readout.onnx":
        with pytest.raises(tr.BundleError, match="SHA-256"):
            tr.load(bundle_copy, threads=1).session()
    else:
        with pytest.raises(tr.BundleError, match="SHA-256"):
            tr.verify(bundle_copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    _refused(bundle_copy, str(bundle_copy / name), "missing; export or copy the bundle again")


@pytest.mark.parametrize("name", ["extra.txt", "folder/extra.txt", ".hidden"])
def test_an_extra_file_is_refused(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).parent.mkdir(exist_ok=True)
    (bundle_copy / name).write_bytes(b"x")
    _refused(bundle_copy, name, "not listed in titans.json; remove it")


def test_an_extra_link_to_a_folder_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "more").symlink_to(tmp_path)
    _refused(bundle_copy, "more", "not listed in titans.json")


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
def test_a_symbolic_link_is_refused(bundle_copy: Path, tmp_path: Path, name: str) -> None:
    path = bundle_copy / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    _refused(bundle_copy, str(path))


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
def test_a_hard_link_is_refused(bundle_copy: Path, tmp_path: Path, name: str) -> None:
    os.link(bundle_copy / name, tmp_path / "twin")
    _refused(bundle_copy, str(bundle_copy / name), "has 2 hard links")


@pytest.mark.parametrize("name", ["weights.bin", MANIFEST_NAME])
def test_a_named_pipe_is_refused_and_not_waited_for(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    os.mkfifo(bundle_copy / name)
    _refused(bundle_copy, name, "plain files only")


def _list_as(name: str) -> Callable[[dict], object]:
    return lambda content: content["files"].update({name: content["files"]["weights.bin"]})


@pytest.mark.parametrize(
    "name",
    [
        "../weights.bin",
        "/etc/passwd",
        "a/../../weights.bin",
        "./weights.bin",
        "a//weights.bin",
        "..",
        "",
        "a\\weights.bin",
        "weights\0.bin",
        "weights\n.bin",
        "\ud800",
    ],
)
def test_a_name_that_leaves_the_folder_is_refused(bundle_copy: Path, name: str) -> None:
    shutil.copy(bundle_copy / "weights.bin", bundle_copy.parent / "weights.bin")
    change_manifest(bundle_copy, _list_as(name))
    _refused(bundle_copy, repr(name), "leaves the bundle or is not plain")


def test_a_file_behind_a_linked_folder_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    shutil.copy(bundle_copy / "weights.bin", tmp_path / "outside" / "weights.bin")
    (bundle_copy / "inner").symlink_to(tmp_path / "outside")
    change_manifest(bundle_copy, _list_as("inner/weights.bin"))
    _refused(bundle_copy, "inner/weights.bin", "a folder on its path is a symbolic link")


def test_files_in_a_plain_folder_are_allowed(bundle_copy: Path) -> None:
    (bundle_copy / "inner").mkdir()
    shutil.copy(bundle_copy / "weights.bin", bundle_copy / "inner" / "weights.bin")
    change_manifest(bundle_copy, _list_as("inner/weights.bin"))
    assert _read(bundle_copy, "inner/weights.bin") == _read(bundle_copy, "weights.bin")


@pytest.mark.parametrize("name", ["weights.bin", MANIFEST_NAME])
def test_a_folder_under_a_files_name_is_refused(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    (bundle_copy / name).mkdir()
    _refused(bundle_copy, str(bundle_copy / name))


def test_a_file_that_fits_no_memory_is_a_matter_of_the_machine(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: object, **settings: object) -> None:
        raise MemoryError

    bundle = open_bundle(tiny_bundle)
    monkeypatch.setattr("titans_runtime.bundle.open_without_waiting", exhausted)
    with pytest.raises(tr.EnvironmentProblem, match=r"weights\.bin: does not fit into this machine's memory"):
        bundle.read("weights.bin")


def test_a_key_given_twice_is_found_at_once_among_many(bundle_copy: Path) -> None:
    """Not in a time that grows with the square of the keys, as it once did: this would take an hour."""
    keys = ",".join(f'"{number}":0' for number in range(300_000))
    (bundle_copy / MANIFEST_NAME).write_text("{" + keys + ',"299999":0}', encoding="utf-8")
    _refused(bundle_copy, "key given twice: '299999'")


def test_what_is_not_listed_cannot_be_read(tiny_bundle: Path) -> None:
    for name in (MANIFEST_NAME, "../secret", "other"):
        with pytest.raises(tr.BundleError, match=r"not listed in titans\.json"):
            _read(tiny_bundle, name)


def test_no_folder_no_manifest_and_a_file_are_no_bundles(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "no bundle; expected a folder with titans.json")
    _refused(tmp_path, "no bundle; titans.json is missing")
    (tmp_path / "file").write_bytes(b"x")
    _refused(tmp_path / "file", "no bundle; expected a folder")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"[]", "expected a JSON object"),
        (b"\xff\xfe{}", "no valid JSON"),
        (b'{"a": 1, "a": 2}', "key given twice: 'a'"),
        (b'{"model": {"a": 1, "a": 2}}', "key given twice: 'a'"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is too large a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper than 32"),
        (b"[" * 100_000, "nested deeper than 32"),
        (b" " * (4 * 2**20 + 1), "bytes where 4194304 were expected"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_manifest_that_is_no_sound_json_is_refused(bundle_copy: Path, text: bytes, words: str) -> None:
    (bundle_copy / MANIFEST_NAME).write_bytes(text)
    _refused(bundle_copy, MANIFEST_NAME, words)


@given(data=st.data())
def test_a_manifest_cut_or_changed_anywhere_raises_nothing_else(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = bytearray((tiny_bundle / MANIFEST_NAME).read_bytes())
    place = data.draw(st.integers(0, len(text) - 1))
    if data.draw(st.booleans()):
        text[place] = data.draw(st.integers(0, 255))
    else:
        del text[place:]
    folder = tmp_path_factory.mktemp("manifest")
    (folder / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(tr.BundleError):  # at the latest because the files are missing
        open_bundle(folder)


def test_an_entry_is_size_and_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    entry = file_entry(tmp_path / "file")
    assert entry.size == 3
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- memories that do not begin at zero


def _with_learned_state(folder: Path, arrays: dict[str, np.ndarray]) -> Bundle:
    """The bundle with the first state entry taken from a file of learned memories."""
    bundle = open_bundle(folder)
    save_file(arrays, folder / INITIAL_NAME)
    first, *rest = bundle.manifest.state
    manifest = dataclasses.replace(
        bundle.manifest,
        state=(dataclasses.replace(first, initial=INITIAL_NAME), *rest),
        files=bundle.manifest.files | {INITIAL_NAME: file_entry(folder / INITIAL_NAME)},
    )
    return Bundle(folder, manifest)


def test_a_learned_memory_begins_as_its_file_says(bundle_copy: Path) -> None:
    entry = open_bundle(bundle_copy).manifest.state[0]
    learned = np.arange(np.prod(entry.row_shape), dtype=np.float32).reshape(entry.row_shape)
    state = initial_state(_with_learned_state(bundle_copy, {entry.name: learned}))
    assert np.array_equal(state[entry.name], learned[None])
    assert all(not array.any() for name, array in state.items() if name != entry.name)


@pytest.mark.parametrize("fault", ["name", "shape", "dtype"])
def test_learned_memories_that_do_not_fit_are_refused(bundle_copy: Path, fault: str) -> None:
    entry = open_bundle(bundle_copy).manifest.state[0]
    shape = (*entry.row_shape, 1) if fault == "shape" else entry.row_shape
    array = np.zeros(shape, np.float64 if fault == "dtype" else np.float32)
    bundle = _with_learned_state(bundle_copy, {"other" if fault == "name" else entry.name: array})
    with pytest.raises(
        tr.BundleError, match=rf"initial\.safetensors: {entry.name} is missing, or not float32"
    ):
        initial_state(bundle)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_learned_memories_that_are_not_finite_are_refused(bundle_copy: Path, value: float) -> None:
    entry = open_bundle(bundle_copy).manifest.state[0]
    bundle = _with_learned_state(bundle_copy, {entry.name: np.full(entry.row_shape, value, np.float32)})
    with pytest.raises(tr.BundleError, match=rf"safetensors: {entry.name} holds what is not finite"):
        initial_state(bundle)


def test_damaged_learned_memories_are_refused(bundle_copy: Path) -> None:
    bundle = _with_learned_state(bundle_copy, {"x": np.zeros(3, np.float32)})
    (bundle_copy / INITIAL_NAME).write_bytes(b"\xff" * bundle.manifest.files[INITIAL_NAME].size)
    with pytest.raises(tr.BundleError, match="was altered"):
        initial_state(bundle)
    entry = {INITIAL_NAME: file_entry(bundle_copy / INITIAL_NAME)}
    listed = dataclasses.replace(bundle.manifest, files=bundle.manifest.files | entry)
    with pytest.raises(tr.BundleError, match=r"initial\.safetensors: damaged"):
        initial_state(Bundle(bundle_copy, listed))

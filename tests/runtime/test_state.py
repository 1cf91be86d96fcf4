"""Memory files: what was saved or nothing, whatever happened to the file or the disk."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import titans_runtime as tr
from tests.runtime.streams import Array, assert_same_snapshot, change_manifest
from titans_runtime.state import describe_snapshot, load_snapshot, save_snapshot


@pytest.fixture(scope="module")
def snapshot(model: tr.Model) -> tr.Snapshot:
    session = model.session(0.5, tr.Editor(step=0.5, chunk=4))
    session.append(b"something to remember")
    return session.snapshot()


@pytest.fixture(scope="module")
def memory(snapshot: tr.Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "memory.safetensors"
    save_snapshot(snapshot, path)
    return path


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("harmed") / "memory"


def test_a_file_gives_back_what_was_saved(model: tr.Model, memory: Path, snapshot: tr.Snapshot) -> None:
    assert_same_snapshot(load_snapshot(memory, model.manifest), snapshot)
    assert {
        "pending.targets",
        "pending.readout_key",
        "pending.readout_rows",
        "pending.logits",
    } < snapshot.arrays.keys()


def test_a_new_session_can_be_saved(model: tr.Model, tmp_path: Path) -> None:
    session = model.session(0.25, None)
    session.save(tmp_path / "memory")
    assert_same_snapshot(model.load_session(tmp_path / "memory").snapshot(), session.snapshot())


def test_the_description_is_the_header_and_the_shapes(memory: Path, model: tr.Model) -> None:
    description = describe_snapshot(memory)
    assert description["bundle"] == model.manifest.identity
    assert description["position"] == 21
    assert description["editor"] == tr.Editor(step=0.5).to_dict()
    assert description["tensors"]["state.readout"] == [1, 128, 256]
    assert description["bytes"] == memory.stat().st_size


# --- damage


def _loads_only_as_itself(path: Path, model: tr.Model, snapshot: tr.Snapshot) -> None:
    with contextlib.suppress(tr.StateError):
        assert_same_snapshot(load_snapshot(path, model.manifest), snapshot)


def _flip(memory: Path, harmed: Path, bit: int) -> None:
    data = bytearray(memory.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    harmed.write_bytes(data)


@given(data=st.data())
def test_a_flipped_bit_never_loads_as_something_else(
    model: tr.Model, memory: Path, harmed: Path, snapshot: tr.Snapshot, data: st.DataObject
) -> None:
    size = memory.stat().st_size
    head = 8 + int.from_bytes(memory.read_bytes()[:8], "little")
    _flip(memory, harmed, data.draw(st.integers(0, 8 * head - 1) | st.integers(0, 8 * size - 1)))
    _loads_only_as_itself(harmed, model, snapshot)
    with contextlib.suppress(tr.StateError):
        describe_snapshot(harmed)


def test_no_flipped_bit_of_the_length_and_the_first_header_bytes_loads(
    model: tr.Model, memory: Path, harmed: Path, snapshot: tr.Snapshot
) -> None:
    for bit in range(8 * 40):
        _flip(memory, harmed, bit)
        _loads_only_as_itself(harmed, model, snapshot)


def test_a_flipped_bit_of_a_tensor_is_refused(model: tr.Model, memory: Path, harmed: Path) -> None:
    _flip(memory, harmed, 8 * (memory.stat().st_size - 1000))
    with pytest.raises(tr.StateError, match="does not match its digest; restore the file") as caught:
        load_snapshot(harmed, model.manifest)
    assert str(caught.value).startswith(f"{harmed}: ")


@given(data=st.data())
def test_a_truncated_file_is_refused(
    model: tr.Model, memory: Path, harmed: Path, data: st.DataObject
) -> None:
    size = memory.stat().st_size
    kept = data.draw(st.integers(0, 2000) | st.integers(0, size - 1))
    harmed.write_bytes(memory.read_bytes()[:kept])
    with pytest.raises(tr.StateError, match=str(harmed)):
        load_snapshot(harmed, model.manifest)


@given(content=st.binary(max_size=200))
def test_any_other_file_is_refused(model: tr.Model, harmed: Path, content: bytes) -> None:
    harmed.write_bytes(content)
    with pytest.raises(tr.StateError, match="no memory file of this project, or damaged"):
        load_snapshot(harmed, model.manifest)


def test_no_file_and_a_folder_are_refused(model: tr.Model, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(tr.StateError, match=f"{path}: cannot be read"):
            load_snapshot(path, model.manifest)


# --- a file that is sound, and does not fit


def _resaved(snapshot: tr.Snapshot, path: Path, **arrays: Array | None) -> None:
    """The snapshot with other arrays, under a digest that fits."""
    changed = {name.replace("__", "."): array for name, array in arrays.items()}
    content = {name: array for name, array in (snapshot.arrays | changed).items() if array is not None}
    save_snapshot(replace(snapshot, arrays=content), path)


def _with_other(change: Callable[[Array], Array], name: str) -> Callable[[tr.Snapshot], dict[str, Array]]:
    return lambda snapshot: {name: change(snapshot.arrays[name])}


MISFITS = {
    "state missing": (lambda s: {"state.readout": None}, "tensor state.readout is missing"),
    "state shape": (_with_other(lambda a: a[:, :5], "state.readout"), r"\(1, 5, 256\); expected float32"),
    "state batch": (_with_other(lambda a: np.repeat(a, 2, 0), "state.readout"), r"\(2, 128, 256\)"),
    "state dtype": (_with_other(lambda a: a.astype(np.float64), "state.readout"), "float64"),
    "logits shape": (_with_other(lambda a: a[:9], "last_logits"), "last_logits is missing, or not float32"),
    "targets dtype": (_with_other(lambda a: a.astype(np.int32), "pending.targets"), "pending.targets"),
    "targets too many": (lambda s: {"pending.targets": np.zeros(5, np.int64)}, "do not fit the editor"),
    "targets none": (lambda s: {"pending.targets": np.zeros(0, np.int64)}, "do not fit the editor"),
    "targets below": (lambda s: {"pending.targets": np.array([-2])}, "do not fit the editor"),
    "targets beyond": (lambda s: {"pending.targets": np.array([256])}, "do not fit the editor"),
    "targets missing": (lambda s: {"pending.targets": None}, "do not fit the editor"),
    "keys missing": (lambda s: {"pending.readout_key": None}, "pending.readout_key is missing"),
    "keys too many": (
        lambda s: {"pending.readout_key": np.zeros((9, 128), np.float32)},
        "pending.readout_key is missing, or not float32",
    ),
    "unknown": (lambda s: {"other": np.zeros(1)}, "tensor other is unknown"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_tensors_that_do_not_fit_are_refused(
    model: tr.Model,
    snapshot: tr.Snapshot,
    tmp_path: Path,
    change: Callable[[tr.Snapshot], dict[str, Array | None]],
    message: str,
) -> None:
    _resaved(snapshot, tmp_path / "memory", **change(snapshot))
    with pytest.raises(tr.StateError, match=message):
        model.load_session(tmp_path / "memory")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edit": (0.5,)}, "edit must be 2 numbers between 0 and 1"),
        ({"edit": (0.5, 2.0)}, "edit must be 2 numbers"),
        ({"edit": (0.5, "1")}, "edit must be 2 numbers"),
        ({"position": -1}, "the header is damaged"),
        ({"position": 1.5}, "the header is damaged"),
        ({"position": 0}, "pending.targets do not fit the editor"),
        ({"editor": {"chunk": 0}}, "editor"),
        ({"editor": {"objective": "readout", "step": 0.5, "chunk": 1025}}, "editor chunk is 1025"),
        ({"editor": {"objective": "readout", "chunk": 4, "pace": 1}}, "editor field 'pace' is unknown"),
        ({"editor": "readout"}, "the header is damaged"),
    ],
)
def test_a_header_that_cannot_be_meant_is_refused(
    model: tr.Model, snapshot: tr.Snapshot, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    save_snapshot(replace(snapshot, **fields), tmp_path / "memory")
    with pytest.raises(tr.StateError, match=message):
        model.load_session(tmp_path / "memory")


def test_an_unknown_format_version_is_refused(
    model: tr.Model, snapshot: tr.Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("titans_runtime.state.FORMAT_VERSION", 2)
        save_snapshot(snapshot, tmp_path / "memory")
    with pytest.raises(tr.StateError, match="memory format 2; this runtime reads 1; install a newer titans-"):
        model.load_session(tmp_path / "memory")


def test_the_memory_of_another_bundle_is_refused_and_both_are_named(
    model: tr.Model, memory: Path, bundle_copy: Path
) -> None:
    other = change_manifest(bundle_copy, lambda content: content["model"].update(layers=3))
    with pytest.raises(tr.StateError) as caught:
        tr.load(bundle_copy, threads=1).load_session(memory)
    assert f"the memory of bundle {model.manifest.identity[:12]}…" in str(caught.value)
    assert f"not of {other[:12]}…" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["state.readout", "state.layers.0.memory", "pending.logits"])
def test_what_is_not_finite_is_not_saved(
    snapshot: tr.Snapshot, tmp_path: Path, value: float, name: str
) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"older")
    array = snapshot.arrays[name].copy()
    array.reshape(-1)[-1] = value
    with pytest.raises(tr.StateError, match=f"the session: {name} holds values that are not finite"):
        save_snapshot(replace(snapshot, arrays=snapshot.arrays | {name: array}), path)
    assert path.read_bytes() == b"older"


def test_what_is_not_finite_is_not_loaded_either(
    model: tr.Model, snapshot: tr.Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.full_like(snapshot.arrays["state.readout"], np.nan)
    with monkeypatch.context() as patch:
        patch.setattr("titans_runtime.state.check_finite", lambda arrays: None)
        _resaved(snapshot, tmp_path / "memory", state__readout=array)
    with pytest.raises(tr.StateError, match=r"state\.readout holds values that are not finite"):
        model.load_session(tmp_path / "memory")


# --- the disk


def _fail(*args: object, **settings: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace", "os.open", "pathlib.Path.chmod"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    model: tr.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    session = model.session()
    session.append(b"first")
    session.save(tmp_path / "memory")
    old = (tmp_path / "memory").read_bytes()
    session.append(b"second")
    with monkeypatch.context() as patch:
        patch.setattr(broken, _fail)
        with pytest.raises(tr.EnvironmentProblem, match=r"cannot be written \(No space left on device\)"):
            session.save(tmp_path / "memory")
    assert (tmp_path / "memory").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    session.save(tmp_path / "memory")
    assert model.load_session(tmp_path / "memory").position == 11


def test_ctrl_c_while_saving_leaves_the_old_file(
    model: tr.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "memory").write_bytes(b"older")
    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.session().save(tmp_path / "memory")
    assert (tmp_path / "memory").read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


def test_a_folder_that_does_not_exist_cannot_be_written(model: tr.Model, tmp_path: Path) -> None:
    with pytest.raises(tr.EnvironmentProblem, match="cannot be written"):
        model.session().save(tmp_path / "nowhere" / "memory")


def test_a_read_only_folder_cannot_be_written(model: tr.Model, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(tr.EnvironmentProblem, match="cannot be written"):
        model.session().save(tmp_path / "memory")


# --- the file's layout


def test_the_file_is_a_safetensors_file_with_one_metadata_key(memory: Path) -> None:
    data = memory.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == ["titans"]
    fields = {"format_version", "bundle", "position", "edit", "editor", "digest"}
    assert fields == json.loads(header["__metadata__"]["titans"]).keys()


@pytest.mark.parametrize(
    ("read", "most"), [(describe_snapshot, "4294967296"), (None, r"\d{8}")], ids=["inspect", "load"]
)
def test_a_file_of_no_sensible_size_is_not_read(
    model: tr.Model, memory: Path, tmp_path: Path, read: Callable[[Path], object] | None, most: str
) -> None:
    """A header that fits, and then more than any machine could read; on the disk it takes nothing."""
    path = tmp_path / "huge"
    path.write_bytes(memory.read_bytes())
    with path.open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(tr.StateError, match=f"1099511627776 bytes; a memory file has at most {most} here"):
        (read or model.load_session)(path)


def test_the_longest_memory_of_a_bundle_is_within_its_limit(model: tr.Model, tmp_path: Path) -> None:
    session = model.session(0.5, tr.Editor(step=0.5, chunk=1024, optimizer="adagrad"))
    session.append(bytes(1024))
    session.save(tmp_path / "memory")
    assert model.load_session(tmp_path / "memory").position == 1024


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 4 * 2**20 + 1])
def test_a_header_of_no_sensible_size_is_not_read(model: tr.Model, tmp_path: Path, length: int) -> None:
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(2**40)
    for read in (model.load_session, describe_snapshot):
        with pytest.raises(tr.StateError, match="no memory file of this project, or damaged"):
            read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_refused_and_not_waited_for(model: tr.Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(tr.StateError, match=r"cannot be read \(no plain file\)"):
        model.load_session(tmp_path / "pipe")

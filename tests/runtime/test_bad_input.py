"""Every kind of bad input, given to Python and to the command line: one clear error, and nothing changed.

The command line says what Python's exception says, in at most two lines, and returns the code of its kind.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import titans_runtime as tr
from tests.runtime.streams import assert_same_snapshot, change_manifest
from titans_runtime.cli import main
from titans_runtime.readout import ReadoutEditor
from titans_runtime.state import describe_snapshot, save_snapshot

TEXT = b"text that is scored, and learnt from"
FILES = ("weights.bin", "model.onnx", "gradient.readout.onnx", "goldens.safetensors")
RUNTIME = Path(tr.__file__).parent
Titans = Callable[..., tuple[int, str]]
Harm = Callable[[Path], str]
"""Damages what lies at the path, and returns the message that is then expected, without the path itself."""


@pytest.fixture
def titans(capsys: pytest.CaptureFixture[str]) -> Titans:
    """Runs a command that must fail; returns its code and its error."""

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert code != 0
        assert out == ""
        assert 1 <= len(error.splitlines()) <= 2
        assert "Traceback" not in error
        return code, error

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


def _content(folder: Path) -> dict[str, str]:
    """What lies in a folder, to see that nothing was changed."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- bundles


def _truncated(name: str) -> Harm:
    def harm(folder: Path) -> str:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        return (
            f"/{name}: {len(data) // 2} bytes where titans.json says {len(data)}; "
            "the file is truncated or altered, export or copy the bundle again"
        )

    return harm


def _altered(name: str) -> Harm:
    def harm(folder: Path) -> str:
        before = (folder / name).read_bytes()
        after = before[:-1] + bytes([before[-1] ^ 1])
        (folder / name).write_bytes(after)
        old, new = (hashlib.sha256(data).hexdigest()[:12] for data in (before, after))
        return (
            f"/{name}: SHA-256 {new}… where titans.json says {old}…; "
            "the file was altered, export or copy the bundle again"
        )

    return harm


def _missing(folder: Path) -> str:
    (folder / "weights.bin").unlink()
    return "/weights.bin: missing; export or copy the bundle again"


def _extra(folder: Path) -> str:
    (folder / "notes.txt").write_bytes(b"")
    return "/notes.txt: not listed in titans.json; remove it from the bundle"


def _manifest_text(text: bytes, message: str) -> Harm:
    def harm(folder: Path) -> str:
        (folder / "titans.json").write_bytes(text)
        return f"/titans.json: {message}"

    return harm


def _manifest_field(message: str, **fields: Any) -> Harm:  # noqa: ANN401 - JSON
    def harm(folder: Path) -> str:
        change_manifest(folder, lambda content: content.update(fields), identify=False)
        return f"titans.json: {message}"

    return harm


def _altered_manifest(folder: Path) -> str:
    identity = json.loads((folder / "titans.json").read_text("utf-8"))["identity"]
    new = change_manifest(folder, lambda content: content["model"].update(layers=9))
    change_manifest(folder, lambda content: content.update(identity=identity), identify=False)
    return (
        f"titans.json: identity {identity[:12]}… does not belong to the content ({new[:12]}…); "
        "the manifest was altered"
    )


def _listed_as(name: str) -> Harm:
    """Data outside the bundle, under a name that leads there."""

    def harm(folder: Path) -> str:
        shutil.copy(folder / "weights.bin", folder.parent / "weights.bin")
        change_manifest(
            folder, lambda content: content["files"].update({name: content["files"]["weights.bin"]})
        )
        return f": file name {name!r} leaves the bundle or is not plain"

    return harm


def _absolute(folder: Path) -> str:
    return _listed_as(str(folder.parent / "weights.bin"))(folder)


def _symbolic_link(folder: Path) -> str:
    (folder / "weights.bin").rename(folder.parent / "weights.bin")
    (folder / "weights.bin").symlink_to(folder.parent / "weights.bin")
    return "/weights.bin: a link or special file; a bundle holds plain files only, copy it in"


def _hard_link(folder: Path) -> str:
    os.link(folder / "weights.bin", folder.parent / "twin")
    return "/weights.bin: has 2 hard links, so it could change from outside; copy the bundle"


def _graph_of_the_future(old: Callable[[dict[str, Any]], bytes], new: bytes) -> Harm:
    def harm(folder: Path) -> str:
        requires = json.loads((folder / "titans.json").read_text("utf-8"))["requires"]
        graph = (folder / "model.onnx").read_bytes()
        assert graph.count(old(requires)) >= 1
        (folder / "model.onnx").write_bytes(graph.replace(old(requires), new, 1))
        change_manifest(folder, lambda content: None, rehash=True)
        needed = f"opset {requires['opset']} and IR version {requires['ir_version']}"
        return (
            f"/model.onnx: needs {needed}, which are newer than onnxruntime {onnxruntime.__version__}; "
            "upgrade onnxruntime"
        )

    return harm


def _newer_onnxruntime(folder: Path) -> str:
    change_manifest(folder, lambda content: content["requires"].update(onnxruntime="99.0"), identify=False)
    return f"onnxruntime {onnxruntime.__version__} is too old for this bundle; install 99.0 or newer"


@dataclass(frozen=True)
class Row:
    """A damage, the exit code, and whether the manifest alone shows it, so that `inspect` sees it, too."""

    harm: Harm
    code: int = 3
    seen_by: tuple[str, ...] = ("run", "generate", "verify")


_AT_ONCE = ("run", "generate", "verify", "inspect")
BUNDLES = {
    **{f"truncated {name}": Row(_truncated(name), seen_by=_AT_ONCE) for name in FILES},
    "altered weights.bin": Row(_altered("weights.bin")),
    "altered model.onnx": Row(_altered("model.onnx")),
    "altered gradient.readout.onnx": Row(_altered("gradient.readout.onnx")),
    "altered goldens.safetensors": Row(_altered("goldens.safetensors"), seen_by=("verify",)),
    "missing file": Row(_missing, seen_by=_AT_ONCE),
    "extra file": Row(_extra, seen_by=_AT_ONCE),
    "truncated manifest": Row(_manifest_text(b'{"format_version": 1,', "no valid JSON ("), seen_by=_AT_ONCE),
    "huge manifest": Row(
        _manifest_text(b" " * (4 * 2**20 + 1), "4194305 bytes where 4194304 were expected"), seen_by=_AT_ONCE
    ),
    "key given twice": Row(
        _manifest_text(b'{"a": 1, "a": 2}', "no valid JSON (key given twice: 'a')"), seen_by=_AT_ONCE
    ),
    "nested manifest": Row(
        _manifest_text(b"[" * 100_000, "JSON nested deeper than 32"), seen_by=_AT_ONCE
    ),
    "altered manifest": Row(_altered_manifest, seen_by=_AT_ONCE),
    "unknown format": Row(
        _manifest_field(
            "format version 2; this runtime reads 1. Export again, or install a newer titans-runtime",
            format_version=2,
        ),
        seen_by=_AT_ONCE,
    ),
    "data by ..": Row(_listed_as("../weights.bin"), seen_by=_AT_ONCE),
    "data by an absolute name": Row(_absolute, seen_by=_AT_ONCE),
    "data by a symbolic link": Row(_symbolic_link, seen_by=_AT_ONCE),
    "data by a hard link": Row(_hard_link, seen_by=_AT_ONCE),
    "IR version of the future": Row(
        _graph_of_the_future(lambda needed: bytes([0x08, needed["ir_version"]]), bytes([0x08, 99])), code=4
    ),
    "opset of the future": Row(
        _graph_of_the_future(
            lambda needed: bytes([0x42, 4, 0x0A, 0, 0x10, needed["opset"]]),
            bytes([0x42, 4, 0x0A, 0, 0x10, 99]),
        ),
        code=4,
    ),
    "onnxruntime of the future": Row(_newer_onnxruntime, code=4),
}  # fmt: skip


@pytest.mark.parametrize("row", BUNDLES.values(), ids=BUNDLES.keys())
def test_a_bad_bundle(bundle_copy: Path, text: Path, tmp_path: Path, titans: Titans, row: Row) -> None:
    message = row.harm(bundle_copy)
    before = _content(bundle_copy)
    use = tr.verify if row.seen_by == ("verify",) else lambda folder: tr.load(folder, threads=1).session()
    with pytest.raises(tr.TitansError) as caught:
        use(bundle_copy)
    said = str(caught.value)
    assert caught.value.exit_code == row.code
    assert type(caught.value) is (tr.BundleError if row.code == 3 else tr.EnvironmentProblem)
    assert said.removeprefix(str(bundle_copy)).startswith(message)
    assert said.endswith(message) or message.endswith("(")
    commands = {
        "run": ("run", bundle_copy, text, "--state-out", tmp_path / "memory"),
        "generate": ("generate", bundle_copy, "--prompt", "a", "--state-out", tmp_path / "memory"),
        "verify": ("verify", bundle_copy),
        "inspect": ("inspect", bundle_copy),
    }
    for name in row.seen_by:
        assert titans(*commands[name]) == (row.code, f"titans: {said}\n"), name
    assert not (tmp_path / "memory").exists()
    assert _content(bundle_copy) == before


@pytest.mark.parametrize("name", ["CPUExecutionProvidr", "TensorrtExecutionProvider"])
def test_a_bad_provider(tiny_bundle: Path, text: Path, titans: Titans, name: str) -> None:
    available = ", ".join(onnxruntime.get_available_providers())
    message = f"provider {name!r} is not available here; this onnxruntime has {available}"
    for given in ([name], ["CPUExecutionProvider", name]):
        with pytest.raises(tr.EnvironmentProblem) as caught:
            tr.load(tiny_bundle, given)
        assert str(caught.value) == message
    for command in (
        ["run", tiny_bundle, text],
        ["generate", tiny_bundle, "--prompt", "a"],
        ["verify", tiny_bundle],
    ):
        assert titans(*command, "--provider", name) == (4, f"titans: {message}\n")


# --- memories


def _memory(change: Callable[[tr.Snapshot], tr.Snapshot], message: str) -> Callable[..., str]:
    """A memory with something else in it, under a digest that fits."""

    def harm(path: Path, snapshot: tr.Snapshot, monkeypatch: pytest.MonkeyPatch) -> str:
        with monkeypatch.context() as patch:
            patch.setattr("titans_runtime.state._check_finite", lambda arrays, where: None)
            save_snapshot(change(snapshot), path)
        return f"{path}: {message}"

    return harm


def _array(name: str, change: Callable[[np.ndarray], np.ndarray], message: str) -> Callable[..., str]:
    return _memory(
        lambda snapshot: replace(snapshot, arrays=snapshot.arrays | {name: change(snapshot.arrays[name])}),
        message,
    )


def _bytes(change: Callable[[bytes], bytes], message: str) -> Callable[..., str]:
    def harm(path: Path, snapshot: tr.Snapshot, monkeypatch: pytest.MonkeyPatch) -> str:
        path.write_bytes(change(path.read_bytes()))
        return f"{path}: {message}"

    return harm


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed.reshape(-1)[0] = value
        return changed

    return change


def _newer(path: Path, snapshot: tr.Snapshot, monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr("titans_runtime.state.FORMAT_VERSION", 99)
        save_snapshot(snapshot, path)
    return f"{path}: memory format 99; this runtime reads 1; install a newer titans-runtime"


_NO_MEMORY = "no memory file of this project, or damaged"
_FINITE = "holds values that are not finite; restore an older snapshot"
_DIGEST = "its content does not match its digest; restore the file from a copy"
MEMORIES = {
    "another bundle's": _memory(
        lambda snapshot: replace(snapshot, bundle="ab" * 32),
        "the memory of bundle abababababab…, not of {identity}…; open it with the bundle it was saved under",
    ),
    "wrong shape": _array(
        "state.readout",
        lambda array: array[:, :5],
        "state.readout is float32 (1, 5, 256); expected float32 (1, 128, 256)",
    ),
    "wrong batch": _array(
        "state.readout",
        lambda array: np.repeat(array, 2, 0),
        "state.readout is float32 (2, 128, 256); expected float32 (1, 128, 256)",
    ),
    "wrong dtype": _array(
        "state.readout",
        lambda array: array.astype(np.float64),
        "state.readout is float64 (1, 128, 256); expected float32 (1, 128, 256)",
    ),
    "NaN": _array("state.layers.0.memory", _with(np.nan), f"state.layers.0.memory {_FINITE}"),
    "infinity": _array("state.readout", _with(-np.inf), f"state.readout {_FINITE}"),
    "one bit flipped": _bytes(lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], _DIGEST),
    "truncated": _bytes(
        lambda data: data[: len(data) // 2], "damaged or truncated; restore the file from a copy"
    ),
    "truncated in its header": _bytes(lambda data: data[:100], _NO_MEMORY),
    "empty": _bytes(lambda data: b"", _NO_MEMORY),
    "a pickle": _bytes(lambda data: pickle.dumps(_Trap()), _NO_MEMORY),
    "a newer format": _newer,
}
_WITHOUT_BUNDLE = (
    "one bit flipped",
    "truncated",
    "truncated in its header",
    "empty",
    "a pickle",
    "a newer format",
)
"""What is wrong with the file itself, so that `inspect` sees it, too."""


@pytest.mark.parametrize("row", MEMORIES)
def test_a_bad_memory(
    model: tr.Model,
    tiny_bundle: Path,
    text: Path,
    tmp_path: Path,
    titans: Titans,
    monkeypatch: pytest.MonkeyPatch,
    row: str,
) -> None:
    path = tmp_path / "memory"
    session = model.session(0.5, tr.Editor(step=0.5, chunk=4))
    session.append(TEXT)
    session.save(path)
    message = MEMORIES[row](path, session.snapshot(), monkeypatch).format(
        identity=model.manifest.identity[:12]
    )
    before = path.read_bytes()
    with pytest.raises(tr.StateError) as caught:
        model.load_session(path)
    assert str(caught.value) == message
    state = ("--state-in", path, "--state-out", path)
    assert titans("run", tiny_bundle, text, *state) == (3, f"titans: {message}\n")
    assert titans("generate", tiny_bundle, "--prompt", "a", *state) == (3, f"titans: {message}\n")
    if row in _WITHOUT_BUNDLE:
        with pytest.raises(tr.StateError) as caught:
            describe_snapshot(path)
        assert str(caught.value) == message
        assert titans("inspect", path) == (3, f"titans: {message}\n")
    assert path.read_bytes() == before


# --- while it runs


def _failing(what: str) -> Callable[..., None]:
    """A `ReadoutEditor._learn` in whose second call, after its update, something happens."""
    learn, calls = ReadoutEditor._learn, iter(range(100))

    def failing(self: ReadoutEditor, *arguments: object, **settings: object) -> None:
        if next(calls) == 1 and what == "not finite":
            self._scored[...] = np.nan
        learn(self, *arguments, **settings)
        if what == "Ctrl-C" and next(calls) > 1:
            signal.raise_signal(signal.SIGINT)

    return failing


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as Python has it by default: a process that is started in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("Ctrl-C", 130, "titans: interrupted\n"),
        (
            "not finite",
            1,
            "titans: the readout memory's gradient is not finite; the session is as it was before the call\n",
        ),
    ],
)
def test_an_edit_that_fails_leaves_the_memory_file(
    model: tr.Model,
    tiny_bundle: Path,
    text: Path,
    tmp_path: Path,
    titans: Titans,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    code: int,
    message: str,
) -> None:
    path = tmp_path / "memory"
    session = model.session(0.5, tr.Editor(step=0.5, chunk=4))
    session.append(TEXT)
    session.save(path)
    before, snapshot = path.read_bytes(), session.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(ReadoutEditor, "_learn", _failing(what))
        assert titans("run", tiny_bundle, text, "--state-in", path, "--state-out", path) == (code, message)
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(ReadoutEditor, "_learn", _failing(what))
        with pytest.raises(KeyboardInterrupt if what == "Ctrl-C" else tr.NumericsError):
            session.append(TEXT)
    assert_same_snapshot(session.snapshot(), snapshot)


def test_a_byte_beyond_the_vocabulary(bundle_of_few_tokens: Path, tmp_path: Path, titans: Titans) -> None:
    message = "token 200 at index 1; ids run from 0 to 99"
    model = tr.load(bundle_of_few_tokens, threads=1)
    session = model.session()
    with pytest.raises(tr.TokenError, match=message):
        session.append(b"\x01\xc8")
    assert session.position == 0
    (tmp_path / "text").write_bytes(b"\x01\xc8")
    state = ("--state-out", tmp_path / "memory")
    error = (3, f"titans: {message}\n")
    assert titans("run", bundle_of_few_tokens, tmp_path / "text", *state) == error
    assert titans("generate", bundle_of_few_tokens, "--prompt", "\x01\udcc8", *state) == error
    assert not (tmp_path / "memory").exists()


@pytest.fixture(scope="module")
def bundle_of_few_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from titans_export.config import PRESETS, overridden
    from titans_export.model import TitansModel
    from titans_export.pipeline import export_bundle
    from titans_export.training.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("few")
    torch.manual_seed(0)
    save_checkpoint(TitansModel(overridden(PRESETS["tiny"], ["vocab_size=100"])), folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")
    return folder / "bundle"


# --- nothing is executed


class _Trap:
    """Unpickling it is found out."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("something was unpickled",))


@pytest.mark.parametrize("name", [*FILES, "titans.json"])
def test_no_file_of_a_bundle_is_unpickled(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).write_bytes(pickle.dumps(_Trap()))
    if name != "titans.json":
        change_manifest(bundle_copy, lambda content: None, rehash=True)
    with pytest.raises(tr.BundleError):
        tr.verify(bundle_copy)


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_no_torchscript_file_is_unpickled(bundle_copy: Path, form: str) -> None:
    """TorchScript has an archive of its own, in which a pickle may name nothing of Python."""
    import torch

    path = bundle_copy / "model.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(_Trap()))
    else:
        torch.save(_Trap(), path)

    def offer(content: dict[str, Any]) -> None:
        content["graphs"]["model"]["formats"] = {"torchscript": "model.pt"}
        content["files"]["model.pt"] = {}

    change_manifest(bundle_copy, offer, rehash=True)
    with pytest.raises(tr.BundleError, match=r"model\.pt: cannot be loaded"):
        tr.load(bundle_copy, backend="torchscript")


def test_the_runtime_has_nothing_to_execute_or_unpickle_with() -> None:
    forbidden_modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}
    forbidden_calls = {"eval", "exec", "compile"}
    for path in RUNTIME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden_modules & {name.partition(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                assert function not in forbidden_calls, f"{path}:{node.lineno}"
                assert function not in ("np.load", "numpy.load", "torch.load"), f"{path}:{node.lineno}"

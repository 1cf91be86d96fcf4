"""Bundles that are not what they say."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import titans_runtime as tr
from tests.runtime.bad_input.support import FILES, Harm, Titans, content_of
from tests.runtime.command import TEXT
from tests.runtime.streams import assert_same_snapshot, change_manifest


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
    seen_by: tuple[str, ...] = ("run", "generate", "verify", "bench")


_AT_ONCE = ("run", "generate", "verify", "bench", "inspect", "engine")
BUNDLES = {
    **{f"truncated {name}": Row(_truncated(name), seen_by=_AT_ONCE) for name in FILES},
    "altered weights.bin": Row(_altered("weights.bin")),
    "altered model.onnx": Row(_altered("model.onnx")),
    "altered gradient.readout.onnx": Row(
        _altered("gradient.readout.onnx"), seen_by=("run", "generate", "verify")
    ),
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
    before = content_of(bundle_copy)
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
        "bench": ("bench", bundle_copy, "-p", "2", "-n", "0"),
        "engine": ("engine", bundle_copy, "--check"),
    }
    for name in row.seen_by:
        assert titans(*commands[name]) == (row.code, f"titans: {said}\n"), name
    assert not (tmp_path / "memory").exists()
    assert content_of(bundle_copy) == before


@pytest.mark.parametrize("objective", ["prediction", "association"])
def test_a_gradient_graph_that_was_altered(
    bundle_copy: Path, text: Path, tmp_path: Path, titans: Titans, objective: str
) -> None:
    """Read when an editor first asks for it: the session that asked is as it was."""
    message = _altered(f"gradient.{objective}.onnx")(bundle_copy)
    editor = tr.Editor(objective, step=0.1)
    session = tr.load(bundle_copy, threads=1).session(0.5, None)
    session.append(TEXT)
    before = session.snapshot()
    with pytest.raises(tr.BundleError) as caught:
        session.observe(TEXT, editor)
    assert str(caught.value) == f"{bundle_copy}{message}"
    assert_same_snapshot(session.snapshot(), before)
    state = ("--state-out", tmp_path / "memory")
    command = ("run", bundle_copy, text, "--editor", f"{objective}:step=0.1", *state)
    assert titans(*command) == (3, f"titans: {caught.value}\n")
    assert not (tmp_path / "memory").exists()


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

"""Checkpoint to bundle: what is written, that a wrong export is caught, and that nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from titans_converters.onnx import function as function_module
from titans_converters.onnx.trace import memory_node, trace
from titans_export import exportable, pipeline
from titans_export.editing import read_editing
from titans_export.model import Rules, TitansModel
from titans_export.pipeline import export_bundle
from titans_export.programs import model_program, readout_gradient_program
from titans_export.training.checkpoint import load_checkpoint
from titans_runtime import bundle as bundles
from titans_runtime import cli
from titans_runtime.errors import CheckFailed, DataError, UsageError
from titans_runtime.verify import verify

GRADIENTS = {"gradient.readout", "gradient.prediction", "gradient.association"}
FILES = {"titans.json", "model.onnx", "weights.bin", "goldens.safetensors"} | {f"{g}.onnx" for g in GRADIENTS}


def _content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")}


def test_bundle_holds_the_documented_files_and_verifies(tiny_bundle: Path) -> None:
    assert {path.name for path in tiny_bundle.iterdir()} == FILES
    manifest = bundles.open_bundle(tiny_bundle).manifest
    assert set(manifest.files) == FILES - {"titans.json"}
    assert set(manifest.graphs) == {"model"} | GRADIENTS
    assert manifest.recommended["edit"] == 0.5
    report = verify(tiny_bundle)
    assert report.passed
    assert any(".model." in check.name for check in report.checks)
    for graph in GRADIENTS:
        assert any(f".{graph}." in check.name for check in report.checks)


def test_export_is_deterministic(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Another process, with another order of its hash tables, writes the same bytes."""
    command = [sys.executable, "-m", "titans_runtime", "export", str(tiny_checkpoint), "--out", "again"]
    environment = os.environ | {"PYTHONHASHSEED": "4711"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert _content(tmp_path / "again") == _content(tiny_bundle)


# --- a wrong export is caught

_SIGN_OF_THE_ERROR = ("error = Sub(value, edited)", "error = Add(value, edited)")
_WRONG_RULES = {
    "one token: sign of the error": ("_ONE_TOKEN", *_SIGN_OF_THE_ERROR),
    "one token: momentum forgotten": ("_ONE_TOKEN", "Add(decayed, write)", "Add(write, write)"),
    "one token: read before writing": ("_ONE_TOKEN", "MatMul(query, one_memory)", "MatMul(query, retained)"),
    "tiles: sign of the reads": ("_EDITED", "u = Sub(o, read_k)", "u = Add(o, read_k)"),
    "tiles: N without λ": ("_EDITED", "n = Mul(rate, kk_weighted)", "n = Mul(theta, kk_weighted)"),
    "tiles: N with W for W'": ("_EDITED", "Mul(w_before, kk)", "Mul(w, kk)"),
    "tiles: p for p'": ("_EDITED", "rate_p = Mul(rate, p_before)", "rate_p = Mul(rate, p)"),
    "tiles: no momentum into the memory": ("_TILE_STEP", "Add(m_kept, s_into_m)", "Identity(m_kept)"),
    "tiles without editing: step forgotten": ("_PLAIN", "theta_v, end_r,", "v, end_r,"),
    "tiles: row of a ragged tile": ("_TILES", "_tile, last_in_tile,", "_tile, full_row,"),
    "tiles: E for W in the state": ("_TILES", "k_to_m = Mul(k_t, end_w)", "k_to_m = Mul(k_t, end_e)"),
}  # fmt: skip


def _wrong_rule(monkeypatch: pytest.MonkeyPatch, text: str, right: str, wrong: str) -> None:
    body = getattr(function_module, text)
    assert body.count(right) == 1
    monkeypatch.setattr(function_module, text, body.replace(right, wrong))


@pytest.mark.parametrize("mistake", _WRONG_RULES)
def test_goldens_catch_a_wrong_rule(
    mistake: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The goldens come from the token loop in float64, so no mistake in the fast form agrees with itself."""
    _wrong_rule(monkeypatch, *_WRONG_RULES[mistake])
    bundle = tmp_path / "wrong"
    shutil.copytree(tiny_bundle, bundle)
    manifest = bundles.open_bundle(bundle).manifest
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    model.functions[0].CopyFrom(function_module.neural_memory_function(manifest.model["tile"]))
    _rewrite(bundle, manifest, "model.onnx", model.SerializeToString())
    assert not verify(bundle).passed


def _rewrite(bundle: Path, manifest: bundles.Manifest, name: str, content: bytes) -> None:
    """Replace a file, and the manifest so that it vouches for the new one."""
    (bundle / name).write_bytes(content)
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    del fields["format_version"], fields["identity"]
    fields["files"] = manifest.files | {name: bundles.file_entry(bundle / name)}
    bundles.write_manifest(bundle, bundles.Manifest.create(**fields))


def test_the_unchanged_body_passes_the_same_way(tiny_bundle: Path, tmp_path: Path) -> None:
    """What the mistakes above are measured against."""
    bundle = tmp_path / "right"
    shutil.copytree(tiny_bundle, bundle)
    manifest = bundles.open_bundle(bundle).manifest
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    model.functions[0].CopyFrom(function_module.neural_memory_function(manifest.model["tile"]))
    _rewrite(bundle, manifest, "model.onnx", model.SerializeToString())
    assert verify(bundle).passed


def _run_export(checkpoint: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and error line of ``titans export``, which must leave the folder of ``out`` as it was."""
    out.parent.mkdir(exist_ok=True)
    before = {path: path.is_dir() or path.read_bytes() for path in out.parent.rglob("*")}
    code = cli.main(["export", str(checkpoint), "--out", str(out)])
    captured = capsys.readouterr()
    assert {path: path.is_dir() or path.read_bytes() for path in out.parent.rglob("*")} == before
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = (line for line in captured.err.splitlines() if line.startswith("titans: "))
    assert captured.err.endswith(f"{line}\n")
    return code, line


def test_wrong_export_leaves_nothing(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _wrong_rule(monkeypatch, "_EDITED", "u = Sub(o, read_k)", "u = Add(o, read_k)")
    code, line = _run_export(tiny_checkpoint, tmp_path / "here" / "bundle", capsys)
    assert code == 1
    assert line.startswith("titans: verification failed: ")


def test_wrong_export_leaves_the_older_bundle(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast_trace: None,
) -> None:
    right = exportable.make_goldens

    def wrong(model: TitansModel, watch: object) -> dict[str, Any]:
        goldens = right(model)
        goldens["edit_off.model.2.output.logits"][0, 5, 7] += 0.01
        return goldens

    monkeypatch.setattr(exportable, "make_goldens", wrong)
    out = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, out)
    with pytest.raises(CheckFailed, match=r"edit_off\.model\.2\.logits is off by (1\.0|9\.9)\de-0[23]"):
        export_bundle(tiny_checkpoint, out)
    assert _content(out) == _content(tiny_bundle)
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture(scope="module")
def _traced(tiny_checkpoint: Path) -> dict[str, ir.Model]:
    model = load_checkpoint(tiny_checkpoint)
    programs = [model_program(model, Rules(exact=memory_node)), readout_gradient_program(model.config)]
    return {program.name: trace(program) for program in programs}


@pytest.fixture
def fast_trace(_traced: dict[str, ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace once for all tests that are about something else."""
    monkeypatch.setattr(pipeline, "trace", lambda program, _: _traced[program.name])


# --- where it may write


def test_an_older_bundle_is_replaced(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, fast_trace: None
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, out)
    born = out.stat().st_ino
    assert export_bundle(tiny_checkpoint, out).passed
    assert _content(out) == _content(tiny_bundle)
    assert out.stat().st_ino != born
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("harm", ["a file beside it", "a damaged manifest"])
def test_what_is_no_intact_bundle_is_left_alone(
    harm: str, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, fast_trace: None
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, out)
    name = "notes.txt" if harm == "a file beside it" else "titans.json"
    (out / name).write_text("mine", encoding="utf-8")
    before = _content(out)
    with pytest.raises(UsageError, match="no intact bundle to replace"):
        export_bundle(tiny_checkpoint, out)
    assert _content(out) == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("folder", ["new", "deep/er/new", "empty"])
def test_new_and_empty_folders_are_taken(
    folder: str, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, fast_trace: None
) -> None:
    (tmp_path / "empty").mkdir()
    export_bundle(tiny_checkpoint, tmp_path / folder)
    assert _content(tmp_path / folder) == _content(tiny_bundle)
    assert not list(tmp_path.rglob(".*"))


def test_a_foreign_folder_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "here" / "documents"
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("three years", encoding="utf-8")
    code, line = _run_export(tiny_checkpoint, out, capsys)
    assert code == 2
    assert f"--out {out}: holds files that are no bundle" in line
    with pytest.raises(UsageError, match="is a file"):
        export_bundle(tiny_checkpoint, out / "thesis.txt")


# --- damaged checkpoints


def _truncate(checkpoint: Path) -> None:
    path = checkpoint / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _reshape(checkpoint: Path) -> None:
    path = checkpoint / "weights.safetensors"
    tensors = load_file(path)
    tensors["head.weight"] = np.ascontiguousarray(tensors["head.weight"][:, :-1])
    save_file(tensors, path)


def _drop(checkpoint: Path) -> None:
    path = checkpoint / "weights.safetensors"
    tensors = load_file(path)
    del tensors["norm.weight"]
    save_file(tensors, path)


def _add(checkpoint: Path) -> None:
    path = checkpoint / "weights.safetensors"
    save_file(load_file(path) | {"extra": np.zeros(3, np.float32)}, path)


def _set(**fields: object) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        path = checkpoint / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields), encoding="utf-8")

    return change


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_text(text, encoding="utf-8") and None


_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (_truncate, "weights.safetensors: no readable tensors"),
    "wrong shape": (_reshape, "head.weight has shape (256, 31); config.json asks for (256, 32)"),
    "missing tensor": (_drop, "tensor 'norm.weight' is missing from the file"),
    "unknown tensor": (_add, "tensor 'extra' is not expected in the file"),
    "no weights": (lambda c: (c / "weights.safetensors").unlink(), "weights.safetensors: no readable"),
    "no config": (lambda c: (c / "config.json").unlink(), "config.json: no readable config"),
    "config is no JSON": (_write("config.json", "{"), "config.json: no readable config"),
    "config is a list": (_write("config.json", "[]"), "config.json: expected a JSON object"),
    "unknown field": (_set(depth=3), "unknown field 'depth'"),
    "wrong type": (_set(layers="two"), "layers is 'two'; expected int"),
    "impossible size": (_set(layers=0), "layers is 0; it must be 1 or more"),
    "wrong contexts": (_set(readout_contexts=["a"]), "readout_contexts"),
    "another width": (_set(d_model=64), "config.json asks for"),
    "a width beyond all memory": (_set(d_model=10**6), "d_model is 1000000; it must be 65536 or less"),
    "editing is no JSON": (_write("editing.json", "{"), "editing.json: expected the fields"),
    "editing without editor": (_write("editing.json", '{"edit": 1}'), "editing.json: expected the fields"),
    "unknown objective": (
        _write("editing.json", '{"edit": 1, "editor": {"objective": "luck"}}'),
        "editor objective 'luck'; known: readout",
    ),
    "impossible edit": (_write("editing.json", '{"edit": 2, "editor": null}'), "edit is 2"),
    "edit is a text": (
        _write("editing.json", '{"edit": "0.5", "editor": null}'),
        "editing.json: edit is '0.5'; it must be a number from 0 to 1",
    ),
    "edit is true": (_write("editing.json", '{"edit": true, "editor": null}'), "edit is True; it must be a"),
    "editor is a text": (
        _write("editing.json", '{"edit": 1, "editor": "readout"}'),
        "editing.json: editor is 'readout'; give an object with its fields",
    ),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    damage: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    harm, message = _DAMAGES[damage]
    harm(checkpoint)
    monkeypatch.setattr(pipeline, "trace", lambda _: pytest.fail("work began on a damaged checkpoint"))
    code, line = _run_export(checkpoint, tmp_path / "here" / "bundle", capsys)
    assert code == 3
    assert message in line
    with pytest.raises(DataError):
        export_bundle(checkpoint, tmp_path / "here" / "bundle")


@pytest.mark.parametrize(
    ("editor", "message"),
    [
        (
            {"objective": "prediction", "memories": ["layers.9.*"]},
            "memories: 'layers.9.*' fits none of layers.0.memory, layers.1.memory",
        ),
        (
            {"objective": "readout", "also": {"objective": "association", "memories": ["layers.9.*"]}},
            "memories: 'layers.9.*' fits none of",
        ),
        (
            {"objective": "prediction"},
            "the bundle cannot be edited by 'prediction'; known: readout, association",
        ),
    ],
    ids=["a pattern", "the second editor", "a graph that is missing"],
)
def test_no_bundle_recommends_an_editor_that_it_cannot_open(
    editor: dict[str, Any],
    message: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fast_trace: None,
) -> None:
    if "cannot be edited" in message:  # as where an operator has no derivative
        every = pipeline.gradient_graphs

        def fewer(*given: Any) -> dict[str, ir.Model]:  # noqa: ANN401
            return {name: graph for name, graph in every(*given).items() if "prediction" not in name}

        monkeypatch.setattr(pipeline, "gradient_graphs", fewer)
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    editing = checkpoint / "editing.json"
    editing.write_text(json.dumps({"edit": 0.5, "editor": editor}), encoding="utf-8")
    code, line = _run_export(checkpoint, tmp_path / "here" / "bundle", capsys)
    assert code == 3
    assert line.startswith(f"titans: {editing}: editor: {message}")


def test_editing_is_off_where_a_checkpoint_recommends_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert read_editing(tmp_path) == {"edit": 0.0, "editor": None}
    assert read_editing(tiny_checkpoint) == json.loads((tiny_checkpoint / "editing.json").read_text())

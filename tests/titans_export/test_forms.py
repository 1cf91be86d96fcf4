"""Bundles of one checkpoint in several forms: other graphs and weights, the same interface and model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import titans_runtime as tr
from titans_converters.onnx.quantize import QuantisedRows
from titans_export.config import PRESETS, ModelConfig
from titans_export.model import TitansModel
from titans_export.pipeline import export_bundle
from titans_export.training.checkpoint import save_checkpoint
from titans_runtime import cli
from titans_runtime.backends import Array
from titans_runtime.errors import CheckFailed

TEXT = bytes(range(97, 97 + 21))


def _scores(bundle: Path, edit: float) -> np.ndarray:
    session = tr.load(bundle, threads=1).session(edit=edit, editor=None)
    return np.concatenate([session.append(TEXT[:1]), session.append(TEXT[1:])])


def _model(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "model.onnx", load_external_data=False)


def _operators(bundle: Path) -> set[tuple[str, str]]:
    return {(node.domain, node.op_type) for node in _model(bundle).graph.node}


def test_scan_has_no_functions_and_the_same_outputs(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "scan", scan="scan")
    assert not _model(tmp_path / "scan").functions
    assert {domain for domain, _ in _operators(tmp_path / "scan")} == {""}
    for edit in (0.0, 0.7):
        np.testing.assert_allclose(
            _scores(tmp_path / "scan", edit), _scores(tiny_bundle, edit), rtol=1e-4, atol=1e-4
        )


def test_native_has_the_runtimes_operator_and_the_same_outputs(tmp_path: Path) -> None:
    """Every strength of editing, though the operator knows none."""
    _random_checkpoint(dataclasses.replace(PRESETS["tiny"], momentum=False), tmp_path)
    for scan in ("plugin", "native"):
        export_bundle(tmp_path / "checkpoint", tmp_path / scan, scan=scan)
    assert ("com.microsoft", "LinearAttention") in _operators(tmp_path / "native")
    for edit in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(
            _scores(tmp_path / "native", edit), _scores(tmp_path / "plugin", edit), rtol=1e-4, atol=1e-4
        )


def _random_checkpoint(config: ModelConfig, folder: Path) -> None:
    torch.manual_seed(0)
    model = TitansModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_checkpoint(model, folder / "checkpoint")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "momentum"),
        ({"momentum": False, "period": 4}, "a gradient period"),
        ({"momentum": False, "memory_depth": 1, "learned_memory": True}, "an MLP as memory"),
        ({"momentum": False, "architecture": "mac"}, "a memory read within segments"),
    ],
)
def test_native_refuses_what_it_cannot_express(
    fields: dict[str, object], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _random_checkpoint(dataclasses.replace(PRESETS["tiny"], **fields), tmp_path)
    out = str(tmp_path / "out" / "bundle")
    assert cli.main(["export", str(tmp_path / "checkpoint"), "--out", out, "--scan", "native"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"titans: --scan native: this model has {reason}, which LinearAttention cannot express; "
        "choose plugin or scan\n"
    )
    assert not (tmp_path / "out").exists()


def test_scales_that_are_off_by_a_hundredth_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Export replays with activations in float32, too, where no rounding hides an error of the weights."""
    find = QuantisedRows._find

    def off(rows: QuantisedRows, weight: Array) -> list[tuple[Array, Array]] | None:
        found = find(rows, weight)
        return found and [(codes, scales * np.float32(1.01)) for codes, scales in found]

    monkeypatch.setattr(QuantisedRows, "_find", off)
    with pytest.raises(CheckFailed, match="verification failed"):
        export_bundle(tiny_checkpoint, tmp_path / "int8", weights="int8")
    assert not (tmp_path / "int8").exists()


def test_quantised_weights_keep_all_but_matrices_in_float32(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "int8", weights="int8")
    manifest = tr.load(tmp_path / "int8").manifest
    assert manifest.model["weights"] == "int8"
    assert all(entry.dtype == "float32" for entry in manifest.state if entry.role == "memory")
    graph = _model(tmp_path / "int8").graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    layers, config = PRESETS["tiny"].layers, PRESETS["tiny"]
    assert len(products) == 5 * layers + 1  # two of the input, out, up, down; and the head
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    kept = [sizes.get(node.input[1]) for node in graph.node if node.op_type == "MatMul"]
    gates = (config.d_model, config.gate_count * config.heads)
    assert kept.count(gates) == layers
    assert (config.d_model, config.d_model) in kept  # the readout key's whitening


def test_quantize_and_weights_exclude_each_other(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "bundle"), "--weights", "float16", "--quantize", "int8"]
    assert cli.main(["export", str(tiny_checkpoint), *arguments]) == 2
    assert "--quantize int8: replaces --weights float16; give one of them" in capsys.readouterr().err

"""What the builder does before and after TensorRT's own work; a build itself needs a GPU."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import titans_runtime as tr
from titans_converters.tensorrt.builder import build_engine, check_plugins, load_model, profiles
from titans_converters.tensorrt.check import check
from titans_converters.tensorrt.prepare import prepare
from titans_runtime.bundle import open_bundle
from titans_runtime.cli import main
from titans_runtime.engines import Target

TARGET = Target("0" * 64, "GPU", "9.0", "11.4", max_batch=4, max_tokens=512, tf32=False)


def test_weights_are_put_into_the_model_from_verified_bytes(tiny_bundle: Path, tmp_path: Path) -> None:
    model = prepare(load_model(open_bundle(tiny_bundle)))
    graph = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    bundle = open_bundle(tiny_bundle)
    feeds = {f"past.{one.name}": np.zeros((1, *one.row_shape), one.dtype) for one in bundle.manifest.state}
    feeds["input_ids"] = np.frombuffer(b"some text", np.uint8).astype(np.int64)[None]
    feeds["edit"] = np.ones((1, bundle.manifest.edit_layers), np.float32)
    expected = tr.load(tiny_bundle).session(edit=1.0, editor=None).append(b"some text")
    assert np.allclose(graph.run(["logits"], feeds)[0][0], expected, atol=1e-5)

    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    weights = bytearray((copy / "weights.bin").read_bytes())
    weights[0] ^= 1
    (copy / "weights.bin").write_bytes(weights)
    with pytest.raises(tr.BundleError, match="altered"):
        load_model(open_bundle(copy))


def test_there_is_a_profile_for_decode_and_one_for_prefill() -> None:
    decode, prefill = profiles(TARGET)
    assert decode == ((1, 1, 4), (1, 1, 1))
    assert prefill == ((1, 1, 4), (1, 512, 512))


def test_a_layer_that_became_no_plugin_stops_the_build(tiny_bundle: Path) -> None:
    expected = check(load_model(open_bundle(tiny_bundle), weights=False))
    names = [fate.node for fate in expected.fates if fate.becomes == "plugin"]
    assert check_plugins(names, expected) == 2
    with pytest.raises(tr.CheckFailed, match=f"1 of 2 memory layers became a plugin: {names[0]}; expected"):
        check_plugins(names[:1], expected)


def test_another_target_is_another_key() -> None:
    fields = {**TARGET.__dict__}
    keys = {
        Target(**(fields | change)).key for change in ({}, {"gpu": "B"}, {"tf32": True}, {"tensorrt": "12"})
    }
    assert len(keys) == 4


def test_a_batch_of_none_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(tr.UsageError, match="--max-batch 0: must be 1 or more"):
        build_engine(open_bundle(tiny_bundle), max_batch=0)


def test_the_command_checks_without_tensorrt(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", str(tiny_bundle), "--check"]) == 0
    said = capsys.readouterr().out
    assert said.count("titans::NeuralMemory): plugin") == 2
    assert "PASSED" in said


def test_a_format_is_refused_before_anything_is_exported(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main(["export", str(tiny_checkpoint), "--out", str(out), "--format", "onnx,tensorrtt"]) == 2
    assert "--format tensorrtt: unknown" in capsys.readouterr().err
    assert not out.exists()


def test_without_tensorrt_nothing_is_exported_for_it(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    out = tmp_path / "bundle"
    assert main(["export", str(tiny_checkpoint), "--out", str(out), "--format", "tensorrt"]) == 4
    assert "pip install 'titans-runtime[tensorrt]'" in capsys.readouterr().err
    assert not out.exists()

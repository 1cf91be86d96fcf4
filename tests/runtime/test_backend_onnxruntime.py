"""ONNX Runtime behind the interface: providers, buffers, and data from nowhere but the bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import titans_runtime as tr
from tests.runtime.streams import Array, change_manifest
from titans_runtime.backends import DTYPES
from titans_runtime.backends import onnxruntime as backend
from titans_runtime.backends.onnxruntime import _check_version


def test_a_misspelt_provider_is_refused_and_the_available_ones_named(tiny_bundle: Path) -> None:
    with pytest.raises(tr.EnvironmentProblem) as caught:
        tr.load(tiny_bundle, ["CPUExecutionProvidr"])
    assert "provider 'CPUExecutionProvidr' is not available here" in str(caught.value)
    for name in onnxruntime.get_available_providers():
        assert name in str(caught.value)


def test_one_bad_provider_among_good_ones_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(tr.EnvironmentProblem, match="'NoSuchProvider'"):
        tr.load(tiny_bundle, ["CPUExecutionProvider", "NoSuchProvider"])


def test_no_provider_at_all_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(tr.EnvironmentProblem, match="no provider given"):
        tr.load(tiny_bundle, [])


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_onnxruntime_drops_is_no_silent_fallback(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["FastProvider"])
    with pytest.raises(tr.EnvironmentProblem, match="'FastProvider'"):
        tr.load(tiny_bundle, ["FastProvider"])


def test_one_name_in_place_of_a_list_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(tr.UsageError, match="providers is the string 'CPUExecutionProvider'; give a list"):
        tr.load(tiny_bundle, "CPUExecutionProvider")


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, 1025, 10**23])
def test_threads_that_cannot_be_meant_are_refused(tiny_bundle: Path, threads: int) -> None:
    with pytest.raises(tr.UsageError, match=f"threads is {threads}; it must be an integer, 1 to 1024"):
        tr.load(tiny_bundle, threads=threads)
    with pytest.raises(tr.UsageError, match=f"threads is {threads}; it must be"):
        tr.verify(tiny_bundle, threads=threads)


def test_a_graph_that_the_bundle_lacks_is_named(model: tr.Model) -> None:
    with pytest.raises(tr.BundleError, match=r"no graph 'other'; it has model, gradient\.readout"):
        model.backend.graph("other")


def test_a_graph_is_loaded_once(model: tr.Model) -> None:
    assert model.backend.graph("model") is model.graph
    assert model.backend.graph("gradient.readout") is model.backend.graph("gradient.readout")


def _buffers(model: tr.Model) -> tuple[dict[str, Array], dict[str, Array]]:
    spec = model.manifest.graphs["gradient.readout"]
    axes = {"batch": 1, "tokens": 3}
    return tuple(  # type: ignore[return-value]
        {
            tensor.name: np.zeros([axes.get(axis, axis) for axis in tensor.shape], DTYPES[tensor.dtype])
            for tensor in tensors
        }
        for tensors in (spec.inputs, spec.outputs)
    )


def test_bound_values_are_the_arrays_themselves(model: tr.Model) -> None:
    inputs, outputs = _buffers(model)
    call = model.backend.graph("gradient.readout").bind(inputs, outputs)
    addresses = {array.ctypes.data for array in (*inputs.values(), *outputs.values())}
    assert {value.data_ptr() for value in call._values} == addresses


def test_a_run_reads_and_writes_the_arrays_in_place(model: tr.Model) -> None:
    inputs, outputs = _buffers(model)
    call = model.backend.graph("gradient.readout").bind(inputs, outputs)
    for value in (1.0, 2.0):
        inputs["base_logits"][0, :, 5] = value
        call.run()
        assert np.array_equal(outputs["logits"], inputs["base_logits"])


def test_an_array_with_gaps_is_refused(model: tr.Model) -> None:
    inputs, outputs = _buffers(model)
    inputs["base_logits"] = np.zeros((1, 3, 512), np.float32)[..., ::2]
    with pytest.raises(ValueError, match="C-contiguous"):
        model.backend.graph("gradient.readout").bind(inputs, outputs)


@pytest.mark.parametrize(
    ("installed", "required", "fits"),
    [
        ("1.23.0", "1.23", True),
        ("1.23.2", "1.20", True),
        ("2.0.0", "1.23", True),
        ("1.9.1", "1.23", False),
        ("1.22.3", "1.23", False),
    ],
)
def test_versions_are_compared_as_numbers(installed: str, required: str, fits: bool) -> None:
    if fits:
        _check_version(installed, required)
    else:
        with pytest.raises(tr.EnvironmentProblem, match=f"onnxruntime {installed} is too old"):
            _check_version(installed, required)


# --- graphs that are listed and hashed, and still not what they should be


def test_a_file_that_is_no_graph_is_a_damaged_bundle(bundle_copy: Path) -> None:
    (bundle_copy / "model.onnx").write_bytes(b"no graph")
    change_manifest(bundle_copy, lambda content: None, rehash=True)
    with pytest.raises(tr.BundleError, match=r"model\.onnx: cannot be loaded") as caught:
        tr.load(bundle_copy)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("field", ["IR version", "opset"])
def test_a_graph_of_the_future_asks_for_a_newer_onnxruntime(
    bundle_copy: Path, capfd: pytest.CaptureFixture[str], field: str
) -> None:
    graph = (bundle_copy / "model.onnx").read_bytes()
    requires = json.loads((bundle_copy / "titans.json").read_text("utf-8"))["requires"]
    if field == "opset":  # OperatorSetIdProto of the default domain: field 2 alone, after the model's field 8
        old, new = bytes([0x42, 2, 0x10, requires["opset"]]), bytes([0x42, 2, 0x10, 99])
        if old not in graph:
            old, new = bytes([0x42, 4, 0x0A, 0, 0x10, requires["opset"]]), bytes([0x42, 4, 0x0A, 0, 0x10, 99])
        assert graph.count(old) == 1
    else:
        old, new = bytes([0x08, requires["ir_version"]]), bytes([0x08, 99])
        assert graph.startswith(old)
    (bundle_copy / "model.onnx").write_bytes(graph.replace(old, new, 1))
    change_manifest(bundle_copy, lambda content: None, rehash=True)
    with pytest.raises(tr.EnvironmentProblem, match=r"newer than onnxruntime .*; upgrade onnxruntime"):
        tr.load(bundle_copy)
    assert capfd.readouterr() == ("", ""), "ONNX Runtime prints nothing of its own"


def test_threads_do_not_spin_while_they_wait(model: tr.Model) -> None:
    options = model.graph._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_another_graph_under_the_name_is_refused(bundle_copy: Path) -> None:
    change_manifest(
        bundle_copy, lambda content: content["graphs"]["gradient.readout"].update(file="model.onnx")
    )
    with pytest.raises(tr.BundleError, match=r"its inputs are not those that titans\.json states"):
        tr.load(bundle_copy).session()


def test_a_shape_that_the_graph_does_not_have_is_refused(bundle_copy: Path) -> None:
    def widen(content: dict) -> None:
        content["state"][0]["shape"][1] = 4
        for graph in content["graphs"].values():
            for tensor in (*graph["inputs"], *graph["outputs"]):
                if tensor["name"].endswith(".layers.0.conv"):
                    tensor["shape"][1] = 4

    change_manifest(bundle_copy, widen)
    with pytest.raises(tr.BundleError, match=r"past\.layers\.0\.conv is tensor\(float\) .* export again"):
        tr.load(bundle_copy)


def test_a_type_that_the_graph_does_not_have_is_refused(bundle_copy: Path) -> None:
    def halve(content: dict) -> None:
        for tensor in content["graphs"]["model"]["outputs"]:
            tensor["dtype"] = "float16"

    change_manifest(bundle_copy, halve)
    with pytest.raises(tr.BundleError, match="not float16"):
        tr.load(bundle_copy)


def test_weights_that_are_not_listed_are_refused(bundle_copy: Path) -> None:
    (bundle_copy / "weights.bin").unlink()
    change_manifest(bundle_copy, lambda content: content["files"].pop("weights.bin"))
    with pytest.raises(tr.BundleError, match=r"'weights\.bin' is not listed in titans\.json"):
        tr.load(bundle_copy)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", [b"weights.bim", b"../leak.bin", b"/etc/passwd"])
def test_weights_come_from_nowhere_but_the_bundle(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, mapped: bool
) -> None:
    """ONNX Runtime would look for them in the working directory."""
    monkeypatch.setattr(backend, "_MAPPED_FROM", 0 if mapped else 2**60)
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(bundle_copy / "weights.bin", here / "weights.bim")
    shutil.copy(bundle_copy / "weights.bin", tmp_path / "leak.bin")
    monkeypatch.chdir(here)
    graph = (bundle_copy / "model.onnx").read_bytes()
    (bundle_copy / "model.onnx").write_bytes(graph.replace(b"weights.bin", name))
    change_manifest(bundle_copy, lambda content: None, rehash=True)
    with pytest.raises(tr.BundleError, match="cannot be loaded"):
        tr.load(bundle_copy)


def test_mapped_weights_give_the_same_logits(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tr.load(tiny_bundle).session().append(b"some text")
    monkeypatch.setattr(backend, "_MAPPED_FROM", 0)
    assert tr.load(tiny_bundle).session().append(b"some text").tobytes() == read.tobytes()


def _replaced(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


@pytest.mark.parametrize("change", [_replaced, Path.touch, Path.unlink])
def test_mapped_weights_that_change_while_they_are_loaded_are_refused(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    """Checked is what was there before; what ONNX Runtime has mapped may be something else."""
    monkeypatch.setattr(backend, "_MAPPED_FROM", 0)
    load = onnxruntime.InferenceSession

    def load_changed(*arguments: object, **options: object) -> object:
        session = load(*arguments, **options)
        change(bundle_copy / "weights.bin")
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", load_changed)
    with pytest.raises(tr.BundleError, match="changed while it was loaded"):
        tr.load(bundle_copy)


def test_mapped_weights_are_hashed_first(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_MAPPED_FROM", 0)
    content = bytearray((bundle_copy / "weights.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_copy / "weights.bin").write_bytes(content)
    with pytest.raises(tr.BundleError, match=r"weights\.bin: SHA-256 .* altered"):
        tr.load(bundle_copy)

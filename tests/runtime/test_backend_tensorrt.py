"""The TensorRT backend over stand-ins for CUDA and TensorRT, and what is said where they are missing.

None of this has run inside TensorRT: that is the suite ``tensorrt``, on a machine that has it.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

import titans_runtime as tr
from tests.runtime import fake_tensorrt
from tests.runtime.streams import assert_same_everywhere, every_way
from titans_runtime import engines
from titans_runtime.bundle import open_bundle
from titans_runtime.cli import main
from titans_runtime.engines import Target, store_engine


@pytest.fixture
def cuda(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fake_tensorrt.Cuda:
    """Stand-ins in the modules' places, and an empty cache."""
    fake = fake_tensorrt.Cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    module = fake_tensorrt.tensorrt(fake, tiny_bundle / "model.onnx")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setenv(engines.CACHE_VARIABLE, str(tmp_path))
    return fake


def _target(folder: Path, **changes: object) -> Target:
    fields = {
        "bundle": open_bundle(folder).manifest.identity,
        "gpu": fake_tensorrt.GPU,
        "capability": "9.0",
        "tensorrt": fake_tensorrt.VERSION,
        "max_batch": 4,
        "max_tokens": 512,
        "tf32": False,
    }
    return Target(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def on_gpu(cuda: fake_tensorrt.Cuda, tiny_bundle: Path) -> tr.Model:
    store_engine(_target(tiny_bundle), b"engine", plugins=2, bodies=0)
    return tr.load(tiny_bundle, threads=1, backend="tensorrt")


def test_every_way_through_a_session_gives_what_onnxruntime_gives(model: tr.Model, on_gpu: tr.Model) -> None:
    assert_same_everywhere(every_way(model), every_way(on_gpu))


def test_goldens_are_replayed_in_the_engine(
    on_gpu: tr.Model, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny_bundle), "--backend", "tensorrt"]) == 0
    assert "on TensorRT" in capsys.readouterr().out


def test_decoding_is_recorded_once_for_each_set_and_then_launched(
    cuda: fake_tensorrt.Cuda, on_gpu: tr.Model
) -> None:
    session = on_gpu.session(editor=None)
    for token in b"abcdefgh":
        session.append([token])
    assert cuda.launches == 6  # eight tokens, in two sets; the first run of each is not recorded


def test_prefill_is_not_recorded(cuda: fake_tensorrt.Cuda, on_gpu: tr.Model) -> None:
    session = on_gpu.session(editor=None)
    for _ in range(4):
        session.append(b"several tokens")
    assert cuda.launches == 0


def test_an_engine_with_function_bodies_is_not_recorded(cuda: fake_tensorrt.Cuda, tiny_bundle: Path) -> None:
    store_engine(_target(tiny_bundle), b"engine", plugins=1, bodies=1)
    session = tr.load(tiny_bundle, backend="tensorrt").session(editor=None)
    for token in b"abcdefgh":
        session.append([token])
    assert cuda.launches == 0


def test_memory_goes_with_its_session(cuda: fake_tensorrt.Cuda, on_gpu: tr.Model) -> None:
    gc.collect()
    before = len(cuda.memory)
    session = on_gpu.session(editor=None)
    for token in b"abcdefgh":
        session.append([token])
    assert len(cuda.memory) > before
    del session
    gc.collect()
    assert len(cuda.memory) == before


def test_more_streams_than_the_engine_takes_are_refused(on_gpu: tr.Model) -> None:
    sessions = [on_gpu.session(editor=None) for _ in range(5)]
    with on_gpu.batch(sessions) as batch, pytest.raises(tr.UsageError, match="--max-batch 5"):
        batch.append([b"ab"] * 5)


@pytest.mark.parametrize("changes", [{}, {"gpu": "Another GPU"}, {"tensorrt": "10.0"}, {"bundle": "0" * 64}])
def test_without_an_engine_of_its_own_the_command_is_named(
    cuda: fake_tensorrt.Cuda, tiny_bundle: Path, changes: dict[str, object]
) -> None:
    if changes:
        store_engine(_target(tiny_bundle, **changes), b"engine", plugins=2, bodies=0)
    with pytest.raises(tr.EnvironmentProblem, match=f"no engine of this bundle.*titans engine {tiny_bundle}"):
        tr.load(tiny_bundle, backend="tensorrt")


def test_an_altered_engine_is_refused(cuda: fake_tensorrt.Cuda, tiny_bundle: Path) -> None:
    store_engine(_target(tiny_bundle), b"engine", plugins=2, bodies=0).path.write_bytes(b"enginE")
    with pytest.raises(tr.DataError, match="altered since it was built"):
        tr.load(tiny_bundle, backend="tensorrt")


def test_an_engine_that_does_not_load_is_refused(cuda: fake_tensorrt.Cuda, tiny_bundle: Path) -> None:
    store_engine(_target(tiny_bundle), b"other", plugins=2, bodies=0)
    with pytest.raises(tr.EnvironmentProblem, match="cannot load it; build it again"):
        tr.load(tiny_bundle, backend="tensorrt")


@pytest.mark.parametrize("text", ["", "{}", '{"target": {"bundle": 1}}', "[]"])
def test_a_damaged_description_is_named(cuda: fake_tensorrt.Cuda, tiny_bundle: Path, text: str) -> None:
    path = store_engine(_target(tiny_bundle), b"engine", plugins=2, bodies=0).path.with_suffix(".json")
    path.write_text(text)
    with pytest.raises(tr.DataError, match=f"{path.name}: no description of an engine"):
        tr.load(tiny_bundle, backend="tensorrt")


def test_without_tensorrt_one_line_says_what_to_install(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for command in (
        ["run", str(tiny_bundle), __file__, "--backend", "tensorrt"],
        ["engine", str(tiny_bundle)],
    ):
        assert main(command) == 4
        said = capsys.readouterr().err.strip()
        assert said == "titans: tensorrt is not installed; pip install 'titans-runtime[tensorrt]'"


def test_without_a_gpu_one_line_says_so(
    cuda: fake_tensorrt.Cuda, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda.devices = 0
    assert main(["engine", str(tiny_bundle)]) == 4
    said = capsys.readouterr().err.strip()
    assert "cudaGetDeviceCount reports cudaErrorNoDevice" in said
    assert "\n" not in said


def test_other_backends_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(tr.UsageError, match="backend 'tenserrt' is unknown; there are onnxruntime"):
        tr.load(tiny_bundle, backend="tenserrt")
    with pytest.raises(tr.UsageError, match="providers are ONNX Runtime's"):
        tr.load(tiny_bundle, ["CPUExecutionProvider"], backend="tensorrt")

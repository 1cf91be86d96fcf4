"""Inside TensorRT, on a machine with a GPU and TensorRT: `make suite NAME=tensorrt`.

Engines are built with the memory as a plugin, and must reproduce the goldens. This suite has not run yet: see
`docs/tensorrt.md`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import titans_runtime as tr
from titans_converters.tensorrt.builder import build_engine
from titans_runtime.bundle import open_bundle
from titans_runtime.engines import CACHE_VARIABLE, Engine

pytestmark = pytest.mark.suite("tensorrt")

TEXT = b"what has been learnt stays on the device, in two sets that take turns. " * 12
WITHOUT_PLUGIN = """
import sys
import titans_runtime as tr
model = tr.load(sys.argv[1], backend="tensorrt")
model.session(edit=1.0, editor=None).append(b"some text")
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"titans_converters", "torch", "triton", "onnx"}, loaded
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(autouse=True)
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))


@pytest.fixture
def engine(tiny_bundle: Path, in_cache: None) -> Engine:
    """Built by the first test, found by the others."""
    return build_engine(open_bundle(tiny_bundle), max_batch=4)


def test_every_memory_layer_is_a_plugin(engine: Engine) -> None:
    assert (engine.plugins, engine.bodies) == (2, 0)


def test_it_is_built_once(engine: Engine, tiny_bundle: Path) -> None:
    said: list[str] = []
    assert build_engine(open_bundle(tiny_bundle), max_batch=4, report=said.append) == engine
    assert said == [f"{engine.path}: built before"]


def test_the_goldens_are_reproduced(engine: Engine, tiny_bundle: Path) -> None:
    report = tr.verify(tiny_bundle, backend="tensorrt")
    assert report.passed, report.lines()


def test_a_stream_is_the_same_however_it_is_cut(engine: Engine, tiny_bundle: Path) -> None:
    """Prefill over several segments, decoding past the recording, and a batch: against ONNX Runtime."""
    results = []
    for backend in ("onnxruntime", "tensorrt"):
        model = tr.load(tiny_bundle, backend=backend)
        session, other = model.session(edit=1.0, editor=None), model.session(edit=0.0, editor=None)
        seen = [
            session.append(TEXT),
            *(session.append([token]) for token in TEXT[:8]),
            session.append(TEXT[:33]),
        ]
        with model.batch([session, other]) as batch:
            seen += batch.append([TEXT[:20], TEXT[:20]])
        results.append((np.concatenate(seen), session.snapshot().arrays))
    (expected, state), (actual, there) = results
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
    for name, array in state.items():
        assert np.allclose(there[name], array, rtol=1e-3, atol=1e-3 * np.abs(array).max()), name


def test_it_runs_without_the_plugins_python(engine: Engine, tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""The runtime on PyTorch's formats: the same sessions, memories that go from one backend to the other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import titans_runtime as tr
from titans_runtime.cli import main

TEXT = b"def f(x):\n    return [y * y for y in x if y % 2]\n" * 3


COMPILED = pytest.mark.suite("aoti")
BACKENDS = ["torchscript", pytest.param("aoti", marks=COMPILED)]


@pytest.fixture(scope="module")
def bundles(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    fixtures = {"torchscript": "twin_bundle", "aoti": "compiled_bundle"}
    return lambda name: request.getfixturevalue(fixtures[name])


@pytest.fixture(scope="module", params=BACKENDS)
def models(request: pytest.FixtureRequest, bundles: Callable[[str], Path]) -> dict[str, tr.Model]:
    bundle = bundles(request.param)
    return {name: tr.load(bundle, threads=1, backend=name) for name in ("onnxruntime", request.param)}


OBJECTIVES = ["readout", "prediction", "association"]


@pytest.mark.parametrize(
    "editor", [*(tr.Editor(objective=name, step=0.1, chunk=4) for name in OBJECTIVES), None]
)
def test_a_stream_is_scored_alike(models: dict[str, tr.Model], editor: tr.Editor | None) -> None:
    first, second = (model.session(edit=0.7, editor=editor) for model in models.values())
    for part in (TEXT[:50], TEXT[50:51], TEXT[51:]):
        assert_close(second.append(part), first.append(part))
    expected = first.snapshot().arrays
    for name, array in second.snapshot().arrays.items():
        assert_close(array, expected[name])


@pytest.mark.parametrize("ways", [(0, 1), (1, 0)])
def test_a_memory_goes_on_in_the_other_backend(
    models: dict[str, tr.Model], ways: tuple[int, int], tmp_path: Path
) -> None:
    here, there = ([*models.values()][place] for place in ways)
    continue_elsewhere(here, there, tmp_path)


@COMPILED
def test_a_memory_goes_from_one_format_of_pytorch_to_the_other(compiled_bundle: Path, tmp_path: Path) -> None:
    script, compiled = (tr.load(compiled_bundle, threads=1, backend=name) for name in ("torchscript", "aoti"))
    continue_elsewhere(script, compiled, tmp_path / "there")
    continue_elsewhere(compiled, script, tmp_path / "back")


def continue_elsewhere(here: tr.Model, there: tr.Model, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    session = here.session()
    session.append(TEXT[:61])
    session.save(folder / "memory")
    other = there.load_session(folder / "memory")
    expected, found = session.append(TEXT[61:]), other.append(TEXT[61:])
    assert float(np.abs(found - expected).max()) <= 1e-5 * float(np.abs(expected).max())
    assert list(session.generate(8, seed=3)) == list(other.generate(8, seed=3))


def test_snapshots_batches_and_observing(models: dict[str, tr.Model]) -> None:
    reference, model = models.values()
    session = model.session()
    session.append(TEXT[:40])
    mark, twin = session.snapshot(), session.fork()
    expected = session.append(TEXT[40:70])
    session.restore(mark)
    assert np.array_equal(session.append(TEXT[40:70]), expected)
    with model.batch([twin, model.session(edit=0.0, editor=None)]) as batch:
        together, _ = batch.append([TEXT[40:70], TEXT[:9]])
    assert_close(together, expected)
    report = model.session(editor=None).observe(TEXT, editor=tr.Editor(step=0.5))
    other = reference.session(editor=None).observe(TEXT, editor=tr.Editor(step=0.5))
    assert report.updates == other.updates > 0
    assert abs(report.loss - other.loss) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command_line_knows_it(
    backend: str, bundles: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, file = str(bundles(backend)), tmp_path / "text"
    file.write_bytes(TEXT)
    assert main(["verify", bundle, "--backend", backend]) == 0
    assert "PASSED" in capsys.readouterr().out
    assert main(["run", bundle, str(file), "--backend", backend]) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    peer = f"bundle-{backend}"
    assert main(["bench", bundle, "--backend", peer, "-p", "20", "-n", "3", "-o", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {row["backend"] for row in content["rows"]} == {"onnxruntime", peer}


@pytest.mark.parametrize("backend", ["torchscript", "aoti"])
def test_a_bundle_without_the_format_says_what_to_do(
    backend: str, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny_bundle), "--backend", backend]) == 3
    assert f"--format {backend}" in capsys.readouterr().err


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_altered_file_is_refused(backend: str, bundles: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles(backend), bundle)
    (file,) = (bundle / backend).glob("model.*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(tr.BundleError, match="altered"):
        tr.load(bundle, backend=backend)


def test_wrong_requests(twin_bundle: Path) -> None:
    with pytest.raises(tr.UsageError, match="unknown"):
        tr.load(twin_bundle, backend="tensorflow")
    with pytest.raises(tr.UsageError, match="providers"):
        tr.load(twin_bundle, providers=["CPUExecutionProvider"], backend="torchscript")


@pytest.mark.parametrize("backend", ["torchscript", "aoti"])
def test_without_torch_one_line_says_what_to_install(backend: str, twin_bundle: Path) -> None:
    program = (
        "import importlib.metadata, sys; sys.modules['torch'] = None\n"
        "from titans_runtime import cli; cli.entry_points = lambda **_: []\n"  # nor titans-export
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "verify", str(twin_bundle), "--backend", backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "pip install 'titans-runtime[torch]'" in done.stderr


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    scale = max(float(np.abs(expected).max()), 1e-6)
    assert float(np.abs(found - expected).max()) <= 1e-4 * scale

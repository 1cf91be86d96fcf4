"""The runtime on TorchScript: the same sessions, memories that go from one backend to the other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import titans_runtime as tr
from titans_runtime.cli import main

TEXT = b"def f(x):\n    return [y * y for y in x if y % 2]\n" * 3


@pytest.fixture(scope="module")
def models(twin_bundle: Path) -> dict[str, tr.Model]:
    return {name: tr.load(twin_bundle, threads=1, backend=name) for name in ("onnxruntime", "torchscript")}


@pytest.mark.parametrize("editor", [tr.Editor(step=0.5, chunk=4), None])
def test_a_stream_is_scored_alike(models: dict[str, tr.Model], editor: tr.Editor | None) -> None:
    first, second = (model.session(edit=0.7, editor=editor) for model in models.values())
    for part in (TEXT[:50], TEXT[50:51], TEXT[51:]):
        assert_close(second.append(part), first.append(part))
    expected = first.snapshot().arrays
    for name, array in second.snapshot().arrays.items():
        assert_close(array, expected[name])


@pytest.mark.parametrize("there", ["onnxruntime", "torchscript"])
def test_a_memory_goes_on_in_the_other_backend(
    models: dict[str, tr.Model], there: str, tmp_path: Path
) -> None:
    (here,) = models.keys() - {there}
    session = models[here].session()
    session.append(TEXT[:61])
    session.save(tmp_path / "memory")
    other = models[there].load_session(tmp_path / "memory")
    expected, found = session.append(TEXT[61:]), other.append(TEXT[61:])
    assert float(np.abs(found - expected).max()) <= 1e-5 * float(np.abs(expected).max())
    assert list(session.generate(8, seed=3)) == list(other.generate(8, seed=3))


def test_snapshots_batches_and_observing(models: dict[str, tr.Model]) -> None:
    model = models["torchscript"]
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
    other = models["onnxruntime"].session(editor=None).observe(TEXT, editor=tr.Editor(step=0.5))
    assert report.updates == other.updates > 0
    assert abs(report.loss - other.loss) < 1e-4


def test_the_command_line_knows_it(
    twin_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text"
    file.write_bytes(TEXT)
    assert main(["verify", str(twin_bundle), "--backend", "torchscript"]) == 0
    assert "PASSED" in capsys.readouterr().out
    assert main(["run", str(twin_bundle), str(file), "--backend", "torchscript"]) == 0
    assert "bits_per_byte" in capsys.readouterr().out


def test_a_bundle_without_the_format_says_what_to_do(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny_bundle), "--backend", "torchscript"]) == 3
    assert "--format torchscript" in capsys.readouterr().err


def test_an_altered_file_is_refused(twin_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(twin_bundle, bundle)
    file = bundle / "torchscript" / "model.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(tr.BundleError, match="altered"):
        tr.load(bundle, backend="torchscript")


def test_wrong_requests(twin_bundle: Path) -> None:
    with pytest.raises(tr.UsageError, match="unknown"):
        tr.load(twin_bundle, backend="tensorflow")
    with pytest.raises(tr.UsageError, match="providers"):
        tr.load(twin_bundle, providers=["CPUExecutionProvider"], backend="torchscript")


def test_without_torch_one_line_says_what_to_install(twin_bundle: Path) -> None:
    program = (
        "import importlib.metadata, sys; sys.modules['torch'] = None\n"
        "from titans_runtime import cli; cli.entry_points = lambda **_: []\n"  # nor titans-export
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "verify", str(twin_bundle), "--backend", "torchscript"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "pip install 'titans-runtime[torch]'" in done.stderr


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    scale = max(float(np.abs(expected).max()), 1e-6)
    assert float(np.abs(found - expected).max()) <= 1e-4 * scale

"""Other hosts score a file as this runtime does: C++ on libtorch, Node.js on ONNX Runtime."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import titans_runtime as tr

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TEXT = (ROOT / "titans_export" / "layers.py").read_bytes()[:1501]  # of no whole number of periods


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text"
    file.write_bytes(TEXT)
    return file


@pytest.fixture(scope="module")
def libtorch(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if not shutil.which("cmake") or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("needs cmake and a C++ compiler")
    import torch

    build = tmp_path_factory.mktemp("libtorch")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    run("cmake", "-S", str(EXAMPLES / "libtorch"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", prefix)
    run("cmake", "--build", str(build))
    return [str(build / "titans_stream")]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "stream.mjs"):
        shutil.copy(EXAMPLES / "node" / name, folder)
    done = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"npm cannot install onnxruntime-node here: {done.stderr[-200:]}")
    return ["node", str(folder / "stream.mjs")]


@pytest.mark.suite("native")
@pytest.mark.parametrize("editing", [True, False])
@pytest.mark.parametrize("host", ["libtorch", "node"])
def test_scores_as_the_runtime_does(
    host: str, editing: bool, text: Path, twin_bundle: Path, request: pytest.FixtureRequest
) -> None:
    command: list[str] = request.getfixturevalue(host)
    model = tr.load(twin_bundle, threads=1)
    session = model.session() if editing else model.session(edit=0.0, editor=None)
    expected = tr.score(session, TEXT).bits_per_token
    options = [] if editing else ["--no-edit"]
    printed = run(*command, str(twin_bundle), str(text), *options)
    assert abs(float(printed.split()[-1]) - expected) < 1e-4


@pytest.mark.suite("native")
@pytest.mark.parametrize("host", ["libtorch", "node"])
def test_memories_that_do_not_begin_at_zero(
    host: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from tests.end_to_end.family import export_member
    from titans_export.pipeline import export_bundle

    command: list[str] = request.getfixturevalue(host)
    export_member("mac: MLP of depth 2, period 4", "float32", tmp_path)
    export_bundle(tmp_path / "checkpoint", tmp_path / "twin", formats=["torchscript"])
    expected = tr.score(tr.load(tmp_path / "twin", threads=1).session(), TEXT).bits_per_token
    printed = run(*command, str(tmp_path / "twin"), str(text))
    assert abs(float(printed.split()[-1]) - expected) < 1e-4


@pytest.mark.suite("native")
@pytest.mark.parametrize("host", ["libtorch", "node"])
def test_mistakes_are_one_line(
    host: str, twin_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    command: list[str] = request.getfixturevalue(host)
    for arguments, code in (([], 2), ([str(twin_bundle), str(tmp_path / "none")], 3)):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert done.stderr.count("\n") == 1


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout

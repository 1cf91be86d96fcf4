"""Our calls of TensorRT against the signatures of the real module: what mypy can say without a GPU.

`make suite NAME=tensorrt-cpu`.
"""

from __future__ import annotations

import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.titans_converters.tensorrt.nvidia import full_bindings, package, write_stubs

pytestmark = pytest.mark.suite("tensorrt-cpu")

CALLERS = (
    "converters/titans_converters/tensorrt/builder.py",
    "runtime/titans_runtime/backends/tensorrt.py",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For mypy, with the types of the real module."""
    folder = tmp_path_factory.mktemp("stubs")
    stubs = folder / "stubs"
    write_stubs(stubs, full_bindings(folder / "bindings"))
    return os.environ | {"MYPYPATH": os.pathsep.join([str(stubs), "converters", "runtime"])}


def _mypy(environment: dict[str, str], cache: Path, *files: str) -> list[str]:
    """What mypy has to say of our files; of the stubs, which are what they are, nothing."""
    options = [
        "--config-file=",
        "--ignore-missing-imports",
        f"--cache-dir={cache}",
        "--explicit-package-bases",
    ]
    command = [sys.executable, "-m", "mypy", *options, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if line.startswith(files) and ": error: " in line]


def test_every_call_has_the_real_signature(environment: dict[str, str], tmp_path: Path) -> None:
    assert _mypy(environment, tmp_path, *CALLERS) == []


def test_every_name_of_cuda_exists() -> None:
    """NVIDIA's bindings for CUDA are compiled and have no signatures to read, but names."""
    package("cuda.bindings")
    from cuda.bindings import runtime

    source = Path("runtime/titans_runtime/backends/cuda.py").read_text(encoding="utf-8")
    names = set(re.findall(r'"(cuda\w+)"', source)) | set(re.findall(r"_runtime\.(cuda[\w.]+)", source))
    assert len(names) > 10
    for name in names - {"cuda.bindings.runtime"}:
        operator.attrgetter(name)(runtime)


def test_a_call_that_does_not_exist_is_found(environment: dict[str, str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import tensorrt as trt\n"
        "def build(builder: trt.Builder, context: trt.IExecutionContext) -> None:\n"
        "    builder.build_cuda_engine()\n"
        '    context.set_tensor_address("x")\n'
    )
    assert len(_mypy(environment, tmp_path / "cache", str(wrong))) == 2

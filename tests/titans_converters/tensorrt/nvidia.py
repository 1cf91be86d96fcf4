"""NVIDIA's Python modules on a machine without a GPU, in subprocesses: what they need on the loader's path.

The full bindings of TensorRT find the lean runtime in place of the full library, and a stub, compiled here,
for the entry points that it lacks: a builder cannot be made, all else works. TensorRT-RTX comes whole.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_STUB = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 1; }
"""
# The bindings call themselves `tensorrt` within, and their distribution's front end is not installable here.
_FRONT_END = "import sys, tensorrt_bindings\nsys.modules['tensorrt'] = tensorrt_bindings\n"


def full_bindings(folder: Path) -> dict[str, str]:
    """Environment in which ``import tensorrt`` gives the full bindings."""
    libraries, modules = folder / "lib", folder / "python" / "tensorrt"
    libraries.mkdir(parents=True)
    modules.mkdir(parents=True)
    (modules / "__init__.py").write_text(_FRONT_END)
    (folder / "stub.c").write_text(_STUB)
    stub = libraries / "libstub.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(stub), str(folder / "stub.c")], check=True)
    for name in ("libnvonnxparser.so.11", "libnvinfer_plugin.so.11"):
        (libraries / name).symlink_to(stub)
    (libraries / "libnvinfer.so.11").symlink_to(package("tensorrt_lean_libs") / "libnvinfer_lean.so.11")
    package("tensorrt_bindings")
    paths = os.pathsep.join([str(modules.parent), str(Path.cwd())])
    return os.environ | {"LD_LIBRARY_PATH": str(libraries), "LD_PRELOAD": str(stub), "PYTHONPATH": paths}


def write_stubs(folder: Path, environment: dict[str, str]) -> None:
    """Types of the module ``tensorrt``, read off the real one, which comes without."""
    extension = "tensorrt_bindings.tensorrt"
    command = [
        Path(sys.executable).with_name("stubgen"),
        "-q",
        "--inspect-mode",
        "-m",
        extension,
        "-o",
        folder,
    ]
    subprocess.run([str(part) for part in command], env=environment, check=True)
    text = (folder / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    # Within the module `bool` is a data type of TensorRT; and some signatures are no Python.
    text = re.sub(r"(->|:) bool\b", r"\1 builtins.bool", text.replace(f"{extension}.", ""))
    lines = [line if _is_python(line) else _anything(line) for line in text.splitlines()]
    lines += ["import builtins", "__version__: str", "def nptype(trt_type: DataType) -> type: ..."]
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.pyi").write_text("\n".join(lines) + "\n")
    (folder / "tensorrt" / "plugin.pyi").write_text("def __getattr__(name: str) -> object: ...\n")


def _is_python(line: str) -> bool:
    try:
        ast.parse(line.strip())
    except SyntaxError:
        return "def " not in line
    return True


def _anything(line: str) -> str:
    indent, name = re.match(r"(\s*)def (\w+)", line).groups()  # type: ignore[union-attr]
    return f"{indent}def {name}(*args: object, **kwargs: object) -> object: ..."


def rtx(folder: Path) -> dict[str, str]:
    """Environment in which ``import tensorrt_rtx_bindings`` finds its libraries."""
    found = package("onnxruntime_ep_nv_tensorrt_rtx")
    package("tensorrt_rtx_bindings")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1", "libcudart.so.13"):
        (library,) = found.glob(f"{name}.*")
        (folder / name).symlink_to(library)
    return os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(Path.cwd())}


def package(name: str) -> Path:
    """Folder of a package that the suite needs."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        requirements = Path(__file__).with_name("requirements.txt").relative_to(Path.cwd())
        pytest.fail(f"{name} is not installed; pip install --no-deps -r {requirements}")
    return Path(spec.origin).parent


def run_json(
    module: str, *arguments: str | Path, environment: dict[str, str], timeout: int = 900
) -> dict[str, Any]:
    """The last line that ``python -m module`` prints, as JSON; a crash is the caller's failure."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0, f"exited {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

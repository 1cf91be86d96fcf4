"""titans_runtime ← titans_converters ← titans_export: no import goes the other way."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PACKAGES = {
    "titans_runtime": ROOT / "runtime" / "titans_runtime",
    "titans_converters": ROOT / "converters" / "titans_converters",
    "titans_export": ROOT / "titans_export",
}
NOT_SHIPPED = {"benchmarks", "tests"}
FORBIDDEN = {
    "titans_runtime": NOT_SHIPPED
    | {"onnx", "onnx_ir", "onnxscript", "titans_converters", "titans_export", "torch"},
    "titans_converters": NOT_SHIPPED | {"titans_export"},
    "titans_export": NOT_SHIPPED,
}
# Files that may import a forbidden package inside a function, for a user who asks for that backend.
ONLY_WHEN_ASKED = {"titans_runtime/backends/torchscript.py": {"torch"}}


def imports(tree: ast.AST, *, in_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Yield ``(top-level package, line, inside a function?)`` of every import below ``tree``."""
    for node in ast.iter_child_nodes(tree):
        for name in imported_names(node):
            yield name.partition(".")[0], node.lineno, in_function
        inner = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, in_function=inner)


def imported_names(node: ast.AST) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom(module=str(module), level=0):
            return [module]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(module)), *_],
        ):
            return [module]
    return []


def violations(package: str, path: str, source: str) -> list[str]:
    when_asked = ONLY_WHEN_ASKED.get(path, set())
    return [
        f"{path}:{line} imports {name}"
        for name, line, in_function in imports(ast.parse(source))
        if name in FORBIDDEN[package] and not (in_function and name in when_asked)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_goes_upwards(package: str) -> None:
    folder = PACKAGES[package]
    files = sorted(folder.rglob("*.py"))
    assert files, f"no source in {folder}"
    found = [
        violation
        for file in files
        for violation in violations(
            package, file.relative_to(folder.parent).as_posix(), file.read_text(encoding="utf-8")
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "import numpy, torch.nn as nn",
        "from torch.nn import functional",
        "def late():\n    import torch",
        "class Late:\n    async def method(self):\n        from torch import Tensor",
        "if TYPE_CHECKING:\n    import torch",
        "torch = importlib.import_module('torch.nn')",
        "torch = __import__('torch')",
    ],
)
def test_every_form_of_import_is_seen(source: str) -> None:
    assert violations("titans_runtime", "titans_runtime/session.py", source)


def test_a_torch_backend_imports_torch_in_a_function_only() -> None:
    backend = "titans_runtime/backends/torchscript.py"
    assert not violations("titans_runtime", backend, "def load():\n    import torch")
    assert violations("titans_runtime", backend, "import torch")
    assert violations("titans_runtime", backend, "def load():\n    import onnx")


def test_importing_the_runtime_loads_neither_torch_nor_onnx() -> None:
    program = "import json, sys, titans_runtime; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "titans_runtime" in loaded
    assert not loaded & FORBIDDEN["titans_runtime"]

"""Nothing is unpickled, and nothing is executed but what a bundle's graphs say."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Any

import pytest

import titans_runtime as tr
from tests.runtime.bad_input.support import FILES, Trap
from tests.runtime.streams import change_manifest

RUNTIME = Path(tr.__file__).parent


@pytest.mark.parametrize("name", [*FILES, "titans.json"])
def test_no_file_of_a_bundle_is_unpickled(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).write_bytes(pickle.dumps(Trap()))
    if name != "titans.json":
        change_manifest(bundle_copy, lambda content: None, rehash=True)
    with pytest.raises(tr.BundleError):
        tr.verify(bundle_copy)


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_no_torchscript_file_is_unpickled(bundle_copy: Path, form: str) -> None:
    """TorchScript has an archive of its own, in which a pickle may name nothing of Python."""
    import torch

    path = bundle_copy / "model.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    else:
        torch.save(Trap(), path)

    def offer(content: dict[str, Any]) -> None:
        content["graphs"]["model"]["formats"] = {"torchscript": "model.pt"}
        content["files"]["model.pt"] = {}

    change_manifest(bundle_copy, offer, rehash=True)
    with pytest.raises(tr.BundleError, match=r"model\.pt: cannot be loaded"):
        tr.load(bundle_copy, backend="torchscript")


def test_the_runtime_has_nothing_to_execute_or_unpickle_with() -> None:
    forbidden_modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}
    forbidden_calls = {"eval", "exec", "compile"}
    for path in RUNTIME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden_modules & {name.partition(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                assert function not in forbidden_calls, f"{path}:{node.lineno}"
                assert function not in ("np.load", "numpy.load", "torch.load"), f"{path}:{node.lineno}"

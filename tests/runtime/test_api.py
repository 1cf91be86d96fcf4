"""The public face: its names, their documentation, and what importing it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest

import titans_runtime as tr


def test_public_names_exist_in_order() -> None:
    assert list(tr.__all__) == sorted(tr.__all__)
    for name in tr.__all__:
        assert hasattr(tr, name), name


def test_nothing_public_is_missing_from_all() -> None:
    found = {
        name
        for name, value in vars(tr).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
    }
    assert found == set(tr.__all__)


def test_public_names_and_their_methods_are_documented() -> None:
    for name in tr.__all__:
        value = getattr(tr, name)
        assert inspect.getdoc(value), name
        assert not (inspect.getdoc(value) or "").startswith(f"{name}("), f"{name} has a generated docstring"
        if inspect.isclass(value):
            for member, method in inspect.getmembers(value, inspect.isfunction):
                if not member.startswith("_") and method.__module__.startswith("titans_runtime"):
                    assert inspect.getdoc(method), f"{name}.{member}"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (tr.TitansError, 1),
        (tr.CheckFailed, 1),
        (tr.ConflictError, 1),
        (tr.NumericsError, 1),
        (tr.UsageError, 2),
        (tr.DataError, 3),
        (tr.BundleError, 3),
        (tr.StateError, 3),
        (tr.TokenError, 3),
        (tr.EnvironmentProblem, 4),
        (tr.OverloadError, 4),
    ],
)
def test_every_error_is_of_one_tree_and_has_its_exit_code(error: type[tr.TitansError], code: int) -> None:
    assert issubclass(error, tr.TitansError)
    assert error.exit_code == code


def test_every_public_error_has_been_listed_above() -> None:
    errors = [
        name
        for name in tr.__all__
        if inspect.isclass(getattr(tr, name)) and issubclass(getattr(tr, name), Exception)
    ]
    assert len(errors) == 11


def test_the_version_is_that_of_the_distribution() -> None:
    assert tr.__version__ == version("titans-runtime")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import titans_runtime",
            {"torch", "onnx", "onnxscript", "titans_export", "titans_converters", "tqdm"},
        ),
        ("import titans_runtime.cli", {"torch", "onnx", "onnxruntime", "titans_export"}),
    ],
)
def test_importing_brings_no_package_of_the_export_side(statement: str, absent: set[str]) -> None:
    program = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    loaded = set(output.stdout.split())
    assert "titans_runtime" in loaded
    assert not loaded & absent

"""The wheels, as a user gets them; the runtime's in an environment that has nothing else."""

import email
import os
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "titans_runtime": ROOT / "runtime",
    "titans_converters": ROOT / "converters",
    "titans_export": ROOT,
}
ABSENT = ("onnx", "onnxscript", "titans_converters", "titans_export", "torch")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, with no path of this process's Python in its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip_wheel, "--wheel-dir", folder, *FOLDERS.values(), cwd=folder)
    built = {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}
    assert built.keys() == FOLDERS.keys()
    return built


@pytest.fixture(scope="session")
def clean_python(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that holds the runtime with its extra `cpu`, and no pip."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    constraints = ROOT / "constraints.txt"
    run(*pip, "install", "--quiet", "-c", constraints, f"{wheels['titans_runtime']}[cpu]", cwd=folder)
    return python


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def requirements(wheel: Path, extra: str | None = None) -> set[str]:
    """Names that a wheel requires by itself, or those that one extra adds."""
    every = map(Requirement, metadata(wheel).get_all("Requires-Dist", []))
    if extra is None:
        return {one.name for one in every if one.marker is None}
    return {one.name for one in every if one.marker and one.marker.evaluate({"extra": extra})}


@pytest.mark.parametrize("package", FOLDERS)
def test_a_wheel_holds_its_package_and_nothing_else(wheels: dict[str, Path], package: str) -> None:
    with zipfile.ZipFile(wheels[package]) as archive:
        names = archive.namelist()
        (licence,) = (name for name in names if name.endswith("/licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    source = FOLDERS[package] / package
    expected = {
        path.relative_to(FOLDERS[package]).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    shipped = {name for name in names if ".dist-info/" not in name}
    if package == "titans_runtime":
        expected.add("titans_command.py")  # where the command begins, before the package is loaded
    assert shipped == expected
    assert f"{package}/py.typed" in shipped


def test_the_three_are_released_as_one_version(wheels: dict[str, Path]) -> None:
    assert len({metadata(wheel)["Version"] for wheel in wheels.values()}) == 1
    assert {metadata(wheel)["License-Expression"] for wheel in wheels.values()} == {"Apache-2.0"}


def test_the_runtime_requires_only_what_it_says(wheels: dict[str, Path]) -> None:
    runtime = wheels["titans_runtime"]
    assert requirements(runtime) == {"numpy", "safetensors"}
    assert requirements(runtime, "cpu") == {"onnxruntime"}
    assert requirements(runtime, "gpu") == {"onnxruntime-gpu"}


def test_the_floors_above_require_the_ones_below(wheels: dict[str, Path]) -> None:
    assert {"titans-runtime", "torch"} <= requirements(wheels["titans_converters"])
    assert {"titans-converters", "titans-runtime", "torch"} <= requirements(wheels["titans_export"])


def test_the_runtime_imports_where_nothing_else_is(clean_python: Path, tmp_path: Path) -> None:
    program = f"""
import importlib.util, titans_runtime
print(titans_runtime.__file__)
print([name for name in {ABSENT!r} if importlib.util.find_spec(name)])
"""
    where, present = run(clean_python, "-c", program, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(clean_python.parents[1])
    assert present == "[]"


def test_the_command_helps_where_nothing_else_is(clean_python: Path, tmp_path: Path) -> None:
    assert "generate" in run(clean_python.with_name("titans"), "--help", cwd=tmp_path)


def test_a_bundle_generates_where_nothing_else_is(clean_python: Path, tiny_bundle: Path) -> None:
    bundle_smoke(clean_python, tiny_bundle)


def bundle_smoke(python: Path, bundle: Path) -> None:
    """Generate from ``bundle`` with the ``titans`` that is installed beside ``python``."""
    prompt = "the memory"
    output = run(python.with_name("titans"), "generate", bundle, "--prompt", prompt, cwd=python.parent)
    assert output.strip() not in ("", prompt)

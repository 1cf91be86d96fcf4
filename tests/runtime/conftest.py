"""One loaded model for the whole folder, and a bundle that a test may harm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import titans_runtime as tr
from tests.runtime.command import TEXT, Outcome, Titans
from titans_runtime.cli import main


@pytest.fixture(scope="session")
def model(tiny_bundle: Path) -> tr.Model:
    return tr.load(tiny_bundle, threads=1)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def titans(capsys: pytest.CaptureFixture[str]) -> Titans:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path

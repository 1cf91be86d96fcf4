"""One loaded model for the whole folder, and a bundle that a test may harm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import titans_runtime as tr


@pytest.fixture(scope="session")
def model(tiny_bundle: Path) -> tr.Model:
    return tr.load(tiny_bundle, threads=1)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))

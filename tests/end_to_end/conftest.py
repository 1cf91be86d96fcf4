"""The shipped model, exported once for all end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from titans_export.pipeline import export_bundle

    folder = tmp_path_factory.mktemp("nano") / "bundle"
    export_bundle(ROOT / "checkpoints" / "nano", folder)
    return folder

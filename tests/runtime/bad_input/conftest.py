"""The command line, and a text to score."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.bad_input.support import TEXT, Titans
from titans_runtime.cli import main


@pytest.fixture
def titans(capsys: pytest.CaptureFixture[str]) -> Titans:
    """Runs a command that must fail; returns its code and its error."""

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        out, error = capsys.readouterr()
        assert code != 0
        assert out == ""
        assert 1 <= len(error.splitlines()) <= 2
        assert "Traceback" not in error
        return code, error

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path

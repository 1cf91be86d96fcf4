"""The commands that titans-export adds: what they cost the others, and how they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from titans_runtime.cli import main


@pytest.mark.parametrize("command", ["--version", "--help", "inspect"])
def test_a_command_that_needs_no_torch_does_not_load_it(tiny_bundle: Path, command: str) -> None:
    program = (
        "import sys; from titans_runtime.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*sorted(sys.modules), file=sys.stderr)"
    )
    arguments = [command, str(tiny_bundle)] if command == "inspect" else [command]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    loaded = set(done.stderr.split())
    assert done.returncode == 0, done.stderr
    assert "titans_export.cli" in loaded
    assert "torch" not in loaded


def _refused(command: str, options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    data = ["--data", str(folder)] if command == "train" else []
    assert main([command, *data, "--preset", "tiny", "--out", str(folder / "new"), *options]) == 2
    assert not (folder / "new").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", ["train", "init"])
@pytest.mark.parametrize("size", [10, 1000])
def test_text_is_bytes(command: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _refused(command, ["--set", f"vocab_size={size}"], tmp_path, capsys) == (
        f"titans: --set vocab_size={size}: text is bytes, so it must be 256; leave it out"
    )

"""The commands that titans-export adds: what they cost the others, and how they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


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

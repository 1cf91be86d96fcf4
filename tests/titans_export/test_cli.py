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


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("train", ["--seed", str(10**23)], f"--seed {10**23}: must be 9223372036854775807 or less"),
        ("init", ["--seed", str(10**23)], f"--seed {10**23}: must be 9223372036854775807 or less"),
        ("init", ["--seed", "-1"], "--seed -1: must be 0 or more"),
        ("train", ["--threads", "100000"], "threads is 100000; it must be an integer, 1 to 1024"),
        ("train", ["--steps", str(10**30)], f"--steps {10**30}: must be 1000000000 or less"),
        (
            "init",
            ["--set", f"layers={10**23}"],
            f"--set: config: layers is {10**23}; it must be 1024 or less",
        ),
    ],
)
def test_numbers_have_limits(
    command: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _refused(command, options, tmp_path, capsys) == f"titans: {message}"

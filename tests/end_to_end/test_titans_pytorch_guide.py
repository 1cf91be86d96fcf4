"""The guide for users of titans-pytorch, block by block, in an empty folder; trained for seconds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "titans-pytorch.md"
_BLOCK = re.compile(r"<!-- executed by [^>]*-->\n```(python|sh)\n(.*?)```", re.DOTALL)


@pytest.mark.suite("titans-pytorch")
def test_the_guide_runs_as_it_stands(tmp_path: Path) -> None:
    blocks = _BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    assert [language for language, _ in blocks] == ["python", "sh", "python"]
    assert "time.monotonic() + 60" in blocks[0][1]
    for language, block in blocks:
        text = block.replace("time.monotonic() + 60", "time.monotonic() + 3")
        commands = [["-c", text]] if language == "python" else _titans(text)
        for command in commands:
            subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, timeout=900)
    assert (tmp_path / "user-7.memory").exists()


def _titans(text: str) -> list[list[str]]:
    words = [shlex.split(line) for line in text.splitlines() if line]
    assert all(command[0] == "titans" for command in words)
    return [["-m", "titans_runtime", *command[1:]] for command in words]

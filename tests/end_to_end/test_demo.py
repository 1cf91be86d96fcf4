"""The demo, shortened: every step of it runs, and says what it must say."""

from __future__ import annotations

from pathlib import Path

import pytest

import titans_export.demo as demo
from tests.end_to_end.conftest import ROOT
from titans_runtime.cli import main


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "_LIMIT", 2_048)
    monkeypatch.setattr(demo, "_FILES", 1)
    monkeypatch.setattr(demo, "_PREFILL", 32)
    monkeypatch.setattr(demo, "_DECODE", 4)
    monkeypatch.chdir(ROOT)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "PASSED" in printed
    assert "forbidden modules loaded in that process: none" in printed
    assert "bit for bit" in printed
    assert "eager / ours" in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 3
    error = capsys.readouterr().err
    assert error == (
        "titans: checkpoints/nano/training.json: no such checkpoint; "
        "run the demo in a checkout, or give --checkpoint\n"
    )

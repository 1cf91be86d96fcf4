"""What is timed beside autograd runs, and is compared before."""

from __future__ import annotations

from pathlib import Path

import pytest

import titans_runtime as tr
from benchmarks.latency import open_editor
from titans_export.training.checkpoint import load_checkpoint


def test_all_sides_run_and_every_row_is_a_ratio_of_them(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    model, exported = load_checkpoint(tiny_checkpoint), tr.load(tiny_bundle, threads=1)
    pairs = open_editor.sides(model, exported, tokens=8)
    rows = open_editor.timed(pairs, rounds=1)
    rows.append(open_editor.added(*open_editor.readout_sides(model, exported), rounds=1))
    assert [row["kind"] for row in rows] == [open_editor.GRADIENT, open_editor.LESSON, open_editor.READOUT]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["autograd_ms"] / row["ours_ms"])


def test_nothing_is_timed_where_the_sides_differ(
    tiny_checkpoint: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, exported = load_checkpoint(tiny_checkpoint), tr.load(tiny_bundle, threads=1)
    monkeypatch.setattr(open_editor, "STEP", 0.02)  # of one side only: the other's is in its editor by now
    editor = tr.Editor.parse("prediction:step=0.01,chunk=8")
    monkeypatch.setattr(open_editor.tr.Editor, "parse", lambda _: editor)
    with pytest.raises(SystemExit, match="differs by"):
        open_editor.sides(model, exported, tokens=8)

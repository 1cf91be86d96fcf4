"""``titans bench`` as a user runs it, on the tiny bundle. No time is asserted."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from titans_runtime.bench.options import TOLERANCES
from titans_runtime.cli import main

SHORT = ["-p", "12", "-n", "3"]


def test_json_has_machine_versions_rows_and_what_is_absent(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["bench", str(tiny_bundle), *SHORT, "-b", "1,2", "--backend", "singles,eager", "-o", "json"])
        == 0
    )
    content = json.loads(capsys.readouterr().out)
    rows = {(row["kind"], row["batch"], row["backend"]) for row in content["rows"]}
    assert rows == {
        (k, b, n) for k in ("prefill", "decode") for b in (1, 2) for n in ("onnxruntime", "singles")
    }
    for row in content["rows"]:
        assert row["seconds_per_token"] > 0
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["logits_error"] <= 1e-4
        assert len(row["ratios"]) == 5
    assert content["absent"] == [
        {
            "backend": "eager",
            "threads": 1,
            "state": "missing",
            "reason": "needs the PyTorch model; give --checkpoint DIR",
        }
    ]
    assert content["versions"]["onnxruntime"]
    assert content["machine"]["processor"]


def test_formats_are_written_beside_each_other(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ["bench", str(tiny_bundle), *SHORT, "-e", "0,1", "--out", str(tmp_path / "r.1"), "-o"]
    assert main([*arguments, "md,csv,json,plot"]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.1.csv").read_text("utf-8"))))
    assert [(row["kind"], row["edit"]) for row in rows] == [
        (kind, edit) for kind in ("prefill", "decode") for edit in ("0.0", "1.0")
    ]
    assert "| decode 3 | 1 | 1 | 0 | onnxruntime |" in (tmp_path / "r.1.md").read_text("utf-8")
    assert json.loads((tmp_path / "r.1.json").read_text("utf-8"))["absent"] == []
    assert (tmp_path / "r.1.png").read_bytes().startswith(b"\x89PNG")


def test_another_bundle_beside(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    assert main(["bench", str(tiny_bundle), "-p", "0", "-n", "3", "--beside", str(other), "-o", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["backend"] for row in rows] == ["onnxruntime", "other"]


@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_another_type_of_weights_beside(
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    weights: str,
) -> None:
    from titans_export.pipeline import export_bundle

    export_bundle(tiny_checkpoint, tmp_path / "other", weights=weights)
    arguments = ["bench", str(tiny_bundle), "-p", "12", "-n", "0", "-o", "json", "--beside"]
    arguments.append(str(tmp_path / "other"))
    assert main(arguments) == 0
    content = json.loads(capsys.readouterr().out)
    errors = {row["backend"]: row["logits_error"] for row in content["rows"]}
    assert errors["onnxruntime"] == 0
    assert 1e-4 < errors["other"] <= TOLERANCES[weights] / 2
    assert main([*arguments, "--tolerance", "1e-4"]) == 1
    assert "and may by 0.0001" in json.loads(capsys.readouterr().out)["absent"][0]["reason"]


def test_eager_agrees_and_other_weights_are_refused(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "bench",
        str(tiny_bundle),
        *SHORT,
        "--backend",
        "eager,eager-loop",
        "-o",
        "json",
        "--checkpoint",
    ]
    assert main([*arguments, str(tiny_checkpoint)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["rows"]) == 6
    assert content["absent"] == []
    assert main(["init", "--preset", "tiny", "--seed", "5", "--out", str(tmp_path / "other")]) == 0
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "other")]) == 1
    content = json.loads(capsys.readouterr().out)
    assert {(one["backend"], one["state"]) for one in content["absent"]} == {
        ("eager", "refused"),
        ("eager-loop", "refused"),
    }
    assert {row["backend"] for row in content["rows"]} == {"onnxruntime"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "egaer"], "unknown; there are"),
        (["-p", "x"], "expected numbers"),
        (["-t", "0"], "must be 1 or more"),
        (["-e", "2"], "between 0 and 1"),
        (["-r", "1"], "fewer than 5"),
        (["--tolerance", "nan"], "--tolerance nan: it must be a finite number, 0 or more"),
        (["--tolerance", "inf"], "--tolerance inf: it must be a finite number, 0 or more"),
        (["--tolerance=-1"], "--tolerance -1.0: it must be a finite number, 0 or more"),
        (["-p", "0", "-n", "0"], "nothing to time"),
        (["-o", "xml"], "unknown; there are md"),
        (["-o", "plot"], "give --out"),
        (["--out", "/no/where/at-all"], "no such folder"),
        (["--editor", "nothing:"], "cannot be edited by"),
    ],
)
def test_a_wrong_option_is_one_line(
    tiny_bundle: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny_bundle), *SHORT, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error

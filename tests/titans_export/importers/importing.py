"""``titans import titans-pytorch`` on a file that a test writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.titans_export.importers.cases import TRANSFORMER_BASE, TRANSFORMER_CASES
from titans_export.exportable import load_exportable
from titans_runtime.cli import main

Tensors = dict[str, Tensor]
TRANSFORMER_ARGUMENTS = TRANSFORMER_BASE | TRANSFORMER_CASES["long-term tokens"]


def import_file(
    folder: Path, content: object, arguments: object, *options: str, suffix: str = ".pt"
) -> tuple[int, Path]:
    file = folder / f"model{suffix}"
    if suffix == ".safetensors":
        assert isinstance(content, dict)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, file)
    else:
        torch.save(content, file)
    if arguments is not None:
        (folder / "model.json").write_text(json.dumps(arguments), encoding="utf-8")
    out = folder / "checkpoint"
    return main(["import", "titans-pytorch", str(file), "--out", str(out), *options]), out


def weights_of(folder: Path) -> Tensors:
    return load_exportable(folder).module.state_dict()


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, which is one line or two; notes before it are skipped."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("titans: ") or lines[-2].startswith("titans: ")
    return " ".join(lines)

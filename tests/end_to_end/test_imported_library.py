"""Exported bundles against titans-pytorch itself: its state dict imported, exported and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import titans_runtime as tr
from tests.titans_export.importers.cases import (
    MEMORY_BASE,
    MEMORY_CASES,
    TRANSFORMER_BASE,
    TRANSFORMER_CASES,
)
from tests.titans_export.importers.library import MEMORY, TRANSFORMER, library_model, parallel
from titans_export.pipeline import export_bundle
from titans_runtime.cli import main

pytest.importorskip("titans_pytorch")
pytestmark = pytest.mark.suite("titans-pytorch")

_SMALL = {"default_step_transform_max_lr": 0.1}  # else float32 of either side grows along the stream
_KWARGS = TRANSFORMER_BASE["neural_memory_kwargs"]
_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "three views": (MEMORY, MEMORY_CASES["three views"]),
    "spectral norm": (MEMORY, MEMORY_CASES["spectral norm"]),
    "spectral norm, chunks at once": (MEMORY, MEMORY_CASES["spectral norm"] | {"chunk_size": 16}),
    "gradient norm, SwiGLU": (MEMORY, MEMORY_CASES["gradient norm"] | MEMORY_CASES["SwiGLU"]),
    "gated transition, combined momentum": (
        MEMORY,
        MEMORY_CASES["gated transition"] | MEMORY_CASES["combined with surprise"] | _SMALL,
    ),
    "lookahead": (MEMORY, MEMORY_CASES["lookahead"] | _SMALL),
    "sliding window with long-term tokens": (
        TRANSFORMER,
        TRANSFORMER_CASES["sliding window with long-term tokens"],
    ),
    "segmented windows with long-term tokens": (
        TRANSFORMER,
        {
            "segment_len": 6,
            "num_longterm_mem_tokens": 3,
            "num_persist_mem_tokens": 2,
            "sliding_window_attn": False,
        }
        | {"neural_memory_kwargs": _KWARGS | _SMALL},
    ),
    "spectral norm in a transformer": (
        TRANSFORMER,
        {"neural_memory_kwargs": _KWARGS | _SMALL | {"spectral_norm_surprises": True}},
    ),
}


@pytest.mark.parametrize("case", _CASES)
def test_a_bundle_answers_as_the_library(case: str, tmp_path: Path) -> None:
    kind, special = _CASES[case]
    arguments = (MEMORY_BASE if kind == MEMORY else TRANSFORMER_BASE) | special
    theirs = library_model(kind, arguments)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps(arguments), encoding="utf-8")
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    assert main(["import", "titans-pytorch", str(tmp_path / "model.pt"), "--out", str(checkpoint)]) == 0
    export_bundle(checkpoint, bundle)

    generator = np.random.default_rng(0)
    if kind == TRANSFORMER:
        given = generator.integers(0, arguments["num_tokens"], 45)
        expected = parallel(theirs.double(), torch.tensor(given)[None])[0].numpy()
    else:
        width = arguments["dim"] * (3 if arguments.get("qkv_receives_diff_views") else 1)
        given = generator.standard_normal((45, width)).astype(np.float32)
        expected = parallel(theirs.double(), torch.tensor(given).double()[None])[0].numpy()
    session = tr.load(bundle, threads=1).session()
    found = np.concatenate([session.append(part) for part in np.split(given, [1, 6, 7, 20])])
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()

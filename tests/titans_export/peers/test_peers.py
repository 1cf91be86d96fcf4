"""Every backend computes what the runtime computes, and what the roofline counts is what must be moved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from titans_export.peers.roofline import moved_bytes, product_shapes
from titans_runtime.bench.peers import Job, find_loader
from titans_runtime.bundle import WEIGHTS_NAME, open_bundle
from titans_runtime.cli import main


def test_the_roofline_counts_weights_once_and_changing_state_twice(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    weights, vocab, width = manifest.files[WEIGHTS_NAME].size, 256, 32
    memories = 2 * (2 * 2 * 16 * 16)  # memory and momentum, 2 layers of 2 heads
    tails = 2 * 3 * 3 * 2 * 16  # 3 taps of query, key and value
    context = 8 * 7  # bytes: the past tokens of the longest hashed context
    readout = (width + 6) * vocab
    expected = weights - 4 * vocab * width + 4 * width + 2 * (4 * (memories + tails) + context) + 4 * readout
    assert moved_bytes(manifest, 1) == expected


def test_the_roofline_multiplies_by_every_matrix_but_the_embedding(tiny_checkpoint: Path) -> None:
    shapes = product_shapes(tiny_checkpoint)
    assert shapes.count((32, 64)) == 2  # feed-forward, up
    assert shapes.count((64, 32)) == 2
    assert (32, 256) in shapes  # the head
    assert (256, 32) not in shapes


@pytest.mark.parametrize("batch", [1, 3])
def test_the_roofline_runs_any_batch(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, batch: int
) -> None:
    runner = find_loader("roofline")(Job(tiny_bundle, tiny_checkpoint, 2, tmp_path))
    for tokens in (1, 5, 600):
        runner.start(batch, 1.0)
        assert len(runner.append(np.zeros((batch, tokens), np.int64))) == batch
    assert not runner.is_model
    runner.close()


@pytest.mark.suite("peers")
@pytest.mark.parametrize("backend", ["compile", "torchscript", "aoti", "openvino-torch", "naive"])
@pytest.mark.parametrize("preset", ["tiny", "deep"])
def test_compilers_compute_the_same(
    backend: str, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not installed is a failure here: the suite is for machines that have it all."""
    deep = ["memory_depth=2", "period=8", "learned_memory=true"] if preset == "deep" else []
    checkpoint, bundle = str(tmp_path / "checkpoint"), str(tmp_path / "bundle")
    settings = ["--set", *deep] if deep else []
    assert main(["init", "--preset", "tiny", "--out", checkpoint, *settings]) == 0
    assert main(["export", checkpoint, "--out", bundle]) == 0
    capsys.readouterr()
    arguments = ["bench", bundle, "--checkpoint", checkpoint, "--backend", backend, "-p", "20", "-n", "3"]
    assert main([*arguments, "-o", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["absent"] == []
    assert {row["backend"] for row in content["rows"]} == {"onnxruntime", backend}

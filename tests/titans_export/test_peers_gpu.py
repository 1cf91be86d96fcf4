"""Backends on a GPU: what can be said of them without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import titans_runtime as tr
from titans_export.peers import gpu
from titans_export.peers.eager import TorchRunner, open_model, step_of
from titans_runtime.bench import gpu as runtime_gpu
from titans_runtime.bench.peers import Job, find_loader, known_backends


@pytest.mark.parametrize("name", ["eager-cuda", "compile-cuda", "cudagraph"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_backend_is_missing_with_its_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(tr.EnvironmentProblem, match="can use no GPU here"):
        find_loader(name)(Job(tmp_path, tmp_path, 1, tmp_path))


def test_the_runtimes_own_are_known_and_say_what_they_lack(tiny_bundle: Path, tmp_path: Path) -> None:
    assert {"onnxruntime-cuda", "tensorrt"} <= set(known_backends())
    job = Job(tiny_bundle, None, 1, tmp_path)
    for load, words in (
        (runtime_gpu.load_cuda, "CUDAExecutionProvider"),
        (runtime_gpu.load_tensorrt, "tensorrt"),
    ):
        with pytest.raises(tr.EnvironmentProblem, match=words):
            load(job)


def test_state_stays_where_the_step_left_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A stand-in device: what is moved on a GPU is there already, and nothing else differs."""
    model = open_model(Job(tmp_path, tiny_checkpoint, 1, tmp_path))
    ids = np.frombuffer(b"the same tokens", np.uint8).astype(np.int64)[None]
    results = []
    for step in (step_of(model), gpu.on_device(step_of(model), torch.device("cpu"))):
        runner = TorchRunner(model, step)
        runner.start(batch=1, edit=1.0)
        results.append(np.concatenate([runner.append(ids), runner.append(ids[:, :1])], axis=1))
    assert np.array_equal(*results)

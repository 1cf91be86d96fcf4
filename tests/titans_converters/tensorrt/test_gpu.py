"""On a GPU, without TensorRT: the kernel's exact PTX, and ONNX Runtime's CUDA provider.

`make suite NAME=cuda` needs a PyTorch with CUDA for the first, onnxruntime-gpu in place of onnxruntime for
the second. It has not run yet: see `docs/tensorrt.md`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import titans_runtime as tr
from benchmarks.tensorrt.launch import Launcher
from benchmarks.tensorrt.run import make_inputs, worst_error
from titans_converters.tensorrt.aot import BLOCKS, KernelSizes, compile_kernel
from titans_export.memory import token_loop

pytestmark = pytest.mark.suite("cuda")

CUDA = "CUDAExecutionProvider"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 49, 512])
@pytest.mark.parametrize("repeated_keys", [False, True])
def test_the_ptx_equals_the_token_loop(block: int, tokens: int, repeated_keys: bool) -> None:
    inputs = make_inputs(2, 3, tokens, 64, "cuda")
    if repeated_keys:
        inputs[1] = inputs[1][:, :, :1].expand_as(inputs[1]).contiguous()
    outputs = [torch.full_like(inputs[index], torch.nan) for index in (2, -2, -1)]
    launch = Launcher(compile_kernel(KernelSizes(3, 64, 64, block)))
    addresses = ([tensor.data_ptr() for tensor in tensors] for tensors in (inputs, outputs))
    launch(next(addresses), tokens, next(addresses), 2, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    expected = token_loop(*(tensor.double() for tensor in inputs))
    assert worst_error(tuple(outputs), expected) <= 1e-4


def test_cuda_runs_all_of_the_model(tiny_bundle: Path) -> None:
    report = tr.verify(tiny_bundle, providers=[CUDA])
    assert report.passed, report.lines()
    placed = report.placements["model"]
    assert placed is not None
    assert placed[CUDA]["MatMul"] > 0


def test_state_stays_on_the_gpu(tiny_bundle: Path) -> None:
    results = []
    for providers in (["CPUExecutionProvider"], [CUDA]):
        session = tr.load(tiny_bundle, providers).session(edit=1.0, editor=None)
        results.append(
            np.concatenate([session.append(b"some text"), session.append(b"a"), session.append(b"b")])
        )
    assert np.abs(results[1] - results[0]).max() <= 1e-4 * np.abs(results[0]).max()

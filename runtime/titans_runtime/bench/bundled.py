"""The bundle's own files in PyTorch's formats, run by this runtime's sessions, to be timed."""

from __future__ import annotations

from titans_runtime.bench.onnxruntime import OnnxRuntimeRunner, Way
from titans_runtime.bench.peers import Job


def load_torchscript(job: Job) -> OnnxRuntimeRunner:
    """``titans run --backend torchscript``."""
    return OnnxRuntimeRunner(job, batched=True, way=Way(backend="torchscript", module="torch"))


def load_aoti(job: Job) -> OnnxRuntimeRunner:
    """``titans run --backend aoti``."""
    return OnnxRuntimeRunner(job, batched=True, way=Way(backend="aoti", module="torch"))

"""The bundle's own TorchScript files, run by this runtime's sessions, to be timed."""

from __future__ import annotations

from titans_runtime.bench.onnxruntime import OnnxRuntimeRunner, Way
from titans_runtime.bench.peers import Job


def load_torchscript(job: Job) -> OnnxRuntimeRunner:
    """``titans run --backend torchscript``."""
    return OnnxRuntimeRunner(job, batched=True, way=Way(backend="torchscript", module="torch"))

"""The bundle in this runtime on a GPU, to be timed: ONNX Runtime's CUDA provider, and TensorRT."""

from __future__ import annotations

from titans_runtime.bench.onnxruntime import OnnxRuntimeRunner, Way
from titans_runtime.bench.peers import Job


def load_cuda(job: Job) -> OnnxRuntimeRunner:
    """ONNX Runtime's CUDA provider, with all of the model on the GPU."""
    return OnnxRuntimeRunner(job, batched=True, way=Way(providers=("CUDAExecutionProvider",)))


def load_tensorrt(job: Job) -> OnnxRuntimeRunner:
    """The engine that ``titans engine`` has built, with the memory as a plugin."""
    return OnnxRuntimeRunner(job, batched=True, way=Way(backend="tensorrt", module="tensorrt"))

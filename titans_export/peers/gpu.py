"""The PyTorch model on a GPU, without TF32: ``eager-cuda``, ``compile-cuda`` and ``cudagraph``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from titans_export.model import State
from titans_export.peers.eager import Step, TorchRunner, open_model, step_of
from titans_export.peers.flat import ByShape, FlatModel, Tensors
from titans_runtime.bench.peers import Job
from titans_runtime.errors import EnvironmentProblem

_WARM_UP = 3  # calls before a recording, so that libraries have allocated what they need


def load_eager(job: Job) -> TorchRunner:
    """The tile form, operator by operator."""
    device = gpu()
    model = open_model(job).to(device)
    return TorchRunner(model, on_device(step_of(model), device), versions())


def load_compiled(job: Job) -> TorchRunner:
    """``torch.compile`` by Inductor, for each shape on its own."""
    device = gpu()
    model = open_model(job).to(device)
    flat = FlatModel(model).eval()
    torch._dynamo.reset()  # noqa: SLF001 - the only way
    call = torch.compile(flat, dynamic=False, fullgraph=True)
    return TorchRunner(model, on_device(flat.step(call), device), versions())


def load_cudagraph(job: Job) -> TorchRunner:
    """Each shape recorded once as a CUDA graph: no launch costs time on the host."""
    device = gpu()
    model = open_model(job).to(device)
    flat = FlatModel(model).eval()
    step = flat.step(ByShape(lambda arguments: record(flat, arguments)))
    return TorchRunner(model, on_device(step, device), versions())


def record(call: Callable[..., Tensors], arguments: Tensors) -> Callable[..., Tensors]:
    """A CUDA graph of ``call``. Its results are valid until the next launch."""
    static = tuple(tensor.clone() for tensor in arguments)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            call(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*static)

    def launch(*tensors: Tensor) -> Tensors:
        for place, tensor in zip(static, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return results

    return launch


def on_device(step: Step, device: torch.device) -> Step:
    """``step`` with tokens and logits on the host, and its state on ``device`` between calls."""

    def moved(ids: Tensor, edit: Tensor, state: State) -> tuple[Tensor, State]:
        there = {name: tensor.to(device) for name, tensor in state.items()}  # moves once, then stays
        logits, present = step(ids.to(device), edit.to(device), there)
        return logits.cpu(), there | present

    return moved


def gpu() -> torch.device:
    """The GPU, for products in full float32.

    Raises:
        EnvironmentProblem: this PyTorch can use none.
    """
    if not torch.cuda.is_available():
        raise EnvironmentProblem(f"PyTorch {torch.__version__} can use no GPU here; run where there is one")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


def versions() -> dict[str, str]:
    """What a report should name."""
    return {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name()}

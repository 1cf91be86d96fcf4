"""The model compiled by PyTorch: ``compile``, ``torchscript`` and ``aoti``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from titans_export.peers.eager import TorchRunner, open_model
from titans_export.peers.flat import ByShape, FlatModel, Tensors
from titans_runtime.bench.peers import Job
from titans_runtime.quiet import quiet

_INDUCTOR: dict[str, Any] = {
    "freezing": True
}  # weights as constants, laid out for their products: faster than without

_PROFILED = 3  # calls after which TorchScript has compiled what it has seen


def load(job: Job) -> TorchRunner:
    """``torch.compile`` by Inductor, for each shape on its own, weights frozen."""
    model = open_model(job)
    flat = FlatModel(model).eval()
    torch._dynamo.reset()  # noqa: SLF001 - the only way; code of other thread counts must not serve this one
    call = torch.compile(flat, dynamic=False, fullgraph=True, options=_INDUCTOR)
    return TorchRunner(model, flat.step(call))


def load_torchscript(job: Job) -> TorchRunner:
    """``torch.jit.trace`` for each shape, frozen and optimised for inference."""
    model = open_model(job)
    flat = FlatModel(model).eval()

    def make(arguments: Tensors) -> Callable[..., Tensors]:
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(flat, arguments, check_trace=False)
            made: Callable[..., Tensors] = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
            for _ in range(_PROFILED):
                made(*arguments)
        return made

    return TorchRunner(model, flat.step(ByShape(make)))


def load_aoti(job: Job) -> TorchRunner:
    """AOTInductor: a shared library for each shape, kept in the job's folder."""
    model = open_model(job)
    flat = FlatModel(model).eval()

    def make(arguments: Tensors) -> Callable[..., Tensors]:
        batch, tokens = arguments[0].shape
        path = job.work / f"aoti-{batch}x{tokens}-{job.threads}t.pt2"
        if not path.exists():
            with quiet(), torch.no_grad():
                program = torch.export.export(flat, arguments)
                torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - where PyTorch documents it
                    program, package_path=str(path), inductor_configs=_INDUCTOR
                )
        loaded = torch._inductor.aoti_load_package(str(path))  # noqa: SLF001
        return lambda *tensors: tuple(loaded(*tensors))

    return TorchRunner(model, flat.step(ByShape(make)))

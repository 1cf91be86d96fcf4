"""The backends by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from titans_runtime.errors import UsageError

if TYPE_CHECKING:
    from titans_runtime.backends import Backend
    from titans_runtime.bundle import Bundle

MAX_THREADS: Final = 1024
"""More than a machine has; far more hang ONNX Runtime, and crash PyTorch."""
BACKENDS: Final = ("onnxruntime", "torchscript", "aoti", "tensorrt")


def open_backend(
    name: str, bundle: Bundle, providers: Sequence[str] | None = None, threads: int | None = None
) -> Backend:
    """Load a bundle's model in a backend.

    Args:
        name: one of :data:`BACKENDS`.
        bundle: opened bundle.
        providers: of ONNX Runtime.
        threads: within an operator.

    Raises:
        UsageError: an unknown backend, providers for one that has none, or an impossible number of threads.
        EnvironmentProblem: a library or device that it needs is missing.
        BundleError: the bundle is damaged.
    """
    check_threads(threads)
    if name == "onnxruntime":
        from titans_runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, providers, threads)
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is unknown; there are {', '.join(BACKENDS)}")
    if providers is not None:
        raise UsageError(f"providers are ONNX Runtime's; backend {name!r} has none")
    if name == "torchscript":
        from titans_runtime.backends.torchscript import TorchScriptBackend

        return TorchScriptBackend(bundle, threads)
    if name == "aoti":
        from titans_runtime.backends.aot_inductor import AotInductorBackend

        return AotInductorBackend(bundle, threads)
    from titans_runtime.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(bundle, threads)


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that no backend can have.

    Raises:
        UsageError: it is no integer from 1 to :data:`MAX_THREADS`.
    """
    if threads is not None and not (type(threads) is int and 1 <= threads <= MAX_THREADS):
        raise UsageError(f"threads is {threads!r}; it must be an integer, 1 to {MAX_THREADS}")

"""The backends by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from titans_runtime.errors import UsageError

if TYPE_CHECKING:
    from titans_runtime.backends import Backend
    from titans_runtime.bundle import Bundle

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
        UsageError: an unknown backend, or providers for one that has none.
        EnvironmentProblem: a library or device that it needs is missing.
        BundleError: the bundle is damaged.
    """
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

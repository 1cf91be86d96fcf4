"""What a backend offers to be timed beside others, and where backends are found."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, Protocol

from titans_runtime.backends import Array
from titans_runtime.bench.options import REFERENCE
from titans_runtime.editor import Editor
from titans_runtime.errors import EnvironmentProblem, UsageError

GROUP: Final = "titans_runtime.peers"
"""Entry points of this group name a backend and its :data:`Loader`."""

_OWN = {
    REFERENCE: "titans_runtime.bench.onnxruntime:load",
    "singles": "titans_runtime.bench.onnxruntime:load_singles",
    "bundle-torchscript": "titans_runtime.bench.bundled:load_torchscript",
    "bundle-aoti": "titans_runtime.bench.bundled:load_aoti",
    "openvino": "titans_runtime.bench.openvino:load",
    "onnxruntime-cuda": "titans_runtime.bench.gpu:load_cuda",
    "tensorrt": "titans_runtime.bench.gpu:load_tensorrt",
}
_ELSEWHERE = dict.fromkeys(
    (
        "eager",
        "eager-loop",
        "compile",
        "torchscript",
        "aoti",
        "naive",
        "autograd",
        "openvino-torch",
        "roofline",
        "eager-cuda",
        "compile-cuda",
        "cudagraph",
    ),
    "titans-export",
)


@dataclass(frozen=True)
class Job:
    """What a backend is to run.

    Attributes:
        bundle: its folder.
        checkpoint: what the bundle was exported from, for backends that run the PyTorch model itself.
        threads: that the backend may use.
        work: a folder in which to keep what takes long to build. It belongs to this bundle.
        editor: what the streams learn by the open way, or None.
    """

    bundle: Path
    checkpoint: Path | None
    threads: int
    work: Path
    editor: Editor | None = None

    def needed_checkpoint(self) -> Path:
        """The checkpoint, for a backend that cannot do without.

        Raises:
            EnvironmentProblem: none was given, or an editor was, which only ONNX Runtime runs.
        """
        if self.checkpoint is None:
            raise EnvironmentProblem("needs the PyTorch model; give --checkpoint DIR")
        self.refuse_editor()
        return self.checkpoint

    def refuse_editor(self) -> None:
        """For a backend that has no open editor.

        Raises:
            EnvironmentProblem: an editor was given.
        """
        if self.editor is not None:
            raise EnvironmentProblem("has no open editor; leave --editor out")


class Runner(Protocol):
    """A loaded backend, ready to be timed.

    ``start`` is not timed, ``append`` is: one call with all tokens is a prefill, many calls with one
    token each are decoding. The first calls are not timed, so they may compile.
    """

    @property
    def versions(self) -> Mapping[str, str]:
        """Of the libraries that do the work, by name."""
        ...

    @property
    def is_model(self) -> bool:
        """Whether ``append`` returns logits, which are then compared before anything is timed."""
        ...

    def start(self, batch: int, edit: float) -> None:
        """Begin ``batch`` streams with empty memories, edited by the fused rule with strength ``edit``."""
        ...

    def append(self, ids: Array) -> Array:
        """Take ``ids (B, T)`` int64 and return logits ``(B, T, vocab)`` float32 in memory of the host."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


Loader = Callable[[Job], Runner]
"""Loads a backend, or raises: then it is listed as missing, with the reason."""


def known_backends() -> list[str]:
    """Names that can be asked for, those whose package is missing included."""
    return sorted({*_OWN, *_ELSEWHERE, *(point.name for point in entry_points(group=GROUP))})


def find_loader(name: str) -> Loader:
    """The loader of a backend.

    Raises:
        EnvironmentProblem: the package that brings it is not installed.
        UsageError: there is no backend of that name.
    """
    if name in _OWN:
        module, _, function = _OWN[name].partition(":")
        own: Loader = getattr(importlib.import_module(module), function)
        return own
    for point in entry_points(group=GROUP, name=name):
        loader: Loader = point.load()
        return loader
    if name in _ELSEWHERE:
        raise EnvironmentProblem(f"comes with {_ELSEWHERE[name]}, which is not installed or has none")
    raise UsageError(f"--backend {name}: unknown; there are {', '.join(known_backends())}")

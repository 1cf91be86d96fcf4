"""Versions of titans-pytorch: what a state dict tells of its own, and where their defaults differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from titans_export.importers.titans_pytorch.arguments import an_object, shown
from titans_export.importers.titans_pytorch.keys import MEMORY
from titans_export.importers.titans_pytorch.options import MemoryOptions, TransformerOptions
from titans_runtime.errors import UsageError

VERSIONS: dict[str, dict[str, Any]] = {
    "0.5.0": {},
    "0.5.1": {},
    "0.5.2": {"store_with_lookahead_value": True},
    "0.5.3": {},
    "0.5.5": {},
}
"""Their mathematics is one; defaults of ``NeuralMemory`` that a version has to itself."""


def read_options(kind: str, arguments: dict[str, Any], version: object) -> MemoryOptions | TransformerOptions:
    """Options of either class from the arguments that a version's constructor was given.

    Args:
        kind: the class.
        arguments: by name.
        version: as ``"0.5.5"``; None for any but those with defaults of their own.

    Raises:
        UsageError: the version is unknown, or an argument is not right.
    """
    if version is not None and (not isinstance(version, str) or version not in VERSIONS):
        raise UsageError(f"version is {shown(version)}; known: {', '.join(VERSIONS)}")
    defaults = VERSIONS[version] if isinstance(version, str) else {}
    if kind == MEMORY:
        return MemoryOptions.read(defaults | arguments)
    if defaults:
        rest = dict(arguments)
        own = an_object(rest, "neural_memory_kwargs", kind) or {}
        arguments = rest | {"neural_memory_kwargs": defaults | own}
    return TransformerOptions.read(arguments)


def told_version(keys: Iterable[str]) -> str | None:
    """What the keys tell: hyper-connections have been these since 0.5. None where there are none."""
    return ">=0.5" if any(key.endswith(".residual_scale") for key in keys) else None

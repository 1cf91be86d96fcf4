"""Versions of titans-pytorch: what a state dict tells of its own, and where their defaults differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

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

_OF_MEMORIES = ("0.3.25", *(f"0.4.{n}" for n in range(26) if n not in (13, 18)))
"""Releases whose ``NeuralMemory`` is that of 0.5.0; their transformers are not."""

_FLAT_CONNECTIONS = ("0.3.12", "0.3.14", "0.3.15", "0.3.16")
"""Releases of hyper-connections that compute what 0.4 does, and store a matrix without its first axis."""

_CONNECTIONS = (*_FLAT_CONNECTIONS, *(f"0.4.{n}" for n in range(12)))
_FLAT_KEY = ".dynamic_alpha_fn"


class Assumed(NamedTuple):
    """What neither keys nor arguments tell.

    Attributes:
        name: of the argument, or ``version``.
        value: that is taken.
        note: a line for the user.
    """

    name: str
    value: object
    note: str


def read_options(kind: str, arguments: dict[str, Any], version: object) -> MemoryOptions | TransformerOptions:
    """Options of either class from the arguments that a version's constructor was given.

    Args:
        kind: the class.
        arguments: by name.
        version: as ``"0.5.5"``; None for any but those with defaults of their own.

    Raises:
        UsageError: the version is unknown, or an argument is not right.
    """
    if version is not None:
        _check_version(kind, version)
    defaults = VERSIONS.get(version, {}) if isinstance(version, str) else {}
    if kind == MEMORY:
        return MemoryOptions.read(defaults | arguments)
    if defaults:
        rest = dict(arguments)
        own = an_object(rest, "neural_memory_kwargs", kind) or {}
        arguments = rest | {"neural_memory_kwargs": defaults | own}
    return TransformerOptions.read(arguments)


def _check_version(kind: str, version: object) -> None:
    earlier = _OF_MEMORIES if kind == MEMORY else ()
    if isinstance(version, str) and version in (*earlier, *VERSIONS):
        return
    span = f"{earlier[0]}, {earlier[1]} to {earlier[-1]}, " if earlier else ""
    raise UsageError(
        f"version is {shown(version)}; known for a {kind}: {span}{', '.join(VERSIONS)}"
        "; others may compute otherwise"
    )


def told_version(keys: Iterable[str]) -> str | None:
    """What the keys tell: hyper-connections have been these since 0.5. None where there are none."""
    return ">=0.5" if any(key.endswith(".residual_scale") for key in keys) else None


def assumptions(
    options: MemoryOptions | TransformerOptions, arguments: Mapping[str, Any], told: str | None
) -> list[Assumed]:
    """What is taken for granted where no version is stated.

    Args:
        options: read from ``arguments``.
        arguments: as they were given.
        told: see :func:`told_version`.
    """
    if isinstance(options, MemoryOptions):
        memory, given = options, arguments
    elif options.memory_layers:
        memory, given = options.memory, arguments.get("neural_memory_kwargs") or {}
    else:
        return []
    found = []
    if "store_with_lookahead_value" not in given:
        note = (
            "store_with_lookahead_value was true by default in 0.5.2 alone: taken as false; "
            'give it, or "version", with the arguments'
        )
        found.append(Assumed("store_with_lookahead_value", False, note))
    if memory.learned_momentum_combine and told is None:
        note = (
            "learned_momentum_combine was computed otherwise before 0.3.25: taken as since then; "
            'give "version" with the arguments'
        )
        found.append(Assumed("version", f">={_OF_MEMORIES[0]}", note))
    return found


def with_connections(tensors: Mapping[str, Tensor], stated: object) -> dict[str, Tensor]:
    """A transformer's state dict with its hyper-connections in the form of 0.4.

    Args:
        tensors: by the library's keys.
        stated: the release of hyper-connections that was installed; None where it is not known.

    Raises:
        UsageError: the release is unknown, or is not that of the file, or must be known and is not.
    """
    known = f"{', '.join(_FLAT_CONNECTIONS)}, 0.4.0 to {_CONNECTIONS[-1]}"
    if stated is not None and stated not in _CONNECTIONS:
        raise UsageError(
            f"hyper_connections is {shown(stated)}; known: {known}; others may compute otherwise"
        )
    forms = {name: tensor.dim() for name, tensor in tensors.items() if name.endswith(_FLAT_KEY)}
    flat = [name for name, axes in forms.items() if axes == 2]
    if flat and stated not in _FLAT_CONNECTIONS:
        raise UsageError(
            f"{shown(flat[0])} was trained with hyper-connections before 0.4, and 0.3.11 computes otherwise; "
            'give "hyper_connections" with the arguments, the release that was installed, if it is one of '
            f"{', '.join(_FLAT_CONNECTIONS)}"
        )
    if forms and not flat and stated in _FLAT_CONNECTIONS:
        raise UsageError(
            f"hyper_connections is {shown(stated)}, but the file's have the form of 0.4 and later"
        )
    return {name: tensor[None] if name in flat else tensor for name, tensor in tensors.items()}

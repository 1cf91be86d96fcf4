"""What an argument of titans-pytorch's classes may be: its kind and limits, asked before it is used.

Limits are far above any model of use. They keep products of sizes within 64 bits and a mistyped number from
costing the machine's memory before it is found not to fit the checkpoint.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

from titans_runtime.errors import UsageError

_KEY = 120
_WIDTH, _LAYERS, _PLACES = 2**16, 2**10, 2**16

INTEGERS: dict[str, tuple[int, int]] = {
    "dim": (1, _WIDTH),
    "dim_head": (1, _WIDTH),
    "heads": (1, 2**12),
    "chunk_size": (1, 2 * _PLACES),
    "neural_memory_segment_len": (1, 2 * _PLACES),
    "batch_size": (1, 2**31),
    "neural_memory_batch_size": (1, 2**31),
    "momentum_order": (1, 64),
    "num_kv_per_token": (1, 64),
    "num_tokens": (1, 2**24),
    "depth": (1, _LAYERS),
    "segment_len": (1, _PLACES),
    "num_longterm_mem_tokens": (0, _PLACES),
    "num_persist_mem_tokens": (0, _PLACES),
    "num_residual_streams": (1, _LAYERS),
    "k": (1, _WIDTH),
}
"""Smallest and largest value."""

NUMBERS: dict[str, tuple[float, float]] = {
    "ff_mult": (1e-3, 64),
    "expansion_factor": (1e-3, 64),
    "max_grad_norm": (1e-30, 1e30),
    "default_step_transform_max_lr": (0, 1e30),
    "max_mem_layer_modulation": (0, 1e30),
}
"""Likewise, of arguments that need not be integers."""


def check_number(name: str, value: object, where: str) -> None:
    """Whether an argument that has limits is within them; others pass.

    Raises:
        UsageError: it is not.
    """
    if name in INTEGERS:
        least, most = INTEGERS[name]
        if type(value) is not int or not least <= value <= most:
            raise UsageError(
                f"{where}: {name} is {shown(value)}; it must be an integer from {least} to {most}"
            )
    elif name in NUMBERS:
        low, high = NUMBERS[name]
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            raise UsageError(
                f"{where}: {name} is {shown(value)}; it must be a number from {low:g} to {high:g}"
            )


def check_numbers(given: dict[str, Any], where: str, optional: Iterable[str] = ()) -> None:
    """:func:`check_number` for all; ``optional`` ones may be None.

    Raises:
        UsageError: one is beyond its limits.
    """
    for name, value in given.items():
        if value is not None or name not in optional:
            check_number(name, value, where)


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Name an argument that the class does not have.

    Raises:
        UsageError: there is one.
    """
    names = list(known)
    for name in given:
        if name not in names:
            raise UsageError(f"{where}: unknown argument {shown(name)}; known: {', '.join(names)}")


def an_object(given: dict[str, Any], name: str, where: str) -> dict[str, Any] | None:
    """Take an argument out that is an object; None where it is not given.

    Raises:
        UsageError: it is something else.
    """
    value = given.pop(name, None)
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{where}: {name} is {shown(value)}; it must be an object")
    return value


def shown(value: object) -> str:
    """A value for a message, which must stay a line."""
    return reprlib.repr(value)


def shown_key(key: str) -> str:
    """A name from a file for a message: as it stands, unless it could break the line or fill the screen."""
    return key if key.isprintable() and len(key) <= _KEY else shown(key)

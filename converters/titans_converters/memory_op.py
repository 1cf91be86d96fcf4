"""The contract of ``titans::NeuralMemory``, version 1: one source for every target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

DOMAIN: Final = "titans"
NAME: Final = "NeuralMemory"
VERSION: Final = 1

INPUTS: Final = (
    "query",  # (B, H, T, Dk)
    "key",  # (B, H, T, Dk)
    "value",  # (B, H, T, Dv)
    "log_retention",  # (B, H, T)
    "log_momentum",  # (B, H, T)
    "step",  # (B, H, T)
    "edit",  # (B,)
    "past_memory",  # (B, H, Dk, Dv)
    "past_momentum",  # (B, H, Dk, Dv)
)
OUTPUTS: Final = ("output", "present_memory", "present_momentum")

LOG_FLOOR: Final = -1.0e4
"""Logs of gates are raised to it where masks are products, since ``-inf`` times 0 is NaN. ``exp`` of it is 0,
in float64, too."""

Attribute = int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]

ATTRIBUTES: Final = ("tile", "plugin_namespace", "plugin_version", "aot")


def node_attributes(tile: int) -> dict[str, Attribute]:
    """Attributes that every node carries.

    ``tile``: tokens that the body takes at once. The other three are what TensorRT's parser needs
    to take the node for a plugin; without them it silently takes the function body.
    """
    return {"tile": tile, "plugin_namespace": DOMAIN, "plugin_version": str(VERSION), "aot": 1}

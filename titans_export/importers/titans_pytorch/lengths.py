"""Lengths of vectors and matrices that nothing is divided by zero with."""

from __future__ import annotations

from torch import Tensor


def length(x: Tensor, axes: tuple[int, ...], least: float, keepdim: bool = False) -> Tensor:
    """``max(‖x‖, least)``, with a slope of zero below ``least``.

    A maximum, since exporters take an addition of what is nearly zero for none and leave it out.
    """
    squares = (x * x).sum(axes, keepdim=keepdim)
    return squares.maximum(squares.new_full((), least**2)).sqrt()

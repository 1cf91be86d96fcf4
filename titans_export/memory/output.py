"""What the memory rule returns."""

from __future__ import annotations

from torch import Tensor

MemoryOutput = tuple[Tensor, Tensor, Tensor]
"""Reads ``(B, H, T, Dv)``, present memory and momentum ``(B, H, Dk, Dv)``."""

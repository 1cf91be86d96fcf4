"""What is compared: every architecture, every kind of memory, and the paper's ablations, at `nano` size."""

from __future__ import annotations

from dataclasses import replace

from titans_export.config import PRESETS, ModelConfig

_NANO = PRESETS["nano"]
_DEEP = PRESETS["nano-deep"]

VARIANTS: dict[str, ModelConfig] = {
    "LMM, matrix": _NANO,
    "LMM, matrix, no momentum (SSM)": PRESETS["nano-ssm"],
    "LMM, matrix, no retention": replace(_NANO, retention=False),
    "LMM, matrix, no convolution": replace(_NANO, convolution=False),
    "LMM, matrix, period 16": replace(_NANO, period=16),
    "LMM, MLP of depth 1, period 16": replace(_DEEP, memory_depth=1, d_ff=640),
    "LMM, MLP of depth 2, period 16": _DEEP,
    "MAL, matrix": PRESETS["nano-mal"],
    "MAG, matrix": PRESETS["nano-mag"],
    "MAC, matrix": PRESETS["nano-mac"],
}
"""By name; widths of the feed-forward layers hold all of them between 1.8 and 1.95 million parameters."""

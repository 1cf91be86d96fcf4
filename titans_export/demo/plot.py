"""The demo's picture: bits per byte along each text, editing off and on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titans_runtime.optional import optional_import

Bits = npt.NDArray[np.float32]
_OFF, _ON = "#8a8f98", "#1f6feb"


def plot_bits(texts: Sequence[tuple[str, Bits, Bits]], path: Path, window: int = 2048) -> None:
    """Draw one panel a text, two in a row.

    Args:
        texts: title, bits of every byte with editing off, and with editing on.
        path: PNG file.
        window: bytes that each point averages.
    """
    optional_import("matplotlib", "plot").use("Agg")
    pyplot = optional_import("matplotlib.pyplot", "plot")
    rows = (len(texts) + 1) // 2
    figure, grid = pyplot.subplots(
        rows, 2, figsize=(10.5, 3.1 * rows), constrained_layout=True, squeeze=False
    )
    panels = grid.ravel()
    for panel, (title, off, on) in zip(panels, texts, strict=False):
        _draw(panel, title, off, on, min(window, len(off)))
    for unused in panels[len(texts) :]:
        unused.set_visible(False)
    for panel in grid[:, 0]:
        panel.set_ylabel("bits per byte")
    for panel in grid[-1]:
        panel.set_xlabel("KiB read")
    panels[0].legend(loc="upper right", frameon=False, fontsize=9, ncols=2)
    figure.suptitle(
        f"One exported model on texts it never saw, without PyTorch (running mean of {window} bytes)",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(panel: Any, title: str, off: Bits, on: Bits, window: int) -> None:  # noqa: ANN401 - matplotlib Axes
    smooth_off, smooth_on = _moving_mean(off, window), _moving_mean(on, window)
    at = (np.arange(len(smooth_off)) + window) / 1024
    panel.plot(at, smooth_off, color=_OFF, linewidth=1.7, label="editing off")
    panel.plot(at, smooth_on, color=_ON, linewidth=1.7, label="editing on")
    panel.fill_between(at, smooth_off, smooth_on, color=_ON, alpha=0.1, linewidth=0)
    panel.set_title(
        f"{title}: {off.mean():.2f} → {on.mean():.2f} ({on.mean() / off.mean() - 1:+.0%})", fontsize=10
    )
    panel.set_ylim(0, 1.2 * max(smooth_off.max(), smooth_on.max()))
    panel.set_xlim(0, len(off) / 1024)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _moving_mean(bits: Bits, window: int) -> npt.NDArray[np.float64]:
    total = np.concatenate([[0.0], np.cumsum(bits, dtype=np.float64)])
    mean: npt.NDArray[np.float64] = (total[window:] - total[:-window]) / window
    return mean

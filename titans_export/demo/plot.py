"""The demo's picture: bits per byte along each text, editing off and on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titans_runtime.optional import optional_import

Bits = npt.NDArray[np.float32]
_OFF, _ON = "#8a8f98", "#1f6feb"


def plot_bits(texts: Sequence[tuple[str, Bits, Bits]], path: Path, window: int = 1024) -> None:
    """Draw one panel a text.

    Args:
        texts: title, bits of every byte with editing off, and with editing on.
        path: PNG file.
        window: bytes that each point averages.
    """
    optional_import("matplotlib", "plot").use("Agg")
    pyplot = optional_import("matplotlib.pyplot", "plot")
    figure, panels = pyplot.subplots(
        1, len(texts), figsize=(4.3 * len(texts), 3.9), sharey=True, constrained_layout=True, squeeze=False
    )
    for panel, (title, off, on) in zip(panels[0], texts, strict=True):
        for bits, colour, name in ((off, _OFF, "editing off"), (on, _ON, "editing on")):
            smooth = _moving_mean(bits, min(window, len(bits)))
            at = (np.arange(len(smooth)) + min(window, len(bits)) / 2) / 1024
            panel.plot(at, smooth, color=colour, linewidth=1.6)
            panel.annotate(
                f" {name} {bits.mean():.2f}",
                (at[-1], smooth[-1]),
                color=colour,
                fontsize=9,
                ha="right",
                va="bottom",
                xytext=(0, 5),
                textcoords="offset points",
            )
        panel.fill_between(
            at, _moving_mean(off, min(window, len(off))), smooth, color=_ON, alpha=0.08, linewidth=0
        )
        panel.set_title(f"{title}\n{1 - on.mean() / off.mean():.0%} fewer bits", fontsize=10)
        panel.set_xlabel("KiB read")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(f"bits per byte\n(mean of {window} bytes)")
    figure.suptitle(
        "The same exported model on texts it never saw, in a process without PyTorch", fontsize=11
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _moving_mean(bits: Bits, window: int) -> npt.NDArray[np.float64]:
    total = np.concatenate([[0.0], np.cumsum(bits, dtype=np.float64)])
    mean: npt.NDArray[np.float64] = (total[window:] - total[:-window]) / window
    return mean

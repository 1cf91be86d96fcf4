"""Throughput and latency over the number of sessions."""

from __future__ import annotations

import io
from typing import Any

WAYS = {"batched": "#2f6f4f", "one by one": "#b3554d"}


def plot(report: dict[str, Any]) -> bytes:
    """PNG of tokens per second, time to the first token and to the whole answer."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    rows = report["rows"]
    counts = [row["sessions"] for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for way, colour in WAYS.items():
        own = [row[way] for row in rows]
        axes[0].plot(counts, [one["tokens_per_second"] for one in own], "o-", color=colour, label=way)
        for axis, name in zip(axes[1:], ("first", "whole"), strict=True):
            low, high = ([1000 * one[f"{name}_{p}"] for one in own] for p in ("p50", "p99"))
            axis.plot(counts, low, "o-", color=colour, label=f"{way}, p50")
            axis.plot(counts, high, "o:", color=colour, label=f"{way}, p99", markerfacecolor="white")
    axes[0].set_title("tokens per second")
    axes[1].set_title("time to the first token, ms")
    axes[2].set_title("time to the whole answer, ms")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_xlabel("sessions at once")
        axis.grid(color="#e3dfd7")
        axis.set_axisbelow(True)
    axes[0].set_ylim(0)
    for axis in axes[1:]:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
    for axis in axes:
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    return image.getvalue()

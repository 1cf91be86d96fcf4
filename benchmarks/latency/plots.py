"""A bar for each of a few ratios."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

_MANY = 12


def bars(names: Sequence[str], rows: Sequence[dict[str, Any]], label: str, title: str) -> bytes:
    """PNG of ``ratio`` with ``ratio_low`` to ``ratio_high`` of every row."""
    from matplotlib import pyplot as plt

    ratios = [row["ratio"] for row in rows]
    spread = [
        [row["ratio"] - row["ratio_low"] for row in rows],
        [row["ratio_high"] - row["ratio"] for row in rows],
    ]
    width = 4 + max(map(len, names)) / 14  # long names would leave the bars no room
    height = 0.5 * len(rows) if len(rows) < _MANY else 0.3 * len(rows)
    figure, axis = plt.subplots(figsize=(width, height + 1.3))
    axis.margins(y=0.01)
    axis.barh(list(names), ratios, xerr=spread, color="#5b7c99", ecolor="#222222", capsize=2)
    for place, row in enumerate(rows):
        style = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axis.annotate(f"{row['ratio']:.2f}", (row["ratio_high"], place), **style)
    axis.axvline(1, color="#c2571a", linewidth=0.8)
    axis.set_xlim(0, max(row["ratio_high"] for row in rows) * 1.12)
    axis.set_xlabel(label)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=8)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    plt.close(figure)
    return image.getvalue()

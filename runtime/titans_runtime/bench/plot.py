"""A measurement as a picture: how many times the reference's time each backend takes."""

from __future__ import annotations

import io
from typing import Any

from titans_runtime.bench.options import REFERENCE
from titans_runtime.bench.report import Record
from titans_runtime.optional import optional_import

_WIDE = 12  # ratios beyond it are drawn on a logarithmic axis


def to_png(content: Record) -> bytes:
    """One panel a case, one bar a backend, the rounds' range as a line through its end.

    Raises:
        EnvironmentProblem: matplotlib is missing.
    """
    optional_import("matplotlib", "plot").use("Agg")
    pyplot = optional_import("matplotlib.pyplot", "plot")
    panels: dict[str, list[Record]] = {}
    for row in content["rows"]:
        panels.setdefault(_title(row), []).append(row)
    heights = [len(rows) + 1.5 for rows in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 0.34 * sum(heights) + 0.8), squeeze=False, height_ratios=heights
    )
    try:
        for axis, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
            _draw(axis, title, rows)
        axes[-1, 0].set_xlabel(f"time / time of {REFERENCE}, median and range of rounds alternately run")
        figure.suptitle(content["machine"]["processor"], fontsize=9)
        figure.tight_layout()
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
        return image.getvalue()
    finally:
        pyplot.close(figure)


def _title(row: Record) -> str:
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    return f"{row['kind']} {row['tokens']}, batch {row['batch']}, edit {row['edit']:g}, {threads}"


def _draw(axis: Any, title: str, rows: list[Record]) -> None:  # noqa: ANN401 - matplotlib's
    ordered = sorted(rows, key=lambda row: -row["ratio"])
    ratios = [row["ratio"] for row in ordered]
    spread = [
        [row["ratio"] - row["ratio_low"] for row in ordered],
        [row["ratio_high"] - row["ratio"] for row in ordered],
    ]
    colours = ["#c2571a" if row["backend"] == REFERENCE else "#5b7c99" for row in ordered]
    axis.barh(
        [row["backend"] for row in ordered], ratios, xerr=spread, color=colours, ecolor="#222222", capsize=2
    )
    if max(ratios) > _WIDE:
        axis.set_xscale("log")
        axis.set_xlim(min(0.5, *ratios) * 0.8, max(row["ratio_high"] for row in ordered) * 1.8)
    else:
        axis.set_xlim(0, max(row["ratio_high"] for row in ordered) * 1.12)
    for place, row in enumerate(ordered):
        place_of_text = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axis.annotate(f"{row['ratio']:.2f}", (row["ratio_high"], place), **place_of_text)
    axis.axvline(1, color="#c2571a", linewidth=0.8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)

"""An edit log as a picture: what the stream taught, and what became of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from titans_runtime.errors import UsageError
from titans_runtime.optional import optional_import
from titans_runtime.report import Lesson


def plot_log(lessons: Sequence[Lesson], path: Path) -> bytes:
    """Loss before the steps and after the last one measured, gradient norms, and milliseconds a lesson.

    Args:
        lessons: one or more.
        path: of the picture, which is not written: its ending is the kind of picture.

    Returns:
        What to write there.

    Raises:
        UsageError: the path has no such ending.
        EnvironmentProblem: matplotlib is missing.
    """
    figure_class = optional_import("matplotlib.figure", "plot").Figure
    figure = figure_class(figsize=(9, 7), layout="constrained")
    kind = path.suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"{path}: is no name of a picture; let it end in .png, .svg or .pdf")
    loss, norms, time = figure.subplots(3, 1, sharex=True)
    for objective in dict.fromkeys(lesson.objective for lesson in lessons):
        own = [lesson for lesson in lessons if lesson.objective == objective]
        places = [lesson.position for lesson in own]
        loss.plot(places, [lesson.loss for lesson in own], lw=0.8, label=f"{objective}, before")
        if any(lesson.loss_after == lesson.loss_after for lesson in own):  # NaN where it was not measured
            after = f"{objective}, after the last step measured"
            loss.plot(places, [lesson.loss_after for lesson in own], lw=0.8, label=after)
        for memory in dict.fromkeys(name for lesson in own for name in lesson.norms):
            norms.plot(places, [lesson.norms.get(memory) for lesson in own], lw=0.8, label=memory)
        time.plot(places, [1000 * lesson.seconds for lesson in own], lw=0.8, label=objective)
    refused = [lesson.position for lesson in lessons if lesson.refused]
    loss.plot(refused, [0] * len(refused), "x", color="tab:red", ms=4, label="refused")
    for axes, label in ((loss, "loss a token"), (norms, "gradient norm"), (time, "ms a lesson")):
        axes.set_ylabel(label)
        axes.legend(fontsize=7, ncols=2, loc="upper right")
    norms.set_yscale("symlog")
    time.set_xlabel("position in the stream")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    return picture.getvalue()

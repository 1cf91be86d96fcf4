"""A table and a plot of what is finished, and what is missing."""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks.experiments.contestants import CONTESTANTS, entrants
from benchmarks.experiments.controls import controls, last_successors
from benchmarks.experiments.evaluate import key, scored
from benchmarks.experiments.published import FIGURES, PUBLISHED
from benchmarks.experiments.tasks.task import Task, Test, examples
from titans_runtime.optional import optional_import

Rows = list[dict[str, Any]]
_WAYS = {
    "as trained": "",
    "off": ", run with λ = 0",
    "fused": ", edited at test time (λ)",
    "readout": ", edited at test time (readout)",
    "prediction": ", edited at test time (prediction)",
}
_COLOURS = {
    "transformer": "#7f7f7f",
    "s4d": "#b58900",
    "mamba": "#2f6f4f",
    "mamba-scaled": "#66a182",
    "titans-untrained": "#40404f",
    "lstm": "#8c6bb1",
    "titans-ssm": "#2166ac",
    "titans-lmm": "#c2571a",
    "titans-delta": "#e08214",
    "titans-scaled": "#d6298f",
    "titans-mac": "#b2182b",
}
_LABELS = 8
"""That stand side by side under a panel."""
_LABEL_WIDTH = 44
"""Letters of a legend's line."""
_MEASURES = {"token": "answers right", "exact": "examples with all answers right"}
_STYLES = {
    "as trained": ("-", "o"),
    "off": (":", "v"),
    "fused": ("--", "s"),
    "readout": ("--", "^"),
    "prediction": (":", "x"),
}


def lines_of(rows: Rows) -> list[tuple[str, str]]:
    """Contestants and ways that have results, in the order of the table."""
    present = {(row["contestant"], row["way"]) for row in rows}
    return [(name, way) for name in CONTESTANTS for way in _WAYS if (name, way) in present]


def label(contestant: str, way: str) -> str:
    """A line's name."""
    return CONTESTANTS[contestant].label + _WAYS[way]


def table(name: str, tasks: Sequence[Task], rows: Rows, seeds: Sequence[int], steps: dict[str, int]) -> str:
    """Markdown: a table for every group of tests and measure, what is missing, what others report.

    Args:
        name: of the experiment.
        tasks: its tasks.
        rows: results.
        seeds: asked for.
        steps: of training, by task.
    """
    parts = []
    for group, tests in grouped(tasks).items():
        for measure, title in _MEASURES.items():
            if measure == "exact" and not _several(rows, tests):
                continue
            lines = [*_lines(rows, tests, measure), *_without_model(tasks, tests, measure)]
            if measure == tasks[0].measure:
                lines += _published(name, tests)
            parts += [f"**{group}: % of {title}**", "", *lines, ""]
    parts += _missing(tasks, rows, seeds)
    if name in PUBLISHED:
        parts += ["Published, at another size and budget: " + PUBLISHED[name].replace("\n", " "), ""]
    chance = ", ".join(f"{task.name} {100 * task.chance:.1f} %" for task in tasks)
    trained = ", ".join(f"{task.name} {steps[task.name]:,}" for task in tasks)
    parts += [f"Chance: {chance}. Steps of training: {trained}. Cells: mean over the seeds (least-greatest)."]
    parts += [
        f"{task.name}: who answers no more of {task.ends:,} than guessing would (two standard deviations) is "
        'asked no longer ones; "2 of 3" is the mean of the seeds that were.'
        for task in tasks
        if task.ends
    ]
    parts += [
        f"{task.name}: a training row begins, with probability {task.carry:g}, with the state that another "
        "sequence left, where the network has one."
        for task in tasks
        if task.carry
    ]
    return "\n".join(parts)


def grouped(tasks: Sequence[Task]) -> dict[str, list[Test]]:
    """Tests by what they vary."""
    groups: dict[str, list[Test]] = {}
    for task in tasks:
        for test in task.tests:
            groups.setdefault(test.group, []).append(test)
    return groups


def _several(rows: Rows, tests: Sequence[Test]) -> bool:
    """Whether an example has several answers, so that the two measures differ."""
    found = [row["scores"][key(test)] for row in rows for test in tests if key(test) in row["scores"]]
    return any(score["token"] != score["exact"] for score in found)


def _lines(rows: Rows, tests: Sequence[Test], measure: str) -> list[str]:
    written = [
        "| | parameters | " + " | ".join(test.label for test in tests) + " | ONNX = PyTorch | seeds |",
        "|---|---|" + "---|" * (len(tests) + 2),
    ]
    for contestant, way in lines_of(rows):
        own = [row for row in rows if (row["contestant"], row["way"]) == (contestant, way)]
        cells = [_cell(*_shares(own, test, measure)) for test in tests]
        scores = [row["scores"][key(test)] for row in own for test in tests if key(test) in row["scores"]]
        checked = [score for score in scores if "agree" in score]
        agree = (
            f"{sum(s['agree'] for s in checked):,} of {sum(s['examples'] for s in checked):,}"
            if checked
            else ""
        )
        seeds = len({row["seed"] for row in own})
        written.append(
            f"| {label(contestant, way)} | {own[0]['parameters'] / 1e3:.0f} k | "
            + " | ".join(cells)
            + f" | {agree} | {seeds} |"
        )
    return written


def _shares(own: Rows, test: Test, measure: str) -> tuple[list[float], int]:
    """Of every seed that was asked, and how many were not."""
    asked = [row for row in own if key(test) in row["scores"]]
    tasks = {row["task"] for row in asked}
    absent = sum(row["task"] in tasks for row in own) - len(asked)
    return [row["scores"][key(test)][measure] for row in asked], absent


def _without_model(tasks: Sequence[Task], tests: Sequence[Test], measure: str) -> list[str]:
    """Rows of what needs no model."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        for number, test in enumerate(task.tests):
            if test not in tests:
                continue
            batch = examples(test, number)
            for name, answer in controls(task).items():
                found.setdefault(name, []).append(_cell([scored(batch, answer(batch))[measure]]))
    return [f"| {name} | | {' | '.join(cells)} | | |" for name, cells in found.items()]


def _published(name: str, tests: Sequence[Test]) -> list[str]:
    """Rows of what others report, where a test of theirs has the size of one of ours."""
    return [
        f"| *{who}* | | {' | '.join(shares.get(test.label, '–') for test in tests)} | | |"
        for who, shares in FIGURES.get(name, {}).items()
    ]


def _cell(values: list[float], absent: int = 0) -> str:
    if not values:
        return "–"
    shares = [100 * value for value in values]
    mean = f"{statistics.mean(shares):.1f}"
    notes = []
    if max(shares) - min(shares) >= 0.05:
        notes.append(f"{min(shares):.1f}-{max(shares):.1f}")
    if absent:
        notes.append(f"{len(shares)} of {len(shares) + absent}")
    return f"{mean} ({'; '.join(notes)})" if notes else mean


def _missing(tasks: Sequence[Task], rows: Rows, seeds: Sequence[int]) -> list[str]:
    done = {(row["task"], row["contestant"], row["seed"]) for row in rows}
    absent = [
        f"{task.name}: {name} (seed{'s' * (len(open_) > 1)} {', '.join(map(str, open_))})"
        for task in tasks
        for name in entrants(task.name)
        if (open_ := [seed for seed in seeds if (task.name, name, seed) not in done])
    ]
    return [f"Not trained: {'; '.join(absent)}.", ""] if absent else []


def settings(rows: Rows) -> list[str]:
    """How the Titans models were edited, by task and seed."""
    return [
        f"{row['task']}, seed {row['seed']}, {label(row['contestant'], row['way'])}: {row['setting']}"
        for row in rows
        if row["way"] not in ("as trained", "off")
    ]


def plot(title: str, tasks: Sequence[Task], rows: Rows) -> bytes:
    """PNG: share of right answers over the tests' sizes, a panel a group."""
    figure_class = optional_import("matplotlib.figure", "plot").Figure
    groups = grouped(tasks)
    figure = figure_class(figsize=(5.4 * len(groups) + 3.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (group, tests) in zip(panels, groups.items(), strict=True):
        for contestant, way in lines_of(rows):
            _draw_line(axes, tests, rows, contestant, way, tasks[0].measure)
        _draw_table(axes, tasks, tests)
        if min(test.size for test in tests) > 0:
            axes.set_xscale("log", base=2)
        turned = 45 if len(tests) > _LABELS else 0
        axes.set_xticks([test.size for test in tests], [test.label for test in tests], rotation=turned)
        axes.minorticks_off()
        if tasks[0].measure == "token":
            axes.axhline(100 * tasks[0].chance, color="black", lw=0.7, ls=":")
        axes.set_xlabel(group)
        axes.set_ylim(-3, 103)
        axes.set_ylabel(f"{_MEASURES[tasks[0].measure]}, %")
        axes.grid(color="#e3dfd7")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _draw_table(axes: Any, tasks: Sequence[Task], tests: Sequence[Test]) -> None:  # noqa: ANN401
    """What a table of successors gets without a model."""
    shares = []
    for task in tasks:
        for number, test in enumerate(task.tests):
            if test in tests:
                batch = examples(test, number)
                shares.append(100 * scored(batch, last_successors(batch))[task.measure])
    name = "No model: the last successor"
    axes.plot([test.size for test in tests], shares, color="black", lw=0.9, ls="-.", label=name)


def _draw_line(axes: Any, tests: Sequence[Test], rows: Rows, contestant: str, way: str, measure: str) -> None:  # noqa: ANN401
    """Mean and range over the seeds, where a test was asked."""
    own = [row for row in rows if (row["contestant"], row["way"]) == (contestant, way)]
    points = {test.size: [100 * share for share in _shares(own, test, measure)[0]] for test in tests}
    points = {size: shares for size, shares in points.items() if shares}
    means = [statistics.mean(shares) for shares in points.values()]
    below = [statistics.mean(shares) - min(shares) for shares in points.values()]
    above = [max(shares) - statistics.mean(shares) for shares in points.values()]
    line, marker = _STYLES[way]
    axes.errorbar(
        list(points),
        means,
        yerr=[below, above],
        label=textwrap.fill(label(contestant, way), _LABEL_WIDTH),
        color=_COLOURS[contestant],
        marker=marker,
        ls=line,
        ms=4,
        capsize=2,
        lw=1.3,
    )

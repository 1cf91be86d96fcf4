"""What was aimed at, and what the results files hold of it: one table and one picture.

    .venv/bin/python -m benchmarks.latency.summary

Reads ``results/latency/*.json`` and writes ``README.md`` and ``summary.png`` beside them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.command import conclude
from benchmarks.latency.plots import bars
from benchmarks.latency.results import RESULTS
from benchmarks.latency.rows import LIBRARY, ROWS, Target
from titans_runtime.files import write_atomically

_MOST_EDITED = 1.15  # times as long as unedited


@dataclass(frozen=True)
class Line:
    """One target as measured: over ``least``, or up to ``most``."""

    what: str
    where: str
    ratio: float
    low: float
    high: float
    limit: float
    at_least: bool
    command: str

    @property
    def reached(self) -> bool:
        """Whether the median meets the limit; one that its rounds do not tell from nothing does not."""
        return self.told and (self.ratio >= self.limit if self.at_least else self.ratio <= self.limit)

    @property
    def told(self) -> bool:
        """Whether all rounds found something: a difference of two long times may be less than their noise."""
        return self.low > 0

    def markdown(self) -> str:
        """A row of the table."""
        sign = "≥" if self.at_least else "≤"
        mark = "✓" if self.reached else "✗" if self.told else "?"
        spread = f" ({self.low:.2f}-{self.high:.2f})" if self.low != self.high else ""
        return (
            f"| {self.what} | {self.where} | {sign} {self.limit:g} | {mark} **{self.ratio:.2f}**{spread} "
            f"| `{self.command}` |"
        )


def main() -> None:
    """Write and print the table."""
    lines = list(measured())
    text = page(lines)
    write_atomically(RESULTS / "README.md", text.encode())
    write_atomically(RESULTS / "summary.png", _picture(lines))
    print(text)


def page(lines: Iterable[Line]) -> str:
    """Markdown: every target as measured, and the backends that were left out."""
    table = ["| what / ours | size, threads | aim | measured (range) | reproduce |", "|---|---|---|---|---|"]
    table += [line.markdown() for line in lines]
    return (
        "# Latency and footprint, side by side\n\n"
        "Medians of ratios of alternating rounds, with their range, after the outputs were compared\n"
        "([how](../../../docs/benchmarks.md)). The files of this folder hold every command's table, its\n"
        "machine, versions and what is missing; what was tried is in [NOTES.md](../../NOTES.md).\n"
        "✓ reaches the aim, ✗ does not; ? is a difference that its rounds do not tell from none.\n\n"
        + "\n".join(table)
        + "\n\n![measured over aim](summary.png)\n\n"
        + "Backends that the rows above do without:\n\n"
        + "\n".join(_left_out())
        + "\n"
    )


def _picture(lines: list[Line]) -> bytes:
    """How far beyond its aim everything is: 1 is reached."""
    rows = []
    for line in lines:
        sides = [
            value / line.limit if line.at_least else line.limit / value
            for value in (line.ratio, line.low, line.high)
        ]
        rows.append({"ratio": sides[0], "ratio_low": min(sides), "ratio_high": max(sides)})
    names = [f"{line.what}, {line.where}" for line in lines]
    return bars(names, rows, "measured / aim, 1 is reached", "latency and footprint")


def measured() -> Iterator[Line]:
    """Every target that the results files have a figure of."""
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        row, *where = path.stem.split("-")
        if path.stem.startswith("flat"):
            yield _flat(content, path.stem)
        elif row == "footprint":
            yield from _footprint(content, where[0])
        elif row == "installed":
            yield _ratio("installed size: PyTorch", "all", content["rows"][0], 5, content["command"])
        elif row == "titans_pytorch":
            yield from _library(content, where)
        elif row == "open_editor":
            yield from _open_editor(content, where)
        elif row in {name.partition("-")[0] for name in ROWS}:  # other files have tables of their own
            yield from _bench(content)


def _left_out() -> Iterator[str]:
    """Backends that a target asks for and a results file has no times of, with the reason."""
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        words = content["command"].split()
        if "benchmarks.latency.run" not in words:
            continue
        _, _, _, name, _, size, _, threads = words[:8]
        reasons = {one["backend"]: f"{one['state']}: {one['reason']}" for one in content["absent"]}
        timed = {row["backend"] for row in content["rows"]}
        wanted = dict.fromkeys(backend for target in ROWS[name].targets for backend in target.backends)
        for backend in wanted:
            if backend not in timed:
                why = reasons.get(backend, "not run; NOTES.md says why")
                yield f"* {name}, {size}, {threads}: {backend}, {why}"


def _bench(content: dict[str, Any]) -> Iterator[Line]:
    """The targets of a row of ``titans bench``."""
    _, _, _, name, *_ = content["command"].split()
    size, threads = content["command"].split()[5], content["command"].split()[7]
    where = f"{size}, {threads}"
    if name == "editing":
        yield from _editing(content, where)
    for target in ROWS[name].targets:
        best = _best(content, target)
        if best is not None:
            words = f"{target.what} ({best['backend']})" if len(target.backends) > 1 else target.what
            yield _ratio(words, where, best, target.least, content["command"])


def _best(content: dict[str, Any], target: Target) -> dict[str, Any] | None:
    rows = [
        row for row in content["rows"] if row["backend"] in target.backends and row["kind"] in target.kinds
    ]
    return min(rows, key=lambda row: row["ratio"], default=None)


def _editing(content: dict[str, Any], where: str) -> Iterator[Line]:
    for kind in ("prefill", "decode"):
        off, on = (
            next(row["seconds"] for row in content["rows"] if (row["kind"], row["edit"]) == (kind, edit))
            for edit in (0.0, 1.0)
        )
        ratios = [b / a for a, b in zip(off, on, strict=True)]
        yield Line(
            f"{kind}: editing on / off", where, statistics.median(ratios), min(ratios), max(ratios),
            _MOST_EDITED, False, content["command"],
        )  # fmt: skip


def _library(content: dict[str, Any], where: list[str]) -> Iterator[Line]:
    kind, threads = where
    for row in content["rows"]:
        target = LIBRARY[kind].get((row["kind"], row["backend"]))
        if target is not None:
            where_run = f"dim 256, {threads.removesuffix('t')}"
            yield _ratio(target.what, where_run, row, target.least, content["command"])


def _open_editor(content: dict[str, Any], where: list[str]) -> Iterator[Line]:
    size, tokens = where
    for row in content["rows"]:
        what = f"open editor, {row['kind']}: PyTorch autograd"
        yield _ratio(what, f"{size}, periods of {tokens}, 1", row, 2, content["command"])


def _footprint(content: dict[str, Any], size: str) -> Iterator[Line]:
    start, peak = content["rows"]
    yield _ratio("start to first token: PyTorch", f"{size}, 1", start, 5, content["command"])
    yield _ratio("peak memory: PyTorch", f"{size}, 1", peak, 1.8, content["command"])
    beside, limit = content["beside_weights"] / 1e6, content["beside_weights_limit"] / 1e6
    yield Line(
        "peak memory beside the weights, MB",
        f"{size}, 1",
        beside,
        beside,
        beside,
        limit,
        False,
        content["command"],
    )


def _flat(content: dict[str, Any], name: str) -> Line:
    last = content["last_over_first"]
    what = "decode at token 1,000,000 / at 1,000, " + name.removeprefix("flat-").replace("-", " ")
    return Line(
        what, "nano, 1", last["median"], last["low"], last["high"], last["limit"], False, content["command"]
    )


def _ratio(what: str, where: str, row: dict[str, Any], least: float, command: str) -> Line:
    return Line(what, where, row["ratio"], row["ratio_low"], row["ratio_high"], least, True, command)


if __name__ == "__main__":
    conclude(main)

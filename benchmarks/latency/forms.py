"""What each form of the memory (``--scan``) costs: time, load, files, peak memory, beside the default form.

    .venv/bin/python -m benchmarks.latency.forms --size base
    .venv/bin/python -m benchmarks.latency.forms --size base-ssm --forms native,scan --edit 0

Speed is that of ``titans bench``: outputs compared first, then runs in turn. For start-up and peak memory
every form loads in a process of its own, alternately, and takes one token.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command import conclude
from benchmarks.latency.footprint import OURS, run_apart
from benchmarks.latency.models import prepared
from benchmarks.latency.plots import bars
from benchmarks.latency.results import publish
from titans_export.config import PRESETS
from titans_runtime.bench.measure import Contestant, Measurement, cases, measure
from titans_runtime.bench.onnxruntime import load
from titans_runtime.bench.peers import Job
from titans_runtime.bench.report import Record, record
from titans_runtime.progress import progress_bar

_DEFAULT = "float32"
"""The variant that all are compared with: the form ``plugin``."""
_LABELS = {_DEFAULT: "plugin"}
_CONTROL = "plugin, again"
"""The same bundle loaded a second time: what chance, as in where memory lies, makes of two equals."""


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(PRESETS), default="base")
    parser.add_argument("--forms", default="scan,unrolled", metavar="NAME,…")
    parser.add_argument("--edit", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    bundles = {name: prepared(args.size, name).bundle for name in (_DEFAULT, *args.forms.split(","))}
    measured = _speed(bundles, args.edit, args.rounds)
    command = (
        f"python -m benchmarks.latency.forms --size {args.size} --forms {args.forms} --edit {args.edit:g}"
    )
    content = record(measured, command)
    content["forms"] = _costs(bundles, args.rounds)
    name = f"forms-{args.size}-1t"
    publish(name, content, _table(content), _plot(content, args.size))


def _speed(bundles: dict[str, Path], edit: float, rounds: int) -> Measurement:
    contestants = [
        Contestant(_LABELS.get(name, name), load, Job(folder, None, 1, folder))
        for name, folder in bundles.items()
    ]
    first = contestants[0]
    contestants.append(Contestant(_CONTROL, first.load, first.job))
    bar = partial(progress_bar, description="rounds", unit="round")
    return measure(contestants, cases([512], [64], [1], [edit]), 256, rounds, 1e-4, bar)


def _costs(bundles: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Seconds until the first token and peak memory of every form; bytes of its model files."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in bundles}
    for round_ in progress_bar(range(rounds + 1), "starts", "start"):
        for name, folder in bundles.items():
            run = run_apart(OURS, folder)
            if round_:  # the first brings the files into the page cache
                runs[name].append(run)
    rows = []
    for name, folder in bundles.items():
        row: dict[str, Any] = {"form": _LABELS.get(name, name)}
        row["model_bytes"] = sum(path.stat().st_size for path in folder.glob("model*.onnx"))
        row["weights_bytes"] = (folder / "weights.bin").stat().st_size
        for quantity in ("seconds", "peak"):
            own, first = ([run[quantity] for run in runs[which]] for which in (name, _DEFAULT))
            ratios = [a / b for a, b in zip(own, first, strict=True)]
            row[quantity] = statistics.median(own)
            row[f"{quantity}_ratio"] = statistics.median(ratios)
            row[f"{quantity}_low"], row[f"{quantity}_high"] = min(ratios), max(ratios)
        rows.append(row)
    return rows


def _table(content: Record) -> str:
    """Ratios over the form ``plugin``: more than 1 is slower, or larger."""
    lines = [
        "| form | prefill 512 | decode | start | peak memory | model files | weights | logits off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (*content["forms"], {"form": _CONTROL}):
        prefill, decode = (
            next(one for one in content["rows"] if (one["backend"], one["kind"]) == (row["form"], kind))
            for kind in ("prefill", "decode")
        )
        if row["form"] == _CONTROL:
            times = f"{_spread(prefill, 'ratio')} | {_spread(decode, 'ratio')}"
            lines.append(f"| `plugin`, loaded again | {times} | | | | | |")
            continue
        off = max(prefill["logits_error"] or 0.0, decode["logits_error"] or 0.0)
        lines.append(
            f"| `{row['form']}` | {_spread(prefill, 'ratio')} | {_spread(decode, 'ratio')} "
            f"| {_cost(row, 'seconds')} | {_cost(row, 'peak')} | {row['model_bytes'] / 1e6:.2f} MB "
            f"| {row['weights_bytes'] / 1e6:.1f} MB | {off:.0e} |"
        )
    first = (
        "Times and sizes over those of the form `plugin` in the same round: median (range); more is worse."
    )
    return "\n".join([first, "", *lines, ""])


def _spread(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f} ({row[f'{name}_low']:.2f}-{row[f'{name}_high']:.2f})"


def _cost(row: dict[str, Any], name: str) -> str:
    return f"{row[f'{name}_ratio']:.2f} ({row[f'{name}_low']:.2f}-{row[f'{name}_high']:.2f})"


def _plot(content: Record, size: str) -> bytes:
    names, rows = [], []
    for one in content["rows"]:
        if one["backend"] != content["forms"][0]["form"]:
            names.append(f"{one['backend']}, {one['kind']}")
            rows.append(one)
    return bars(names, rows, "time / that of plugin; more is slower", f"forms of the memory, {size}")


if __name__ == "__main__":
    conclude(main)

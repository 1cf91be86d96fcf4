"""One row of the table, one command.

    .venv/bin/python -m benchmarks.latency.run decode --size base --threads 1

runs ``titans bench`` on random weights of that size and leaves ``results/latency/ROW-SIZE-Nt`` as Markdown,
CSV, JSON and a plot. The model is exported, and backends compile for it, at the first call.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.command import conclude
from benchmarks.latency.models import prepared
from benchmarks.latency.results import RESULTS
from benchmarks.latency.rows import ROWS
from titans_export.config import PRESETS
from titans_runtime.bench.command import run_bench
from titans_runtime.bench.options import add_options

_TOLERANCES = {"base-deep": "3e-4"}
"""Of sizes where two forms in float32, each within 1e-4 of float64, differ by more than that."""


def main() -> int:
    """Run a row, and say where its results are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", choices=sorted(ROWS))
    parser.add_argument("--size", choices=sorted(PRESETS), default="base")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default=None, metavar="NAME,…", help="in place of the row's")
    args = parser.parse_args()
    row = ROWS[args.row]
    model = prepared(args.size, row.variant)
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"{args.row}-{args.size}-{args.threads}t"
    options = argparse.ArgumentParser()
    tolerance = ["--tolerance", _TOLERANCES[args.size]] if args.size in _TOLERANCES else []
    add_options(options)
    arguments = [str(model.bundle), *tolerance, *row.options]
    arguments += ["--checkpoint", str(model.checkpoint), "--work", str(model.work)]
    arguments += ["-t", str(args.threads), "-r", str(args.rounds)]
    arguments += ["-o", "md,csv,json,plot", "--out", str(RESULTS / name)]
    for text in row.beside:
        backend, colon, variant = text.rpartition(":")
        arguments += ["--beside", f"{backend}{colon}{prepared(args.size, variant).bundle}"]
    command = f"python -m benchmarks.latency.run {args.row} --size {args.size} --threads {args.threads}"
    if args.backend is not None:
        arguments += ["--backend", args.backend]
        command += f" --backend {args.backend}"
    bench = options.parse_args(arguments)
    written, agreed = run_bench(bench, command)
    print((RESULTS / f"{name}.md").read_text(encoding="utf-8"))
    print(written, file=sys.stderr)
    return 0 if agreed else 1


if __name__ == "__main__":
    conclude(main)

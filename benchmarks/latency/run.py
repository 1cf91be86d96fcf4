"""Latency of the exported model against PyTorch eager: one command, one results file.

    .venv/bin/python -m benchmarks.latency.run --preset base --threads 1

Random weights serve for latency. Both sides run alternately in one process on the same weights and
tokens, after their outputs were compared; the ratio is what counts on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

import titans_runtime
from titans_export.config import PRESETS
from titans_export.latency import LatencyRow, compare_with_eager
from titans_export.model import TitansModel
from titans_export.pipeline import export_bundle
from titans_export.training.checkpoint import load_checkpoint, save_checkpoint
from titans_runtime.progress import progress_bar

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Measure, print the table, write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder, "checkpoint"), Path(folder, "bundle")
        torch.manual_seed(0)
        save_checkpoint(TitansModel(PRESETS[args.preset]), checkpoint)
        export_bundle(checkpoint, bundle)
        rows = compare_with_eager(
            load_checkpoint(checkpoint),
            titans_runtime.load(bundle, threads=args.threads),
            args.prefill,
            args.decode,
            args.rounds,
            progress=lambda rounds: progress_bar(rounds, "rounds"),
        )
    print(table(rows))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"latency-{args.preset}-{args.threads}t.json"
    path.write_text(json.dumps(record(args, rows), indent=2) + "\n", encoding="utf-8")


def table(rows: list[LatencyRow]) -> str:
    """Markdown, the ratio with the range of its rounds."""
    lines = [
        "| what | eager, µs a token | ours, µs a token | eager / ours (range) |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row.what} | {row.eager * 1e6:.0f} | {row.ours * 1e6:.0f} "
        f"| **{row.ratio:.2f}** ({min(row.ratios):.2f}-{max(row.ratios):.2f}) |"
        for row in rows
    ]
    return "\n".join(lines)


def record(args: argparse.Namespace, rows: list[LatencyRow]) -> dict[str, object]:
    """The rows with what one needs to compare them with others."""
    return {
        "command": f"python -m benchmarks.latency.run --preset {args.preset} --threads {args.threads} "
        f"--prefill {args.prefill} --decode {args.decode} --rounds {args.rounds}",
        "machine": {"processor": _processor(), "threads": args.threads, "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "numpy", "titans-runtime")},
        "rows": [
            {
                "what": row.what,
                "eager_seconds_per_token": row.eager,
                "ours_seconds_per_token": row.ours,
                "ratio": row.ratio,
                "ratios": list(row.ratios),
            }
            for row in rows
        ],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()

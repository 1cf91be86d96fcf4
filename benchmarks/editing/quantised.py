"""What quantised weights cost in bits per byte, with editing off and on, on held-out text.

    .venv/bin/python -m benchmarks.editing.quantised checkpoints/nano

Every form of the weights is exported, verified, and scores the same bytes, each before the memory sees it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import titans_runtime as tr
from benchmarks.command import conclude
from benchmarks.editing.run import RESULTS, digest, texts
from titans_export.pipeline import export_bundle
from titans_runtime.progress import progress_bar

WEIGHTS = ("float32", "float16", "int8", "int4")


def main() -> None:
    """Measure, print the table, write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--limit", type=int, default=8192, help="bytes of every file")
    parser.add_argument("--files", type=int, default=16, help="of a kind, the longest ones")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    measured = {weights: measure(args, weights) for weights in WEIGHTS}
    record = {
        "command": f"python -m benchmarks.editing.quantised checkpoints/{args.checkpoint.resolve().name} "
        f"--limit {args.limit} --files {args.files}",
        "weights": digest(args.checkpoint),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "titans-runtime")},
        "measured": measured,
    }
    (RESULTS / "quantised.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = f"{table(measured)}\n\n{note(args.limit, args.files)}\n\n    {record['command']}\n"
    (RESULTS / "quantised.md").write_text(text, encoding="utf-8")
    print(text)


def measure(args: argparse.Namespace, weights: str) -> dict[str, float]:
    """Bytes of the weights file, and bits per byte by kind of text, off and on."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "bundle")
        export_bundle(args.checkpoint, bundle, weights=weights)
        model = tr.load(bundle, threads=args.threads)
        row: dict[str, float] = {"bytes": (bundle / "weights.bin").stat().st_size}
        for kind, sources in texts().items():
            longest = sorted(sources, key=lambda source: -len(source.data))[: args.files]
            parts = [source.data[: args.limit] for source in longest]
            for side, settings in (("off", {"edit": 0.0, "editor": None}), ("on", {})):
                bits = 0.0
                for part in progress_bar(parts, f"{weights}, {kind}, {side}", "file"):
                    bits += float(tr.score(model.session(**settings), part).bits.sum(dtype=float))
                row[f"{kind}, {side}"] = bits / sum(map(len, parts))
    return row


def note(limit: int, files: int) -> str:
    """What the figures are of."""
    return (
        f"Bits per byte of the first {limit:,} bytes of each of the {files} longest files of a kind, and the "
        "change against float32; whole files, as elsewhere, come out lower. *MB*: the weights' file, with "
        "what stays in float32."
    )


def table(measured: dict[str, dict[str, float]]) -> str:
    """Markdown: bits per byte, and the change against float32."""
    first = measured["float32"]
    columns = [name for name in first if name != "bytes"]
    lines = [
        "| weights | MB | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for weights, row in measured.items():
        cells = [f"{row[name]:.4f} ({100 * (row[name] / first[name] - 1):+.2f} %)" for name in columns]
        lines.append(f"| {weights} | {row['bytes'] / 1e6:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    conclude(main)

"""Start-up and peak memory: from the start of a process to its first token, against the PyTorch path.

    .venv/bin/python -m benchmarks.latency.footprint --size base

Each side runs in a process of its own, alternately: it imports what it needs, loads the model, and takes one
token. What the two compute is compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.command import conclude
from benchmarks.latency.models import prepared
from benchmarks.latency.plots import bars
from benchmarks.latency.results import publish
from titans_export.config import PRESETS
from titans_runtime.bench.machine import describe, own_versions
from titans_runtime.bundle import WEIGHTS_NAME
from titans_runtime.errors import CheckFailed
from titans_runtime.progress import progress_bar

_REPORT = """
import json, re
status = open("/proc/self/status").read()
peak = int(re.search(r"VmHWM:\\s+(\\d+)", status).group(1)) * 1024
print(json.dumps({"first": first, "peak": peak}), flush=True)
"""
OURS = """
import sys
import titans_runtime as tr
session = tr.load(sys.argv[1], threads=1).session(edit=1.0, editor=None)
first = float(session.append([65])[0, 0])
"""
_TORCH = """
import sys
from pathlib import Path
import torch
from titans_export.training.checkpoint import load_checkpoint
torch.set_num_threads(1)
model = load_checkpoint(Path(sys.argv[1]))
with torch.inference_mode():
    edit = torch.ones(1, model.config.layers)
    first = float(model(torch.tensor([[65]]), edit, model.initial_state(1)).logits[0, 0, 0])
"""
_ALLOWED = 110_000_000  # bytes beside the weights


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(PRESETS), default="base")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    model = prepared(args.size)
    sides = {"ours": (OURS, model.bundle), "torch": (_TORCH, model.checkpoint)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for round_ in progress_bar(range(args.rounds + 1), "rounds", "round"):
        for name, (script, path) in sides.items():
            run = run_apart(script, path)
            if round_:  # the first brings the files into the page cache
                runs[name].append(run)
    _check(runs)
    content = _record(args, runs, (model.bundle / WEIGHTS_NAME).stat().st_size)
    publish(f"footprint-{args.size}", content, _table(content), _plot(content))


def run_apart(script: str, path: Path) -> dict[str, float]:
    """Seconds to the first token of a process of its own, its peak memory in bytes, and its first logit."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", script + _REPORT, str(path)], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - began
    if not line:
        raise CheckFailed(f"a process ended without its first token (exit code {child.returncode})")
    report: dict[str, float] = json.loads(line)
    return report | {"seconds": seconds}


def _check(runs: dict[str, list[dict[str, float]]]) -> None:
    ours, torch = runs["ours"][0]["first"], runs["torch"][0]["first"]
    if not abs(ours - torch) <= 1e-4 * max(abs(torch), 1e-2):
        raise CheckFailed(f"the first logits differ: {ours} and {torch}; nothing is reported")


def _record(
    args: argparse.Namespace, runs: dict[str, list[dict[str, float]]], weights: int
) -> dict[str, Any]:
    import onnxruntime
    import torch

    rows = []
    for quantity in ("seconds", "peak"):
        ours, other = ([run[quantity] for run in runs[name]] for name in ("ours", "torch"))
        ratios = [b / a for a, b in zip(ours, other, strict=True)]
        rows.append(
            {
                "quantity": quantity,
                "ours": statistics.median(ours),
                "torch": statistics.median(other),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "rounds": len(ratios),
            }
        )
    return {
        "command": f"python -m benchmarks.latency.footprint --size {args.size}",
        "machine": describe(),
        "versions": own_versions() | {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
        "rows": rows,
        "absent": [],
        "weights_bytes": weights,
        "beside_weights": rows[1]["ours"] - weights,
        "beside_weights_limit": _ALLOWED,
    }


def _table(content: dict[str, Any]) -> str:
    start, peak = content["rows"]
    lines = ["| | ours | PyTorch | PyTorch / ours (range) |", "|---|---|---|---|"]
    lines += [
        f"| {what} | {row['ours'] * scale:.{digits}f} {unit} | {row['torch'] * scale:.{digits}f} {unit} "
        f"| **{row['ratio']:.2f}** ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}) |"
        for what, row, scale, unit, digits in (
            ("start of the process to its first token", start, 1, "s", 2),
            ("peak memory until then", peak, 1e-6, "MB", 0),
        )
    ]
    beside = content["beside_weights"] / 1e6
    lines += ["", f"Our peak is the weights ({content['weights_bytes'] / 1e6:.0f} MB) and {beside:.0f} MB."]
    return "\n".join(lines) + "\n"


def _plot(content: dict[str, Any]) -> bytes:
    names = ("start to first token", "peak memory")
    return bars(names, content["rows"], "PyTorch / ours, median and range", content["command"])


if __name__ == "__main__":
    conclude(main)

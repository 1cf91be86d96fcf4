"""What the forms of one bundle cost: ``--scan`` and the weights' forms, side by side.

    .venv/bin/python -m benchmarks.latency.forms --name scans --set momentum=false --forms plugin scan native
    .venv/bin/python -m benchmarks.latency.forms --name weights --preset wide --forms float32 int8 int4

Random weights, exported and verified in every form; runs alternate, and ratios refer to the first form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import titans_runtime as tr
from titans_converters.onnx.lowering import SCANS
from titans_export.config import PRESETS, overridden
from titans_export.model import TitansModel
from titans_export.pipeline import export_bundle
from titans_export.training.checkpoint import save_checkpoint
from titans_runtime.bench.machine import describe
from titans_runtime.bundle import GOLDENS_NAME
from titans_runtime.errors import CheckFailed
from titans_runtime.progress import progress_bar

RESULTS = Path(__file__).parents[1] / "results" / "latency"
_TOLERANCES = {"int8": 0.1, "int4": 0.5}  # of the largest logit; other forms compute the same
_TOLERANCE = 1e-4


def main() -> None:
    """Measure, print the table, write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--forms", nargs="+", choices=(*SCANS, "float32", "float16", "int8", "int4"))
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--edit", type=float, default=1.0)
    parser.add_argument("--name", required=True, help="of the results files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = TitansModel(overridden(PRESETS[args.preset], args.set))
        save_checkpoint(model, Path(folder, "checkpoint"))
        bundles = {form: _export(Path(folder), form) for form in args.forms}
        rows = measure(bundles, args)
    text = table(rows)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    record = {
        "arguments": vars(args),
        "machine": describe(),
        "versions": {name: version(name) for name in ("onnxruntime", "numpy", "titans-runtime")},
        "rows": rows,
    }
    (RESULTS / f"{args.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{args.name}.md").write_text(text + "\n", encoding="utf-8")


def _export(folder: Path, form: str) -> Path:
    settings = {"scan": form} if form in SCANS else {"weights": form}
    export_bundle(folder / "checkpoint", folder / form, **settings)
    return folder / form


def measure(bundles: dict[str, Path], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds by form and kind of run, round by round; and bytes."""
    ids = np.random.default_rng(0).integers(0, 256, args.prefill)
    models = {form: tr.load(bundle, threads=args.threads) for form, bundle in bundles.items()}
    scores = {form: model.session(edit=args.edit, editor=None).append(ids) for form, model in models.items()}
    first, *others = scores
    for form in others:
        error = float(np.abs(scores[form] - scores[first]).max() / np.abs(scores[first]).max())
        if not error <= _TOLERANCES.get(form, _TOLERANCE):
            raise CheckFailed(f"logits of {form} and {first} differ by {error:.1e} of the largest")
    rows: dict[str, dict[str, list[float]]] = {
        form: {"MB": [_megabytes(model)]} for form, model in models.items()
    }
    for round_ in progress_bar(range(args.rounds + 1), "rounds", "round"):
        for form, model in models.items():
            for what, run in _runs(model, bundles[form], ids, args).items():
                began = time.perf_counter()
                count = run()
                if round_:  # the first one warms up
                    rows[form].setdefault(what, []).append((time.perf_counter() - began) / count)
    return rows


def _megabytes(model: tr.Model) -> float:
    """Graphs and weights; the goldens are no part of running."""
    files = model.manifest.files
    return sum(entry.size for name, entry in files.items() if name != GOLDENS_NAME) / 1e6


def _runs(
    model: tr.Model, bundle: Path, ids: np.ndarray, args: argparse.Namespace
) -> dict[str, Callable[[], int]]:
    """What is timed; each returns by what to divide."""
    session = model.session(edit=args.edit, editor=None)
    session.append(ids[:8])
    fresh = model.session(edit=args.edit, editor=None)

    def decode() -> int:
        for token in ids[: args.decode]:
            session.append([int(token)])
        return args.decode

    def prefill() -> int:
        fresh.append(ids)
        return len(ids)

    def start() -> int:
        tr.load(bundle, threads=args.threads).session(edit=args.edit, editor=None).append([1])
        return 1

    return {f"prefill {len(ids)}": prefill, "decode": decode, "start to first token": start}


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: for every form how many times as fast as the first, with the range of its rounds."""
    first = next(iter(rows))
    kinds = [what for what in rows[first] if what != "MB"]
    lines = [f"| form | bundle, MB | {' | '.join(kinds)} |", "|---|---|" + "---|" * len(kinds)]
    for form, row in rows.items():
        cells = []
        for what in kinds:
            ratios = [a / b for a, b in zip(rows[first][what], row[what], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        lines.append(f"| {form} | {row['MB'][0]:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

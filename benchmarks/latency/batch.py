"""Tokens per second of sessions in a batch against the same sessions one by one, decoding.

    .venv/bin/python -m benchmarks.latency.batch --preset base --sessions 1 4 16

Both sides run alternately on the same tokens; the last logits are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import titans_runtime as tr
from titans_export.config import PRESETS
from titans_export.model import TitansModel
from titans_export.pipeline import export_bundle
from titans_export.training.checkpoint import save_checkpoint
from titans_runtime.errors import CheckFailed
from titans_runtime.progress import progress_bar

_TOLERANCE = 1e-4  # of the largest logit


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=8, help="of every session in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--editor", type=tr.Editor.parse, default=None, help="as in readout:step=1,chunk=8")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_checkpoint(TitansModel(PRESETS[args.preset]), Path(folder, "checkpoint"))
        export_bundle(Path(folder, "checkpoint"), Path(folder, "bundle"))
        model = tr.load(Path(folder, "bundle"), threads=args.threads)
        print("| sessions | one by one, tokens/s | batched, tokens/s | batched / one by one (range) |")
        print("|---|---|---|---|")
        for count in args.sessions:
            print(_row(model, count, args.tokens, args.rounds, args.editor))


def _row(model: tr.Model, count: int, tokens: int, rounds: int, editor: tr.Editor | None) -> str:
    single, batched = ([model.session(edit=0.0, editor=editor) for _ in range(count)] for _ in range(2))
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (rounds + 1, tokens, count, 1))
    times: list[tuple[float, float]] = []
    with model.batch(batched) as batch:
        for round_ in progress_bar(range(rounds + 1), f"{count} sessions", "round"):
            began = time.perf_counter()
            for step in ids[round_]:
                expected = [session.append(token) for session, token in zip(single, step, strict=True)]
            middle = time.perf_counter()
            for step in ids[round_]:
                actual = batch.append(list(step))
            times.append((middle - began, time.perf_counter() - middle))
    error = max(float(np.abs(a - e).max() / np.abs(e).max()) for a, e in zip(actual, expected, strict=True))
    if not error <= _TOLERANCE:
        raise CheckFailed(f"batched and single logits differ by {error:.1e}")
    one, many = (statistics.median(side) for side in zip(*times[1:], strict=True))  # the first warms up
    ratios = [a / b for a, b in times[1:]]
    return (
        f"| {count} | {tokens * count / one:.0f} | {tokens * count / many:.0f} "
        f"| **{statistics.median(ratios):.2f}** ({min(ratios):.2f}-{max(ratios):.2f}) |"
    )


if __name__ == "__main__":
    main()

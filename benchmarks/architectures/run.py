"""Bits per byte of every architecture, memory and ablation after the same short training.

    .venv/bin/python -m benchmarks.architectures.run --seeds 0 1 2

Each variant is trained on the standard library's sources without editing (λ = 0) and the paper's way
(λ = 1), and scored on the first bytes of the held-out files with editing off and on. What is done is
kept in the results file, so that a second call goes on where the first one stopped; ``--table`` only
prints what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures.variants import VARIANTS
from benchmarks.command import conclude
from titans_export.model import TitansModel, state_schema
from titans_export.training.data import Corpus, load_corpus
from titans_export.training.evaluate import bits_per_byte
from titans_export.training.loop import Trainer, TrainingConfig
from titans_runtime.errors import DataError
from titans_runtime.files import write_atomically
from titans_runtime.progress import progress_bar

RESULTS = Path(__file__).parents[1] / "results" / "architectures.json"
SCORED_BYTES = 8192
"""Of each held-out file."""

Rows = list[dict[str, Any]]


def main() -> None:
    """Train what is missing, write the results file, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: Rows = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else []
    if not args.table:
        corpus = load_corpus(["stdlib"])
        for seed in args.seeds:
            for name in args.variants:
                for trained in (0.0, 1.0):
                    if not _find(rows, name, trained, seed, args.steps):
                        rows.append(measure(name, trained, seed, args.steps, corpus))
                        write_atomically(args.results, (json.dumps(rows, indent=1) + "\n").encode())
    print(table(rows, args.steps))


def measure(name: str, trained: float, seed: int, steps: int, corpus: Corpus) -> dict[str, Any]:
    """Train one variant and score it."""
    config = VARIANTS[name]
    training = TrainingConfig(edit=trained, steps=steps, segment=256, learning_rate=3e-3, seed=seed)
    began = time.perf_counter()
    trainer = Trainer(config, training, corpus)
    failed = None
    try:
        for step in progress_bar(range(steps), f"{name}, λ = {trained:g}, seed {seed}"):
            trainer.advance(step)
    except DataError as error:  # a diverging training is a finding, too
        failed = str(error)
    seconds = time.perf_counter() - began
    model = trainer.model.eval()
    scores = {} if failed else {f"{edit:g}": _score(model, corpus, edit) for edit in (0.0, 1.0)}
    return {
        "variant": name,
        "trained": trained,
        "seed": seed,
        "steps": steps,
        "tokens": steps * training.batch * training.segment,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_bytes": state_bytes(model),
        "train_seconds": round(seconds),
        "failed": failed,
        "bits_per_byte": scores,
    }


def _score(model: TitansModel, corpus: Corpus, edit: float) -> float | None:
    bits = bits_per_byte(model, corpus.held_out, edit, SCORED_BYTES)
    return round(bits, 4) if math.isfinite(bits) else None


def state_bytes(model: TitansModel) -> int:
    """Bytes of one stream's state, the readout memory not counted: all variants have the same."""
    return sum(
        math.prod(entry.shape) * entry.dtype.itemsize
        for name, entry in state_schema(model.config).items()
        if name != "readout"
    )


def table(rows: Rows, steps: int) -> str:
    """Markdown: mean over the seeds, with the spread where there are several."""
    lines = [
        "| variant | parameters | state | trained off: off | on | trained on: on | off | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        mine = [row for row in rows if row["variant"] == name and row["steps"] == steps]
        if not mine:
            continue
        cells = [
            _cell([row for row in mine if row["trained"] == trained], edit)
            for trained, edit in ((0.0, "0"), (0.0, "1"), (1.0, "1"), (1.0, "0"))
        ]
        seeds = len({row["seed"] for row in mine})
        lines.append(
            f"| {name} | {mine[0]['parameters'] / 1e6:.2f} M | {mine[0]['state_bytes'] / 1e3:.0f} kB | "
            + " | ".join(cells)
            + f" | {seeds} |"
        )
    return "\n".join(lines)


def _cell(rows: Rows, edit: str) -> str:
    values = [row["bits_per_byte"].get(edit) for row in rows]
    known = [value for value in values if value is not None]
    if not values:
        return "–"
    if len(known) < len(values):
        return f"diverged ({len(values) - len(known)} of {len(values)})"
    spread = f" ({min(known):.3f}-{max(known):.3f})" if len(known) > 1 else ""
    return f"{statistics.mean(known):.3f}{spread}"


def _find(rows: Rows, name: str, trained: float, seed: int, steps: int) -> bool:
    key = (name, trained, seed, steps)
    return any((row["variant"], row["trained"], row["seed"], row["steps"]) == key for row in rows)


if __name__ == "__main__":
    conclude(main)

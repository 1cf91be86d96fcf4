"""The open editor beside PyTorch autograd, doing the same: a gradient of a whole period, by all memories.

    .venv/bin/python -m benchmarks.latency.open_editor --size nano --tokens 32

Both sides have the same random weights, tokens and state; their gradients are compared first. Then they run
alternately in one process, one thread: the gradient alone, and a whole lesson (gradient, step, and the model
run again over the period). PyTorch runs eagerly, with the fast forms that training uses.

Of the readout memory, edited every eight tokens, what is timed is what editing adds: a stream with the editor
less the same stream without one. The runtime takes both as a whole, since no feature depends on that memory;
PyTorch takes both in calls of eight tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch

import titans_runtime as tr
from benchmarks.command import conclude
from benchmarks.latency.models import prepared
from benchmarks.latency.plots import bars
from benchmarks.latency.results import publish
from titans_export.config import PRESETS
from titans_export.gradients import editable, prediction
from titans_export.model import TitansModel
from titans_export.peers.autograd import AutogradRunner
from titans_export.training.checkpoint import load_checkpoint
from titans_runtime.bench.machine import describe, own_versions
from titans_runtime.memories import MemoriesEditor
from titans_runtime.progress import progress_bar
from titans_runtime.report import Lesson

STEP = 0.01
READOUT_CHUNK = 8
READOUT_TOKENS = 512
GRADIENT = "gradient by all memories"
LESSON = "lesson: gradient, step, run again"
READOUT = "readout: what editing adds"


def main() -> None:
    """Compare, time, publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(PRESETS), default="nano")
    parser.add_argument("--tokens", type=int, default=32, help="of a period")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = prepared(args.size)
    model, exported = load_checkpoint(files.checkpoint), tr.load(files.bundle, threads=1)
    rows = timed(sides(model, exported, args.tokens), args.rounds)
    rows.append(added(*readout_sides(model, exported), args.rounds))
    command = f"python -m benchmarks.latency.open_editor --size {args.size} --tokens {args.tokens}"
    content = {
        "command": command,
        "machine": describe(),
        "versions": own_versions() | {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
        "rows": rows,
        "absent": [],
    }
    kinds = [str(row["kind"]) for row in rows]
    picture = bars(kinds, rows, "PyTorch autograd / ours, median and range", command)
    publish(f"open_editor-{args.size}-{args.tokens}", content, table(rows), picture)


def table(rows: list[Row]) -> str:
    """What was timed, in Markdown."""
    lines = ["| what | ours, ms | autograd, ms | autograd / ours (range) |", "|---|---|---|---|"]
    lines += [
        f"| {row['kind']} | {row['ours_ms']:.2f} | {row['autograd_ms']:.2f} "
        f"| **{row['ratio']:.2f}** ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}) |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


Side = tuple[Callable[[], object], Callable[[], object]]
Row = dict[str, Any]


def sides(model: TitansModel, exported: tr.Model, tokens: int) -> dict[str, Side]:
    """What both sides do, after their gradients were compared."""
    draw = np.random.default_rng(0)
    warm, ids, targets = (draw.integers(0, 256, count) for count in (64, tokens, tokens))
    edit, names = torch.ones(1, model.config.layers), editable(model)
    session = exported.session(edit=1.0, editor=tr.Editor.parse(f"prediction:step={STEP},chunk={tokens}"))
    with torch.no_grad():
        state = model.initial_state(1)
        state |= model(torch.tensor(warm)[None], edit, state).state
    session._buffers.overwrite(  # noqa: SLF001 - the bench compares what the editor does within
        {name: tensor.numpy() for name, tensor in state.items() if name in session._buffers.present}  # noqa: SLF001
    )
    editor = session._editing.memories  # noqa: SLF001
    assert isinstance(editor, MemoriesEditor)
    editor._anchor = session._buffers.copies()  # noqa: SLF001
    values = {name: editor._anchor[name] for name in names}  # noqa: SLF001
    batch = torch.tensor(ids)[None], torch.tensor(targets)[None]

    def our_gradient() -> dict[str, np.ndarray]:
        return editor._evaluate(values, ids, targets)  # noqa: SLF001

    def their_gradient() -> dict[str, torch.Tensor]:
        return prediction(model, *batch, edit, state)

    def our_lesson() -> dict[str, np.ndarray]:
        editor._take_steps(Lesson("prediction", 0, tokens, learnt=tokens), ids, targets, 0.0)  # noqa: SLF001
        return session._buffers.present  # noqa: SLF001

    def their_lesson() -> dict[str, torch.Tensor]:
        found = their_gradient()
        with torch.no_grad():
            edited = {name: state[name] - STEP * found[f"grad.{name}"] for name in names}
            return model(batch[0], edit, state | edited).state

    expected, after = their_gradient(), their_lesson()
    _compare({name: array for name, array in our_gradient().items() if name.startswith("grad.")}, expected)
    _compare({name: array for name, array in our_lesson().items() if name in names}, after)
    return {GRADIENT: (our_gradient, their_gradient), LESSON: (our_lesson, their_lesson)}


def _compare(ours: dict[str, np.ndarray], theirs: dict[str, torch.Tensor]) -> None:
    """Stop where the two sides do not do the same."""
    for name, array in ours.items():
        error = np.abs(array - theirs[name].numpy()).max() / theirs[name].abs().max().item()
        if not error < 1e-4:
            raise SystemExit(f"{name} differs by {error:.1e}: nothing to time")


def timed(pairs: dict[str, Side], rounds: int) -> list[Row]:
    """Both sides of every pair, alternately."""
    rows = []
    for kind, pair in pairs.items():
        for side in pair:
            side()
        rows.append(
            _row(kind, [[clocked(side) for side in pair] for _ in progress_bar(range(rounds), kind, "round")])
        )
    return rows


def _row(kind: str, rounds: list[list[float]], scale: float = 1.0) -> Row:
    """Median times and ratio of ``rounds``, which hold seconds of ours and of theirs."""
    ratios = [theirs / ours for ours, theirs in rounds]
    ours, theirs = (1000 * scale * statistics.median(side) for side in zip(*rounds, strict=True))
    return {
        "kind": kind,
        "ours_ms": ours,
        "autograd_ms": theirs,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "rounds": len(ratios),
    }


def readout_sides(model: TitansModel, exported: tr.Model) -> tuple[Side, Side]:
    """A stream with the readout's editor and without, here and by autograd; after they were compared."""
    ids = np.random.default_rng(1).integers(0, 256, READOUT_TOKENS + 1)
    editor = tr.Editor.parse(f"readout:step=0.5,chunk={READOUT_CHUNK}")

    def ours() -> np.ndarray:
        return exported.session(edit=0.0, editor=editor).append(ids)

    def ours_without() -> np.ndarray:
        return exported.session(edit=0.0, editor=None).append(ids)

    peer = AutogradRunner(model.requires_grad_(requires_grad=False), editor)

    def theirs() -> np.ndarray:
        peer.start(1, 0.0)
        return peer.append(ids[None])

    @torch.no_grad()
    def theirs_without() -> None:
        edit, state = torch.zeros(1, model.config.layers), model.initial_state(1)
        for part in torch.from_numpy(ids)[None].split(READOUT_CHUNK, dim=1):
            state = state | model(part, edit, state).state

    expected = theirs()
    error = np.abs(ours() - expected[0]).max() / np.abs(expected).max()
    if error > 1e-4:
        raise SystemExit(f"logits edited through the readout differ by {error:.1e}: nothing to time")
    return (ours, ours_without), (theirs, theirs_without)


def added(ours: Side, theirs: Side, rounds: int) -> Row:
    """What editing the readout adds to a chunk, on both sides."""
    found = [
        [clocked(edited) - clocked(plain) for edited, plain in (ours, theirs)]
        for _ in progress_bar(range(rounds), "readout", "round")
    ]
    return _row(READOUT, found, READOUT_CHUNK / READOUT_TOKENS)


def clocked(side: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    side()
    return time.perf_counter() - began


if __name__ == "__main__":
    conclude(main)

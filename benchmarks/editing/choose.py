"""Choose the editing that a checkpoint recommends, on development text alone.

    .venv/bin/python -m benchmarks.editing.choose checkpoints/nano

Scores the development files of the training corpus, and a log, for a grid of step sizes,
steps and retentions, and writes the best to ``editing.json`` in the checkpoint. What is best is judged by the
mean of the two ratios edited / unedited; where fewer steps are as good, they are taken. Nothing held
out is read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import titans_runtime as tr
from benchmarks.command import conclude
from titans_export.editing import EDITING_FILE
from titans_export.pipeline import export_bundle
from titans_export.training.checkpoint import write_json
from titans_export.training.data import Source, load_corpus
from titans_runtime.progress import progress_bar

HERE = Path(__file__).parent
SIZES = (0.6, 0.8, 1.1)
STEPS = (1, 2)
RETENTIONS = (None, 0.98, 0.95)
CHUNK = 8  # periods of 4 to 16 differ by 0.001
CLOSE = 1.002  # as good, for our purpose: fewer steps, which cost less, are taken
LIMIT = 12 * 1024
FILES = 6


def main() -> None:
    """Sweep, print the grid, write the choice."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(args.checkpoint, Path(folder, "bundle"))
        model = tr.load(Path(folder, "bundle"), threads=args.threads)
        kinds = development_texts()
        off = {kind: bits(model, sources, None) for kind, sources in kinds.items()}
        grid = {}
        for editor in progress_bar(editors(), "choosing"):
            ratios = {kind: bits(model, sources, editor) / off[kind] for kind, sources in kinds.items()}
            grid[editor] = ratios
            settings = f"step {editor.step:<4} steps {editor.steps}  retention {editor.retention or 1:<5} "
            print(settings + "  ".join(f"{kind} {ratio:.4f}" for kind, ratio in ratios.items()), flush=True)
    least = min(sum(ratios.values()) for ratios in grid.values())
    close = [editor for editor, ratios in grid.items() if sum(ratios.values()) <= CLOSE * least]
    best = min(close, key=lambda editor: (editor.steps, sum(grid[editor].values())))
    path = args.checkpoint / EDITING_FILE
    write_json(path, {"edit": 0.0, "editor": best.to_dict()})
    print(f"{path}: {json.dumps(best.to_dict())}")


def editors() -> list[tr.Editor]:
    """The grid."""
    return [
        tr.Editor(optimizer="adagrad", step=size, chunk=CHUNK, steps=steps, retention=retention)
        for size, steps, retention in itertools.product(SIZES, STEPS, RETENTIONS)
    ]


def development_texts() -> dict[str, list[Source]]:
    """The longest development files, and the development log."""
    log = HERE.parent / "data" / "alternatives.log"
    longest = sorted(load_corpus(["stdlib"]).development, key=lambda source: -len(source.data))[:FILES]
    return {
        "python": [Source(source.name, source.data[:LIMIT]) for source in longest],
        "log": [Source(log.name, log.read_bytes()[:LIMIT])],
    }


def bits(model: tr.Model, sources: list[Source], editor: tr.Editor | None) -> float:
    """Total bits of the sources, each from an empty memory."""
    return sum(
        float(tr.score(model.session(edit=0.0, editor=editor), source.data).bits.sum(dtype=float))
        for source in sources
    )


if __name__ == "__main__":
    conclude(main)

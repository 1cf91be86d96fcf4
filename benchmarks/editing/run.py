"""Does editing help? Bits per byte with an editor, without, and under controls, through exported bundles.

    .venv/bin/python -m benchmarks.editing.run checkpoints/nano [CHECKPOINT …]

One results file a checkpoint, by its folder's name; one for the same weights and editing is not made again,
and one whose checkpoint is not on this machine goes into the table as it is.
The table over all of them, which should differ in their training seed only, is printed and written to
benchmarks/results/TABLE.md.
Texts are held out: nothing was trained or tuned on them. Every byte is scored before the memory
sees it; each file begins with an empty memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import titans_runtime as tr
from benchmarks.command import conclude
from benchmarks.editing.controls import BiasOnly, ShuffledKeys
from titans_export.editing import read_editing
from titans_export.pipeline import export_bundle
from titans_export.training.data import Source, load_corpus, stdlib_folder
from titans_runtime.errors import UsageError
from titans_runtime.progress import progress_bar

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
LIMIT = 64 * 1024  # bytes of the reference manual, which is long; all other files are taken whole
COLUMNS = ("off", "on", "shuffled keys", "bias only", "xz")


def main() -> None:
    """Run what has no results yet, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", default="editing", help="name of the table's file")
    args = parser.parse_args()
    results = []
    for checkpoint in args.checkpoints:
        path = RESULTS / f"editing-{checkpoint.name}.json"
        result = measured_before(checkpoint, path)
        if checkpoint.is_dir():
            seed = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["training"]["seed"]
            subject = {"seed": seed, "weights": digest(checkpoint), "editing": read_editing(checkpoint)}
            if any(result.get(name) != value for name, value in subject.items()):
                result = subject | {"texts": measure(checkpoint, args.threads)}
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        results.append(result)
    text = table(results)
    (RESULTS / f"{args.table}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def measured_before(checkpoint: Path, path: Path) -> dict[str, Any]:
    """A results file's content, or nothing.

    Raises:
        UsageError: there is neither a checkpoint nor a results file.
    """
    if not path.exists():
        if not checkpoint.is_dir():
            raise UsageError(f"{checkpoint}: no such checkpoint, and no results of one in {path.name}")
        return {}
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def digest(checkpoint: Path) -> str:
    """Which weights were measured."""
    return hashlib.sha256((checkpoint / "weights.safetensors").read_bytes()).hexdigest()[:16]


def texts() -> dict[str, list[Source]]:
    """The held-out texts by kind."""
    log = HERE.parent / "data" / "dpkg.log"
    manual = stdlib_folder() / "pydoc_data" / "topics.py"
    python = [source for source in load_corpus(["stdlib"]).held_out if len(source.data) > 1]
    return {
        "held-out Python": python,
        "package log": [Source(log.name, log.read_bytes())],
        "reference manual": [Source(manual.name, manual.read_bytes()[:LIMIT])],
    }


def measure(checkpoint: Path, threads: int) -> dict[str, dict[str, float]]:
    """Bits per byte by kind of text and column."""
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(checkpoint, Path(folder, "bundle"))
        model = tr.load(Path(folder, "bundle"), threads=threads)
        editor = tr.Editor.from_dict(model.manifest.recommended["editor"])
        edit = float(model.manifest.recommended["edit"])  # 0, or what it was trained with: editor or none
        fused = (edit,) * model.manifest.edit_layers
        sessions: dict[str, Callable[[], tr.Session]] = {
            "off": lambda: model.session(edit, editor=None),
            "on": model.session,
            "shuffled keys": lambda: ShuffledKeys(model, fused, editor),
            "bias only": lambda: BiasOnly(model, fused, editor),
        }
        measured: dict[str, dict[str, float]] = {}
        for kind, sources in texts().items():
            row = {name: _bits(sources, session, f"{kind}, {name}") for name, session in sessions.items()}
            packed = sum(len(lzma.compress(source.data, preset=9)) for source in sources)
            measured[kind] = row | {"xz": 8 * packed / sum(len(source.data) for source in sources)}
    return measured


def _bits(sources: list[Source], session: Callable[[], tr.Session], label: str) -> float:
    total = 0.0
    for source in progress_bar(sources, label, "file"):
        total += float(tr.score(session(), source.data).bits.sum(dtype=float))
    return total / sum(len(source.data) for source in sources)


def table(results: list[dict[str, Any]]) -> str:
    """Mean over seeds, with the spread of the ratio on / off."""
    seeds = ", ".join(str(result["seed"]) for result in results)
    several = f", mean of {len(results)} training seeds ({seeds}); on / off with its range over them"
    lines = [
        f"Bits per byte{several if len(results) > 1 else f', training seed {seeds}'}.",
        "",
        "| text | " + " | ".join(COLUMNS) + " | on / off |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for kind in results[0]["texts"]:
        rows = [result["texts"][kind] for result in results]
        means = [statistics.mean(row[column] for row in rows) for column in COLUMNS]
        ratios = [row["on"] / row["off"] for row in rows]
        spread = f" ({min(ratios):.3f}-{max(ratios):.3f})" if len(rows) > 1 else ""
        lines.append(
            f"| {kind} | "
            + " | ".join("–" if math.isnan(mean) else f"{mean:.3f}" for mean in means)
            + f" | **{statistics.mean(ratios):.3f}**{spread} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    conclude(main)

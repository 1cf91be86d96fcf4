"""Every objective on one model: off, fused, association, prediction, readout, and readout with prediction.

    .venv/bin/python -m benchmarks.editing.objectives CHECKPOINT [CHECKPOINT …]

Step sizes are swept on development texts alone; the table is of held-out ones: held-out Python, another
language (the Perl of the machine), a log, English prose. Every byte is scored before a memory sees it; each
text begins with an empty memory. What is saved is set against what it costs: milliseconds a token for
every bit a token. One results file a checkpoint, benchmarks/results/objectives-NAME.json; what is there
for the same weights and settings is not made again. Writes objectives.md and objectives.png beside them,
of all checkpoints that have results.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import titans_runtime as tr
from benchmarks.command import conclude
from benchmarks.editing.choose import development_texts
from benchmarks.editing.run import RESULTS, digest, texts
from titans_export.editing import read_editing
from titans_export.pipeline import export_bundle
from titans_export.training.data import Source
from titans_runtime.optional import optional_import
from titans_runtime.progress import progress_bar

PERL = Path("/usr/share/perl")
CHUNK = 32
FUSED = ("0.1", "1")
GRID: dict[str, list[str]] = {
    "association": [f"association:chunk={CHUNK},step={step}" for step in ("1e-4", "1e-3", "1e-2")],
    "prediction": [
        *(f"prediction:chunk={CHUNK},step={step}" for step in ("0.003", "0.03", "0.3", "1", "3")),
        *(f"prediction:chunk={CHUNK},optimizer=adam,step={step}" for step in ("1e-3", "1e-2", "3e-2")),
        f"prediction:chunk={CHUNK},optimizer=muon,step=1e-2",
    ],
}
BOTH = "readout + prediction"
Way = tuple[float, tr.Editor | None]
"""``λ``, and the editor."""
_DIVERGED = "diverged"
_SEED = re.compile(r"-s\d+$")
"""At the end of a checkpoint's name."""


def main() -> None:
    """Measure what has no results yet, then write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--development-bytes", type=int, default=4096, help="of each development text")
    parser.add_argument("--bytes", type=int, default=16384, help="of each held-out text")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for checkpoint in args.checkpoints:
        path = RESULTS / f"objectives-{checkpoint.name}.json"
        subject = {
            "weights": digest(checkpoint),
            "editing": read_editing(checkpoint),
            "trained_with_edit": trained_edit(checkpoint),
            "development_bytes": args.development_bytes,
            "bytes": args.bytes,
        }
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if any(before.get(name) != value for name, value in subject.items()):
            result = subject | measure(checkpoint, args)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    results = all_measured()
    (RESULTS / "objectives.md").write_text(page(results), encoding="utf-8")
    plot(results)
    print(page(results), end="")


def all_measured() -> dict[str, dict[str, Any]]:
    """The results of every checkpoint that has some, by its name."""
    return {
        path.stem.removeprefix("objectives-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("objectives-*.json"), key=lambda path: path.stem)
    }


def page(results: dict[str, dict[str, Any]]) -> str:
    """The tables of ``results``."""
    return "\n".join(lines(results)) + "\n"


def trained_edit(checkpoint: Path) -> float:
    """The fused rule's strength in training: editing is measured on top of it."""
    return float(json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["training"]["edit"])


def held_out(limit: int) -> dict[str, bytes]:
    """One text of each kind, longest first; a kind that the machine has not is left out."""
    found = {kind: max(sources, key=lambda source: len(source.data)) for kind, sources in texts().items()}
    perl = sorted(PERL.rglob("*.pm"), key=lambda file: (-file.stat().st_size, file.name))[:20]
    if perl:
        found["Perl"] = Source(perl[-1].name, perl[-1].read_bytes())
    return {kind: source.data[:limit] for kind, source in found.items()}


def measure(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Sweep on development texts, then score the held-out ones with the best of every objective."""
    base = trained_edit(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(checkpoint, Path(folder, "bundle"))
        model = tr.load(Path(folder, "bundle"), threads=args.threads)
        own = read_editing(checkpoint)["editor"]
        readout = tr.Editor.from_dict(own) if own else tr.Editor(step=1.5, chunk=8, optimizer="adagrad")
        development = {
            kind: max(sources, key=lambda source: len(source.data)).data[: args.development_bytes]
            for kind, sources in development_texts().items()
        }
        chosen, swept = sweep(model, base, candidates(base, readout), development)
        ways = {"off": (base, None), "readout": (base, readout)} | chosen
        measured: dict[str, dict[str, Any]] = {}
        for kind, text in held_out(args.bytes).items():
            measured[kind] = {"xz": 8 * len(lzma.compress(text, preset=9)) / len(text)}
            for name, (edit, editor) in progress_bar(list(ways.items()), kind, "way"):
                measured[kind][name] = scored(model, edit, editor, text)
    settings = {name: way(edit, editor) for name, (edit, editor) in ways.items()}
    return {"ways": settings, "sweep": swept, "texts": measured}


def way(edit: float, editor: tr.Editor | None) -> str:
    """How a session was run, in words."""
    return f"λ = {edit:g}" + ("" if editor is None else f", {json.dumps(editor.to_dict())}")


def candidates(base: float, readout: tr.Editor) -> dict[str, dict[str, Way]]:
    """What is tried, by objective: strength of the fused rule, and editor, by specification.

    The steps of ``prediction`` beside the readout's editor are swept by themselves.
    """
    found: dict[str, dict[str, Way]] = {
        # A model trained with λ = 1 is run with less of it.
        "fused": {text: (1.0 - float(text) if base else float(text), None) for text in FUSED}
    }
    for objective, specifications in GRID.items():
        found[objective] = {text: (base, tr.Editor.parse(text)) for text in specifications}
    found[BOTH] = {
        text: (base, tr.Editor.from_dict(readout.to_dict() | {"also": tr.Editor.parse(text).to_dict()}))
        for text in GRID["prediction"]
    }
    return found


def sweep(
    model: tr.Model, base: float, tried: dict[str, dict[str, Way]], development: dict[str, bytes]
) -> tuple[dict[str, Way], dict[str, float | None]]:
    """The best of every objective, and mean edited / unedited bits of all that were tried."""
    off = {kind: scored(model, base, None, text)["bits"] for kind, text in development.items()}
    chosen: dict[str, Way] = {}
    swept: dict[str, float | None] = {}
    for objective, ways in tried.items():
        least = math.inf
        for text, (edit, editor) in progress_bar(list(ways.items()), f"sweeping {objective}", "setting"):
            bits = {kind: scored(model, edit, editor, own)["bits"] for kind, own in development.items()}
            known = all(isinstance(value, float) for value in bits.values())
            ratio = statistics.mean(bits[kind] / off[kind] for kind in bits) if known else math.inf
            swept[f"{objective} {text}"] = ratio if known else None
            if ratio < least or objective not in chosen:
                least, chosen[objective] = ratio, (edit, editor)
    return chosen, swept


def scored(model: tr.Model, edit: float, editor: tr.Editor | None, text: bytes) -> dict[str, Any]:
    """Bits a byte and milliseconds a byte; ``diverged`` where the memory grew without bound."""
    try:
        score = tr.score(model.session(edit=edit, editor=editor), text)
    except tr.NumericsError:
        return {"bits": _DIVERGED, "ms": None}
    return {"bits": score.bits_per_token, "ms": 1000 * score.seconds / len(text)}


def lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """A table for each checkpoint."""
    written = []
    for name, result in results.items():
        ways = list(result["ways"])
        written += [
            _heading(name, result),
            "",
            "| text | xz | " + " | ".join(ways) + " |",
            "|---|---|" + "---|" * len(ways),
        ]
        for kind, row in result["texts"].items():
            cells = [_cell(row[one], row["off"]) for one in ways]
            written.append(f"| {kind} | {row['xz']:.3f} | " + " | ".join(cells) + " |")
        written += ["", *(f"* {one}: `{setting}`" for one, setting in result["ways"].items()), ""]
    return written


def _heading(name: str, result: dict[str, Any]) -> str:
    return (
        f"`{name}`, trained with λ = {result['trained_with_edit']:g}, {result['bytes']:,} bytes a text. "
        "Bits per byte; in brackets ms a byte for every bit saved."
    )


def _cell(own: dict[str, Any], off: dict[str, Any]) -> str:
    if own["bits"] == _DIVERGED:
        return _DIVERGED
    saved = off["bits"] - own["bits"]
    cost = f" ({(own['ms'] - off['ms']) / saved:.2f})" if saved > 0.005 else ""
    return f"{own['bits']:.3f}{cost}"


def plot(results: dict[str, dict[str, Any]]) -> None:
    """Edited / unedited bits by text and way, a panel for checkpoints that differ in their seed only."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        panels.setdefault(_SEED.sub("", name), []).append(result)
    figure = optional_import("matplotlib.figure", "plot").Figure(
        figsize=(9, 3.2 * len(panels) + 0.4), layout="constrained"
    )
    drawn = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (name, seeds) in zip(drawn, panels.items(), strict=True):
        texts = list(seeds[0]["texts"])
        ways = dict.fromkeys(one for seed in seeds for one in seed["ways"] if one != "off")
        for number, one in enumerate(ways):  # a way may have been measured for some seeds only
            own = [seed for seed in seeds if one in seed["ways"]]
            ratios = [[_ratio(seed["texts"][text], one) for seed in own] for text in texts]
            means = [statistics.mean(row) for row in ratios]
            reach = [
                [mean - min(row) for row, mean in zip(ratios, means, strict=True)],
                [max(row) - mean for row, mean in zip(ratios, means, strict=True)],
            ]
            places = [place + number * 0.15 for place in range(len(texts))]
            axes.bar(places, means, width=0.14, label=one, yerr=reach if len(own) > 1 else None, capsize=2)
        axes.axhline(1.0, color="black", lw=0.8)
        axes.set_xticks([place + 0.3 for place in range(len(texts))], texts)
        axes.set_ylabel("edited / unedited bits")
        spread = f", {len(seeds)} seeds, mean and range" if len(seeds) > 1 else ""
        axes.set_title(f"{name}, trained with λ = {seeds[0]['trained_with_edit']:g}{spread}", fontsize=9)
    figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(RESULTS / "objectives.png", dpi=120)


def _ratio(row: dict[str, Any], one: str) -> float:
    return math.nan if row[one]["bits"] == _DIVERGED else float(row[one]["bits"] / row["off"]["bits"])


if __name__ == "__main__":
    conclude(main)

"""Cost along a stream: time of a decoded token, bytes of state and of the process, up to a million tokens.

    .venv/bin/python -m benchmarks.latency.flat --editing off

A stream of source code runs through the shipped model. Its state is kept at some positions, and decode runs
from all of them alternate, so that the ratio of two does not depend on what the machine did meanwhile.
``--one-by-one`` takes the stream itself token by token, in place of segments.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

import titans_runtime as tr
from benchmarks.command import conclude
from benchmarks.latency.results import RESULTS, publish
from titans_export.pipeline import export_bundle
from titans_export.training.data import load_corpus
from titans_runtime.backends import Array
from titans_runtime.bench.measure import Case, Contestant, Measurement, measure
from titans_runtime.bench.peers import Job
from titans_runtime.bench.report import Record, record
from titans_runtime.forward import SEGMENT
from titans_runtime.progress import progress_bar

FIRST, LAST = 1_000, 1_000_000
POSITIONS = (FIRST, 3_000, 10_000, 30_000, 100_000, 200_000, 400_000, 600_000, 800_000, LAST)
_LIMIT = 1.03  # of the time at the last position over that at the first


class At:
    """The stream from one of its positions on, as a backend to be timed."""

    is_model = False  # every position continues another text

    def __init__(self, session: tr.Session, snapshot: tr.Snapshot) -> None:
        """``session``: serves all positions, one after the other."""
        self._session, self._snapshot = session, snapshot
        self.versions: Mapping[str, str] = {}

    def start(self, batch: int, edit: float) -> None:
        """Go to the position."""
        del batch, edit  # the snapshot has them
        self._session.restore(self._snapshot)

    def append(self, ids: Array) -> Array:
        """Decode."""
        return self._session.append(ids[0])[None]

    def close(self) -> None:
        """Nothing to do."""


def main() -> None:
    """Stream, measure, publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/nano"))
    parser.add_argument(
        "--editing", choices=("off", "on"), default="off", help="as the checkpoint recommends"
    )
    parser.add_argument("--tokens", type=int, default=256, help="of a timed run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--one-by-one", action="store_true", help="takes many times as long")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "bundle")
        export_bundle(args.checkpoint, bundle)
        model = tr.load(bundle, threads=1)
        session = model.session(edit=0.0, editor=None) if args.editing == "off" else model.session()
        snapshots, resident = _stream(session, args.one_by_one)
        job = Job(bundle, None, 1, Path(folder))
        contestants = [
            Contestant(f"{at:,}", lambda _, at=at: At(session, snapshots[at]), job) for at in POSITIONS
        ]
        case = Case("decode", args.tokens, 1, session.edit[0])
        bar = partial(progress_bar, description="rounds", unit="round")
        measured = measure(contestants, [case], model.vocab_size, args.rounds, progress=bar)
    _publish(args, case, measured, snapshots, resident)


def _stream(session: tr.Session, one_by_one: bool) -> tuple[dict[int, tr.Snapshot], dict[int, int]]:
    """The state at every position, and the process's resident bytes there."""
    text = b"".join(source.data for source in load_corpus(["stdlib"]).train)
    ids = np.resize(np.frombuffer(text, np.uint8), LAST).astype(np.int64)
    snapshots, resident = {}, {}
    for at in progress_bar(POSITIONS, "streaming", "position"):
        for start, end in _parts(session.position, at, 1 if one_by_one else SEGMENT):
            session.append(ids[start:end])
        resident[at] = _resident_bytes()
        snapshots[at] = session.snapshot()
    return snapshots, resident


def _parts(start: int, end: int, length: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, length):
        yield at, min(at + length, end)


def _resident_bytes() -> int:
    """Of this process, where the system says so."""
    status = Path("/proc/self/statm")
    return int(status.read_text(encoding="ascii").split()[1]) * 4096 if status.exists() else 0


def _publish(
    args: argparse.Namespace,
    case: Case,
    measured: Measurement,
    snapshots: dict[int, tr.Snapshot],
    resident: dict[int, int],
) -> None:
    command = f"python -m benchmarks.latency.flat --editing {args.editing}"
    command += " --one-by-one" if args.one_by_one else ""
    content = record(measured, command)
    sizes = {
        at: sum(array.nbytes for array in snapshot.arrays.values()) for at, snapshot in snapshots.items()
    }
    content["state_bytes"] = {str(at): size for at, size in sizes.items()}
    content["resident_bytes"] = {str(at): size for at, size in resident.items()}
    first, last = (np.array(measured.row(f"{at:,}", case).seconds) for at in (FIRST, LAST))
    ratios = last / first
    content["last_over_first"] = {
        "median": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max()),
        "limit": _LIMIT,
    }  # fmt: skip
    name = f"flat-editing-{args.editing}{'-one-by-one' if args.one_by_one else ''}"
    publish(name, content, _table(content), _plot(content))
    print(RESULTS / f"{name}.md")


def _table(content: Record) -> str:
    lines = [
        "| position | µs a token | over the first (range) | state, bytes | process, MB |",
        "|---|---|---|---|---|",
    ]
    for row, (at, size) in zip(content["rows"], content["state_bytes"].items(), strict=True):
        resident = content["resident_bytes"][at] / 1e6
        lines.append(
            f"| {int(at):,} | {row['seconds_per_token'] * 1e6:.0f} | {row['ratio']:.3f} "
            f"({row['ratio_low']:.3f}-{row['ratio_high']:.3f}) | {size:,} | {resident:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _plot(content: Record) -> bytes:
    import io

    from matplotlib import pyplot as plt

    positions = [int(at) for at in content["state_bytes"]]
    rows = content["rows"]
    figure, (time, size) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, height_ratios=[2, 1])
    spread = [
        [row["ratio"] - row["ratio_low"] for row in rows],
        [row["ratio_high"] - row["ratio"] for row in rows],
    ]
    time.errorbar(positions, [row["ratio"] for row in rows], spread, marker="o", capsize=3, color="#c2571a")
    time.axhline(_LIMIT, color="#888888", linestyle="--", linewidth=0.8)
    time.set_ylim(0, max(1.25, *(row["ratio_high"] for row in rows)) * 1.05)
    time.set_ylabel(f"decode time over that\nat position {FIRST:,}")
    size.plot(
        positions, [size_ / 1e6 for size_ in content["state_bytes"].values()], marker="o", label="state"
    )
    size.set_ylim(bottom=0)
    size.set_ylabel("state, MB")
    size.set_xlabel("position in the stream, tokens")
    size.set_xscale("log")
    figure.suptitle(content["command"], fontsize=8)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    plt.close(figure)
    return image.getvalue()


if __name__ == "__main__":
    conclude(main)

"""``titans bench``: options to contestants and cases, and the report in the formats asked for."""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from titans_runtime.backends.choose import check_threads
from titans_runtime.bench.measure import Absent, Case, Contestant, Measurement, cases, measure
from titans_runtime.bench.options import FORMATS, REFERENCE, TOLERANCES
from titans_runtime.bench.peers import Job, find_loader, known_backends
from titans_runtime.bench.report import Record, record, to_csv, to_json, to_markdown
from titans_runtime.bundle import open_bundle
from titans_runtime.editor import Editor
from titans_runtime.errors import EnvironmentProblem, UsageError
from titans_runtime.files import why_unwritable, write_output
from titans_runtime.progress import progress_bar

Value = TypeVar("Value", int, float)

_TEXT: dict[str, Callable[[Record], str]] = {"md": to_markdown, "csv": to_csv, "json": to_json}


def run_bench(args: argparse.Namespace, command: str) -> tuple[str, bool]:
    """Measure and report.

    Args:
        args: parsed by :func:`titans_runtime.bench.options.add_options`.
        command: that reproduces it, for the report.

    Returns:
        What goes to stdout, and whether every backend that ran computed what the reference computes.

    Raises:
        UsageError: an option cannot be meant.
        BundleError: the bundle is damaged.
    """
    formats = _formats(args)
    wanted = cases(
        _numbers("-p", args.prefill, int, 0),
        _numbers("-n", args.decode, int, 0),
        _numbers("-b", args.batch, int, 1),
        _numbers("-e", args.edit, float, 0),
    )
    threads = _numbers("-t", args.threads, int, 1)
    for count in threads:
        check_threads(count)
    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        raise UsageError(f"--tolerance {args.tolerance}: it must be a finite number, 0 or more")
    if any(case.edit > 1 for case in wanted):
        raise UsageError(f"-e {args.edit}: must lie between 0 and 1")
    total = Measurement()
    with _folder(args.work) as work:
        for count in threads:
            result = _measure(args, wanted, count, work)
            total.rows += result.rows
            total.absent += result.absent
            total.versions |= result.versions
    return _publish(record(total, command), formats, args.out), not any(one.refused for one in total.absent)


def _measure(args: argparse.Namespace, wanted: list[Case], threads: int, work: Path) -> Measurement:
    bundle = open_bundle(args.bundle)
    if bundle.manifest.vocab_size < 1:
        raise UsageError(f"{args.bundle}: takes vectors; bench times models of token ids")
    editor = Editor.parse(args.editor) if args.editor else None
    job = Job(args.bundle, args.checkpoint, threads, work, editor)
    contestants, absent = _contestants(args, job)
    result = measure(
        contestants,
        wanted,
        bundle.manifest.vocab_size,
        args.rounds,
        progress=lambda rounds: progress_bar(rounds, f"{threads} threads", "round"),
    )
    result.absent[:0] = absent
    return result


def _contestants(args: argparse.Namespace, job: Job) -> tuple[list[Contestant], list[Absent]]:
    reference = find_loader(REFERENCE)
    own = _tolerance(args, job.bundle)
    contestants, absent = [Contestant(REFERENCE, reference, job, own)], []
    for name in _backends(args.backend):
        try:
            contestants.append(Contestant(name, find_loader(name), job, own))
        except EnvironmentProblem as error:
            absent.append(Absent(name, job.threads, str(error)))
    for text in args.beside:
        contestants.append(_beside(args, text, job, {one.name for one in contestants}))
    return contestants, absent


def _tolerance(args: argparse.Namespace, *bundles: Path) -> float:
    """What is asked for; else the widest of the bundles' types of weights, as their manifests say them."""
    if args.tolerance is not None:
        return float(args.tolerance)
    types = (open_bundle(bundle).manifest.model.get("weights") for bundle in bundles)
    return max(TOLERANCES.get(str(name), TOLERANCES["float32"]) for name in types)


def _beside(args: argparse.Namespace, text: str, job: Job, taken: set[str]) -> Contestant:
    """Another bundle, in the reference's backend or in one that is named before it: ``[BACKEND:]BUNDLE``."""
    backend, colon, path = text.partition(":")
    if not colon or backend not in known_backends():
        backend, path = REFERENCE, text
    folder = Path(path)
    label = folder.resolve().name if backend == REFERENCE else f"{backend}, {folder.resolve().name}"
    if label in taken:
        raise UsageError(f"--beside {text}: {label!r} is taken; give its folder another name")
    # A bundle that is not there is no missing backend: nothing is timed.
    open_bundle(folder)
    tolerance = _tolerance(args, job.bundle, folder)
    other = Job(folder, job.checkpoint if backend != REFERENCE else None, job.threads, job.work, job.editor)
    return Contestant(label, find_loader(backend), other, tolerance)


def _backends(text: str) -> list[str]:
    names = known_backends() if text == "all" else [name.strip() for name in text.split(",")]
    return [name for name in dict.fromkeys(names) if name != REFERENCE]


def _formats(args: argparse.Namespace) -> list[str]:
    formats: list[str] = args.output.split(",")
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"-o {name}: unknown; there are {', '.join(FORMATS)}")
    if "plot" in formats and args.out is None:
        raise UsageError("-o plot: give --out STEM, to write STEM.png")
    for path in _files(args.out, formats) if args.out is not None else ():
        if reason := why_unwritable(path):
            raise UsageError(f"--out {args.out}: {reason}")
    return formats


def _files(out: Path, formats: Sequence[str]) -> list[Path]:
    return [out.with_name(f"{out.name}.{'png' if name == 'plot' else name}") for name in formats]


def _publish(content: Record, formats: Sequence[str], out: Path | None) -> str:
    if out is None:
        return "\n".join(_TEXT[name](content) for name in formats)
    written = []
    for name, path in zip(formats, _files(out, formats), strict=True):
        write_output(path, _content(name, content))
        written.append(str(path))
    return "\n".join(written)


def _content(name: str, content: Record) -> bytes:
    if name == "plot":
        from titans_runtime.bench.plot import to_png

        return to_png(content)
    return _TEXT[name](content).encode()


def _numbers(option: str, text: str, kind: Callable[[str], Value], least: int) -> list[Value]:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers separated by commas") from None
    if not all(value >= least for value in values):
        raise UsageError(f"{option} {text}: must be {least} or more")
    return values


@contextlib.contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)

"""What the commands of ``titans`` do. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import codecs
import json
import math
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from titans_runtime import scoring
from titans_runtime.bundle import MANIFEST_NAME, open_bundle
from titans_runtime.compare import Difference, compare
from titans_runtime.editor import Editor, specification
from titans_runtime.errors import DataError, NumericsError, TitansError, UsageError
from titans_runtime.files import why_unwritable, write_output
from titans_runtime.forward import SEGMENT
from titans_runtime.model import RECOMMENDED, load
from titans_runtime.page import Page, facts_of
from titans_runtime.progress import progress_bar, progress_counter
from titans_runtime.report import EditLog
from titans_runtime.session import Session
from titans_runtime.state import describe_snapshot, read_snapshot
from titans_runtime.verify import verify as verify_bundle


def verify(args: argparse.Namespace) -> int:
    """Replay the goldens; exit code 1 where one differs."""
    tolerances = dict(_tolerance(text) for text in args.atol)
    report = verify_bundle(args.bundle, tolerances, args.rtol, args.provider, args.threads, args.backend)
    if args.json:
        checks = [
            {"name": c.name, "error": _json_number(c.error), "limit": c.limit, "passed": c.passed}
            for c in report.checks
        ]
        print(json.dumps({"passed": report.passed, "checks": checks, "placements": dict(report.placements)}))
    else:
        print("\n".join(report.lines()))
    return 0 if report.passed else 1


def inspect(args: argparse.Namespace) -> int:
    """Describe a bundle or a memory file, or compare two memory files."""
    if args.other is not None:
        return _compare(args)
    if args.path.is_dir():
        _print_fields(_bundle_fields(args.path), args.json)
    elif args.path.name == MANIFEST_NAME:
        _print_fields(_bundle_fields(args.path.parent), args.json)
    else:
        _print_fields(describe_snapshot(args.path), args.json)
    return 0


def _compare(args: argparse.Namespace) -> int:
    for path in (args.path, args.other):
        if path.is_dir():
            raise UsageError(f"inspect {path}: is a folder; only memories are compared: give two files")
    one, other = read_snapshot(args.path), read_snapshot(args.other)
    differences = compare(one, other)
    memories: list[dict[str, Any]] = [
        {"file": str(path), "position": memory.position, "edit": list(memory.edit), "editor": memory.editor}
        for path, memory in ((args.path, one), (args.other, other))
    ]
    if args.json:
        found = [asdict(difference) | {"relative": difference.relative} for difference in differences]
        print(json.dumps({"memories": memories, "differences": found}))
    else:
        _print_comparison(memories, differences)
    return 0


def _print_comparison(memories: list[dict[str, Any]], differences: list[Difference]) -> None:
    for name, memory in zip("AB", memories, strict=True):
        edit = ", ".join(f"{strength:g}" for strength in memory["edit"])
        print(f"{name}  {memory['file']}: position {memory['position']:,}, edit {edit}")
        print(f"   editor {specification(memory['editor'])}")
    width = max((len(line.name) for line in differences), default=0)
    print(f"{'tensor':<{width}}  {'norm in A':>11}  {'norm in B':>11}  {'distance':>11}  relative  changed")
    for line in differences:
        first, second = line.norms
        print(
            f"{line.name:<{width}}  {first:>11.4g}  {second:>11.4g}  {line.distance:>11.4g}  "
            f"{line.relative:>8.3f}  {100 * line.changed:>6.1f}%"
        )


def run(args: argparse.Namespace) -> int:
    """Score a file."""
    _check_prepare(args)
    text = _read(args.file)
    context = _read(args.prepare) if args.prepare is not None else b""
    _check_outputs(args, {"--state-out": args.state_out, "--report": args.report, "--log": args.log})
    session = _open_session(args)
    _require_bytes(session, "run")
    if args.log:
        _require_editor(session, "--log")
    session.log = EditLog()
    unedited = _unedited(session) if args.report else None
    prepared = _prepare(session, context, args.passes or 1)
    began, told = session.position, len(session.log)
    score = _score(session, text, args)
    if args.log:
        session.log.save(args.log)
    if args.state_out:
        session.save(args.state_out)
    fields = {
        "bits_per_byte": round(score.bits_per_token, 4),
        "bytes": len(text),
        "seconds": round(score.seconds, 3),
        "tokens_per_second": round(score.tokens_per_second, 1),
        "edit": list(session.edit),
        "editor": session.editor.to_dict() if session.editor else None,
        "position": session.position,
        "bundle": session.model.manifest.identity,
    }
    fields |= {"prepared": prepared} if prepared else {}
    if unedited is not None:
        if context:
            scoring.score(unedited, context, _bar(context, "preparing without editing"))
        off = scoring.score(unedited, text, _bar(text, "scoring without editing"))
        facts = facts_of(fields, off.bits_per_token, score.bits_per_token)
        lessons = session.log.lessons[told:]  # those of the context belong to another text
        page = Page(_name(args.file), text, score.bits, off.bits, lessons, facts, began)
        write_output(args.report, page.render().encode("utf-8", "replace"))
    _print_fields(fields, args.json)
    return 0


def _score(session: Session, text: bytes, args: argparse.Namespace) -> scoring.Score:
    """Score the file. Where that ends early, Ctrl-C included, the log keeps what was learnt until then."""
    began = session.position
    try:
        return scoring.score(session, text, _bar(text, "scoring"))
    except NumericsError as error:
        kept = _save_lessons(session, args.log)
        place = f"{_name(args.file)}: in the call that began at byte {session.position - began:,}"
        raise NumericsError(f"{place}: {error}{kept}") from None
    except BaseException:
        _save_lessons(session, args.log)
        raise


def _save_lessons(session: Session, path: Path | None) -> str:
    """Write the log of a run that has failed, and say so; a log that cannot be written is no other error."""
    if path is None or not session.log:  # an older file is worth more than an empty one
        return ""
    try:
        session.log.save(path)
    except TitansError as error:
        return f"; {error}"
    return f"; {path} has the lessons before it"


def _name(file: str) -> str:
    return "standard input" if file == "-" else Path(file).name


def _check_prepare(args: argparse.Namespace) -> None:
    if args.prepare is None and args.passes is not None:
        raise UsageError(f"--passes {args.passes}: passes over what? give --prepare FILE, too")
    if args.passes is not None and args.passes < 1:
        raise UsageError(f"--passes {args.passes}: must be 1 or more")
    if args.prepare == "-" == getattr(args, "file", None):
        raise UsageError("--prepare -: standard input is the file to score, too; name another")


def _prepare(session: Session, context: bytes, passes: int) -> dict[str, Any]:
    """Learn from a context, if there is one, and say what came of it."""
    if not context:
        return {}
    _require_editor(session, "--prepare")
    with progress_counter(passes * len(context), "preparing", "B", scaled=True) as watch:
        reports = session.prepare(context, passes, watch=watch)
    told: dict[str, Any] = {
        "bytes": len(context),
        "passes": passes,
        "loss": [_json_number(round(report.loss, 4)) for report in reports],
    }
    objectives = dict.fromkeys(name for report in reports for name in report.losses)
    if len(objectives) > 1:
        told["losses"] = {
            name: [_json_number(round(report.losses.get(name, math.nan), 4)) for report in reports]
            for name in objectives
        }
    return told


def _bar(text: bytes, label: str) -> Iterable[int]:
    starts = scoring.segment_starts(len(text))
    return progress_bar(starts, label, unit="B", scale=min(len(text), SEGMENT))


def _unedited(session: Session) -> Session:
    """A session that goes on from the same state, and edits nothing."""
    plain = session.model.session(edit=0.0, editor=None)
    if session.position:
        state = session.snapshot()
        arrays = {name: array for name, array in state.arrays.items() if name.startswith(("state.", "last_"))}
        plain.restore(replace(state, arrays=arrays, edit=plain.edit, editor=None))
    return plain


def generate(args: argparse.Namespace) -> int:
    """Continue a text, printing it as it comes."""
    _check_prepare(args)
    context = _read(args.prepare) if args.prepare is not None else b""
    _check_outputs(args, {"--state-out": args.state_out})
    session = _open_session(args)
    _require_bytes(session, "generate")
    if args.learn:
        _require_editor(session, "--learn")
    _prepare(session, context, args.passes or 1)
    prompt = args.prompt.encode("utf-8", "surrogateescape")  # the bytes as they were typed
    if prompt:
        session.append(prompt)
    elif session.position == 0:
        raise UsageError(
            "generate: give --prompt TEXT, or --state-in MEMORY or --prepare FILE to continue from"
        )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens = session.generate(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, args.learn
    )
    for token in tokens:
        print(decoder.decode(bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))
    if args.state_out:
        session.save(args.state_out)
    return 0


def bench(args: argparse.Namespace) -> int:
    """Time backends side by side; exit code 1 where one computed something else."""
    from titans_runtime.bench.command import run_bench

    text, agreed = run_bench(args, shlex.join(["titans", *sys.argv[1:]]))
    print(text.rstrip())
    return 0 if agreed else 1


def serve(args: argparse.Namespace) -> int:
    """Serve over HTTP until a signal comes."""
    from titans_runtime.serving.command import serve as serve_bundle

    return serve_bundle(args)


def _open_session(args: argparse.Namespace) -> Session:
    chosen = args.no_edit or args.edit is not None or args.editor is not None
    if args.no_edit and (args.edit is not None or args.editor is not None):
        raise UsageError("--no-edit excludes --edit and --editor")
    if args.state_in and chosen:
        raise UsageError("--state-in continues with the memory's own editing; leave out the editing options")
    model = load(args.bundle, args.provider, args.threads, args.backend)
    if args.state_in:
        return model.load_session(args.state_in)
    if args.no_edit:
        return model.session(edit=0.0, editor=None)
    editor = RECOMMENDED if args.editor is None else _editor(args.editor)
    session = model.session(RECOMMENDED if args.edit is None else args.edit, editor)
    if not (chosen or session.editor or any(session.edit)):
        note = "titans: this bundle recommends no editing, so nothing is learnt; try --editor readout"
        print(note, file=sys.stderr)
    return session


def _require_editor(session: Session, option: str) -> None:
    if session.editor is None:
        raise UsageError(f"{option}: nothing would learn; give an editor, as in --editor readout")


def _check_outputs(args: argparse.Namespace, outputs: dict[str, Path | None]) -> None:
    """Before minutes of work: that every file can be written, and that none takes another's place."""
    taken = {Path(args.file).resolve(): "the file to score"} if getattr(args, "file", "-") != "-" else {}
    if args.prepare not in (None, "-"):
        taken.setdefault(Path(args.prepare).resolve(), "--prepare")
    for option, path in outputs.items():
        if path is None:
            continue
        if reason := why_unwritable(path):
            raise UsageError(f"{option} {path}: {reason}")
        if path.resolve().is_relative_to(args.bundle.resolve()):
            raise UsageError(f"{option} {path}: lies in the bundle, which must stay as it is; name another")
        if option != "--state-out" and args.state_in is not None:
            taken.setdefault(args.state_in.resolve(), "--state-in")
        if path.resolve() in taken:
            raise UsageError(f"{option} {path}: is {taken[path.resolve()]}, too; name another")
        taken[path.resolve()] = option


def _require_bytes(session: Session, command: str) -> None:
    tokenizer = session.model.manifest.tokenizer
    if tokenizer != "bytes":
        raise UsageError(
            f"{command}: the bundle's tokenizer is {tokenizer!r}, which no text goes into; "
            "use titans_runtime.load(...).session() from Python"
        )


def _editor(text: str) -> Editor | None:
    return None if text == "none" else Editor.parse(text)


def _read(name: str) -> bytes:
    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None
    if not text:
        raise DataError(f"{name}: is empty; give at least one byte")
    return text


def _tolerance(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition(":")
    try:
        return name, float(value)
    except ValueError:
        raise UsageError(f"--atol {text}: expected a number, or OUTPUT:NUMBER") from None


def _json_number(value: float) -> float | None:
    """The number, or null: JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _bundle_fields(folder: Path) -> dict[str, Any]:
    manifest = open_bundle(folder).manifest
    return {
        "format_version": manifest.format_version,
        "identity": manifest.identity,
        "producer": manifest.producer,
        "requires": manifest.requires,
        "model": manifest.model,
        "tokenizer": manifest.tokenizer,
        "graphs": {name: graph.file for name, graph in manifest.graphs.items()},
        "state_bytes_per_session": manifest.state_bytes,
        "recommended": manifest.recommended,
        "files": {name: entry.size for name, entry in manifest.files.items()},
    }


def _print_fields(fields: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(fields))
        return
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            print(f"{name}:")
            inner = max(len(key) for key in value)
            for key, item in value.items():
                print(f"  {key:<{inner}}  {item}")
        else:
            print(f"{name:<{width}}  {value}")

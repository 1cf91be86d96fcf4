"""The main job on real input: export, verify, run and edit without PyTorch, save, restore, time, plot."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titans_export.demo.plot import plot_bits
from titans_runtime.errors import CheckFailed, DataError
from titans_runtime.forward import SEGMENT

_WORKER = Path(__file__).with_name("worker.py")
_FILES = 3  # held-out source files that are streamed
_LIMIT = 48 * 1024  # bytes of each text
_LEAST = 16 * 1024  # a shorter file shows little
_THREADS = 1
_PREFILL, _DECODE = 512, 64  # tokens that are timed
_BYTES = 256


@dataclass(frozen=True)
class _Text:
    name: str
    path: Path

    def job(self) -> dict[str, Any]:
        return {"name": self.name, "path": str(self.path), "limit": _LIMIT}


def run_demo(checkpoint: Path, log: Path, out: Path) -> None:
    """Show the whole way from a checkpoint to a memory that learns; prints as it goes.

    Args:
        checkpoint: a trained checkpoint with its ``training.json``.
        log: a text unlike the training text.
        out: folder for the bundle, the saved memory and the plot.

    Raises:
        DataError: the checkpoint or a text is missing.
        CheckFailed: a step does not do what it claims.
    """
    from titans_export.pipeline import export_bundle

    texts = [*_held_out(checkpoint), _Text(log.name, log)]
    if not log.is_file():
        raise DataError(f"{log}: no such file; run the demo in a checkout, or give --log FILE")
    if log.stat().st_size < 2 * SEGMENT:
        raise DataError(f"{log}: {log.stat().st_size} bytes; the demo needs {2 * SEGMENT} or more")
    out.mkdir(parents=True, exist_ok=True)
    bundle = out / "bundle"
    _title(f"1. Export {checkpoint} to ONNX and replay its goldens in ONNX Runtime")
    result = export_bundle(checkpoint, bundle, report=lambda line: print(f"   {line}"))
    worst = max(check.error / check.limit for check in result.checks if check.limit)
    print(
        f"   {result.lines()[-1]} of the token loop in float64; the largest error is {worst:.0%} of its limit"
    )
    streamed = _stream(bundle, texts, out)
    _resume(bundle, texts, out)
    _time(checkpoint, bundle)
    _title("5. The picture")
    plot_bits([(text.name, *streamed[index]) for index, text in enumerate(texts)], out / "demo.png")
    print(f"   {out / 'demo.png'}")


def _held_out(checkpoint: Path) -> list[_Text]:
    """The longest held-out files of the checkpoint's training that this Python has."""
    from titans_export.training.data import stdlib_folder

    path = checkpoint / "training.json"
    try:
        names: list[str] = json.loads(path.read_text(encoding="utf-8"))["held_out_files"]
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such checkpoint; run the demo in a checkout, or give --checkpoint"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: no list of held-out files; give --checkpoint a trained one") from None
    found = [stdlib_folder() / name for name in names if (stdlib_folder() / name).is_file()]
    long = sorted((file for file in found if file.stat().st_size >= _LEAST), key=lambda f: -f.stat().st_size)
    if not long:
        raise DataError(f"{stdlib_folder()}: has none of the held-out files that {path} lists")
    return [_Text(file.relative_to(stdlib_folder()).as_posix(), file) for file in long[:_FILES]]


def _stream(bundle: Path, texts: list[_Text], out: Path) -> list[tuple[Any, Any]]:
    _title("2. Stream texts it never saw through the bundle, in a process where torch cannot be imported")
    result = _work(out, bundle, texts, "stream")
    bits = np.load(out / "stream.npz")
    print("   bits per byte                       editing off   editing on    change   bytes/s off / on")
    for index, text in enumerate(texts):
        off, on = (result["scores"][f"{index}.{side}"] for side in ("off", "on"))
        change = on["bits_per_byte"] / off["bits_per_byte"] - 1
        print(
            f"   {text.name:<34} {off['bits_per_byte']:>12.3f} {on['bits_per_byte']:>12.3f} {change:>+9.1%}"
            f"   {off['tokens_per_second']:>8.0f} / {on['tokens_per_second']:.0f}"
        )
    print(f"   forbidden modules loaded in that process: {result['forbidden_modules_loaded'] or 'none'}")
    if result["forbidden_modules_loaded"]:
        raise CheckFailed("the runtime imported a package that it must not need")
    return [(bits[f"{index}.off"], bits[f"{index}.on"]) for index in range(len(texts))]


def _resume(bundle: Path, texts: list[_Text], out: Path) -> None:
    _title("3. Restore the memory that was saved half-way, in another process, and continue")
    result = _work(out, bundle, texts, "resume")
    whole = np.load(out / "stream.npz")[f"{len(texts) - 1}.on"][result["position"] :]
    resumed = np.load(out / "resume.npz")["resumed"]
    if not np.array_equal(whole, resumed):
        raise CheckFailed("the restored memory does not continue as the saved one would have")
    size = (out / "demo.memory").stat().st_size
    print(f"   {texts[-1].name} from byte {result['position']}: {result['bits_per_byte']:.3f} bits per byte")
    print(f"   equal to the uninterrupted run bit for bit; the memory file has {size / 1e6:.1f} MB")


def _time(checkpoint: Path, bundle: Path) -> None:
    from titans_runtime.bench.measure import Contestant, cases, measure
    from titans_runtime.bench.peers import Job, find_loader

    _title(f"4. Time it against PyTorch eager: same weights, same tokens, {_THREADS} thread, alternating")
    job = Job(bundle, checkpoint, _THREADS, bundle.parent)
    ours, eager = (Contestant(name, find_loader(name), job) for name in ("onnxruntime", "eager"))
    wanted = cases([_PREFILL], [_DECODE], [1], [0.0, 1.0])
    measured = measure([ours, eager], wanted, vocab_size=_BYTES)
    if measured.absent:
        raise CheckFailed(f"eager: {measured.absent[0].reason}")
    for case in wanted:
        row = measured.row("eager", case)
        print(
            f"   {case!s:<12} editing {'on' if case.edit else 'off':<4}"
            f" eager {row.seconds_per_token * 1e6:>8.0f} µs/token"
            f"   ours {measured.row('onnxruntime', case).seconds_per_token * 1e6:>7.0f} µs/token"
            f"   eager / ours {row.ratio:.2f}"
        )


def _work(out: Path, bundle: Path, texts: list[_Text], task: str) -> dict[str, Any]:
    """Run the worker in a process of its own and return what it prints."""
    cut = min(_LIMIT, texts[-1].path.stat().st_size) // 2
    job = {
        "task": task,
        "bundle": str(bundle),
        "threads": _THREADS,
        "texts": [text.job() for text in texts],
        "memory": str(out / "demo.memory"),
        "bits": str(out / f"{task}.npz"),
        "cut": cut - cut % SEGMENT,
    }
    done = subprocess.run(
        [sys.executable, str(_WORKER)], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise CheckFailed(f"the process without PyTorch failed with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _title(text: str) -> None:
    print(f"\n{text}", flush=True)

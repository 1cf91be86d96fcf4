"""What one memory costs: bytes, and the time to read, write, save and load it. For docs/scale.md.

python -m benchmarks.serving.scale BUNDLE
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

import titans_runtime as tr
from benchmarks.command import conclude
from benchmarks.serving.run import RESULTS, TEXT, batched_round, prompts
from titans_runtime.bench.machine import describe, own_versions
from titans_runtime.files import write_atomically
from titans_runtime.state import snapshot_bytes, snapshot_from_bytes
from titans_runtime.store.file import FileStore


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    args = parser.parse_args()
    model = tr.load(args.bundle, threads=1)
    report = {"command": "python -m benchmarks.serving.scale BUNDLE", "machine": describe() | own_versions()}
    report |= {"bytes": sizes(model), "milliseconds": times(model), "tokens_per_second": speeds(model)}
    print(json.dumps(report, indent=1))
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS / "scale.json", (json.dumps(report, indent=1) + "\n").encode())


def sizes(model: tr.Model) -> dict[str, int]:
    """Of a memory as it is stored, and compressed, after so many bytes of text."""
    session = model.session()
    found = {"state": model.manifest.state_bytes}
    text = TEXT.read_bytes() * 4
    for read in (0, 1_000, 10_000, 100_000):
        session.append(text[session.position : read]) if read else None
        content = snapshot_bytes(session.snapshot())
        found[f"stored after {read}"] = len(content)
        found[f"zlib -1 after {read}"] = len(zlib.compress(content, 1))
    return found


def times(model: tr.Model) -> dict[str, float]:
    """Milliseconds of each step of a request's way to and from the store; medians."""
    session = model.session()
    session.append(TEXT.read_bytes()[:20_000])
    snapshot = session.snapshot()
    content = snapshot_bytes(snapshot)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        store = FileStore(Path(folder))
        version = [store.put("a", content, expected=None).version]

        def put() -> None:
            version[0] = store.put("a", content, expected=version[0]).version

        return {
            "snapshot": median(session.snapshot),
            "to bytes, digest": median(lambda: snapshot_bytes(snapshot)),
            "from bytes, checked": median(lambda: snapshot_from_bytes(content, Path("m"), model.manifest)),
            "session from snapshot": median(lambda: model.continued(snapshot)),
            "put into a folder, flushed": median(put),
            "get from a folder": median(lambda: store.get("a")),
            "version from a folder": median(lambda: store.entry("a")),
        }


def speeds(model: tr.Model) -> dict[str, float]:
    """Tokens a second of one core, editing as recommended."""
    session = model.session()
    text = TEXT.read_bytes()[:8192]
    began = time.perf_counter()
    session.append(text)
    found = {"read": len(text) / (time.perf_counter() - began)}
    for count in (1, 16):
        rates = [batched_round(model, prompts(count, 8), 100)[0]["tokens_per_second"] for _ in range(5)]
        found[f"drawn, {count} at once"] = float(np.median(rates))
    return found


def median(call: Callable[[], object], times: int = 15) -> float:
    """Milliseconds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - began))
    return float(np.median(taken))


if __name__ == "__main__":
    conclude(main)

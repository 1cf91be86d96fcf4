"""A coverage-guided fuzzer of what is read from disk.

``python -m tests.runtime.fuzz manifest|memory [libFuzzer options]``

Any exception but the documented one, a hang, and memory beyond the limit end the run with an exit code that
is not 0, and libFuzzer leaves the input in the working directory.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["titans_runtime"]):
    from tests.runtime import fuzz_targets

LIMITS = ["-timeout=10", "-rss_limit_mb=1024", "-max_len=16384"]


def mutate(data: bytes, most: int, seed: int, target: str) -> bytes:
    """Change the JSON as JSON two times of three, any bytes else."""
    choice = random.Random(seed)
    if choice.random() < 0.66:
        with contextlib.suppress(Exception):
            return fuzz_targets.changed(data, target, choice)[:most]
    return bytes(atheris.Mutate(data, most))


def main(target: str, options: list[str]) -> None:
    """Fuzz until the options end it."""
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(fuzz_targets.seeds(target)):
        (corpus / str(number)).write_bytes(seed)
    read = fuzz_targets.TARGETS[target]
    atheris.Setup(
        [sys.argv[0], str(corpus), *LIMITS, *options],
        lambda data: read(data) if data else None,
        custom_mutator=lambda data, most, seed: mutate(data, most, seed, target),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

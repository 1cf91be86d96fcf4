"""Copy: a string of letters, a separator, and the string again."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.experiments.tasks.task import IGNORED, Batch, Task, Test, drawn_length

LETTERS = 26
SEPARATOR = LETTERS
LONGEST = 64
"""In training."""


def strings(generator: np.random.Generator, count: int, length: int) -> Batch:
    """``x₁ … xₙ | x₁ … xₙ₋₁``, where from the separator on every next letter is asked for."""
    letters = generator.integers(0, LETTERS, (count, length))
    separator = np.full((count, 1), SEPARATOR)
    tokens = np.concatenate([letters, separator, letters[:, :-1]], axis=1)
    targets = np.concatenate([np.full((count, length), IGNORED), letters], axis=1)
    return Batch(tokens, targets)


def _draw(generator: np.random.Generator, reach: float, count: int) -> Batch:
    return strings(generator, count, drawn_length(generator, 4, LONGEST, reach))


def _test(length: int, examples: int) -> Test:
    return Test("letters", f"{length:,}", length, examples, partial(_strings, length=length))


def _strings(generator: np.random.Generator, count: int, length: int) -> Batch:
    return strings(generator, count, length)


COPY = Task(
    "copy",
    vocab_size=LETTERS + 1,
    chance=1 / LETTERS,
    answers=range(LETTERS),
    draw=_draw,
    tests=tuple(_test(length, 128 if length <= 128 else 32) for length in (16, 32, 64, 128, 256, 512, 1024)),
    development=(_test(48, 32), _test(192, 16)),
    steps=2000,
    ways=("off", "fused", "readout"),
)

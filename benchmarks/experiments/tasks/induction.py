"""Induction Head: one token stands out; when it comes again, what followed it the first time?"""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.experiments.tasks.task import IGNORED, Batch, Task, Test, drawn_length

VOCABULARY = 16
SPECIAL = 0
LONGEST = 256
"""In training."""


def heads(generator: np.random.Generator, count: int, length: int) -> Batch:
    """``… S a … S``, of ``length`` tokens: ``a`` is asked for at the end; ``S`` stands nowhere else."""
    tokens = generator.integers(1, VOCABULARY, (count, length))
    rows = np.arange(count)
    places = generator.integers(0, length - 2, count)
    tokens[rows, places] = SPECIAL
    tokens[:, -1] = SPECIAL
    targets = np.full(tokens.shape, IGNORED)
    targets[:, -1] = tokens[rows, places + 1]
    return Batch(tokens, targets)


def _draw(generator: np.random.Generator, reach: float, count: int) -> Batch:
    return heads(generator, count, drawn_length(generator, 8, LONGEST, reach))


def _heads(generator: np.random.Generator, count: int, length: int) -> Batch:
    return heads(generator, count, length)


def _test(length: int, examples: int) -> Test:
    return Test("length", f"{length:,}", length, examples, partial(_heads, length=length))


INDUCTION = Task(
    "induction",
    vocab_size=VOCABULARY,
    chance=1 / (VOCABULARY - 1),
    draw=_draw,
    tests=tuple(
        _test(2**power, 256 if power <= 10 else 2 ** (18 - power) if power < 14 else 32)
        for power in range(6, 15)
    ),
    development=(_test(192, 128), _test(768, 32)),
    steps=1500,
)

"""Selective Copy: a few data tokens at random places among noise, asked for in their order."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.experiments.tasks.task import IGNORED, Batch, Task, Test, drawn_length

DATA = 14
NOISE, MARKER = DATA, DATA + 1
REMEMBERED = 8
"""Data tokens of an example."""
LONGEST = 64
"""In training, the markers not counted."""


def scattered(generator: np.random.Generator, count: int, length: int) -> Batch:
    """``length`` tokens, all noise but eight; then eight markers, to be answered by the eight in turn."""
    data = generator.integers(0, DATA, (count, REMEMBERED))
    order = generator.random((count, length)).argsort(axis=1)
    places = np.sort(order[:, :REMEMBERED], axis=1)
    tokens = np.full((count, length + REMEMBERED), NOISE)
    np.put_along_axis(tokens, places, data, axis=1)
    tokens[:, length:] = MARKER
    targets = np.full(tokens.shape, IGNORED)
    targets[:, length:] = data
    return Batch(tokens, targets)


def _draw(generator: np.random.Generator, reach: float, count: int) -> Batch:
    return scattered(generator, count, drawn_length(generator, REMEMBERED, LONGEST, reach))


def _scattered(generator: np.random.Generator, count: int, length: int) -> Batch:
    return scattered(generator, count, length)


def _test(length: int, examples: int) -> Test:
    return Test("length", f"{length:,}", length, examples, partial(_scattered, length=length))


SELECTIVE = Task(
    "selective",
    vocab_size=DATA + 2,
    chance=1 / DATA,
    answers=range(DATA),
    draw=_draw,
    tests=tuple(_test(length, 128 if length <= 128 else 64) for length in (16, 32, 64, 128, 256, 512, 1024)),
    development=(_test(48, 32), _test(192, 16)),
    steps=1000,
    ways=("off", "fused", "readout"),
)

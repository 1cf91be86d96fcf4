"""Induction Head: one token stands out; when it comes again, what followed it the first time?

Trained in three ways: every sequence by itself (``induction-fresh``); with rows that begin with the state
that another sequence left (``induction``; "state passing", Buitrago Ruiz and Gu 2025, arXiv 2507.02782); and
so with more of the training on whole sequences (``induction-long``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.experiments.tasks.task import IGNORED, Batch, Task, Test, drawn_length

VOCABULARY = 16
SPECIAL = 0
LONGEST = 256
"""In training."""
TRAINING_ASKED = 4
"""Times that the curriculum asks: from one answer in 256 tokens there is little to learn."""


_EXAMPLES = {2048: 64, 4096: 64, 8192: 32, 16384: 16}
"""Of long tests, in place of 128."""
_MORE_EXAMPLES = {4096: 256, 8192: 64, 16384: 32, 32768: 16}
"""The same where states go on from row to row: most at 16 times the training length."""


def heads(generator: np.random.Generator, count: int, length: int, asked: int = 1) -> Batch:
    """``… S a … S``, of ``length`` tokens: ``a`` is asked for at the end; ``S`` stands nowhere else.

    With ``asked`` above 1, ``S a`` stands as many times, anywhere, and is asked for every time but the first.
    """
    tokens = generator.integers(1, VOCABULARY, (count, length))
    slots = generator.random((count, (length - 1) // 2)).argsort(axis=1)[:, :asked]
    even = length % 2 == 0  # the last slot's answer stands before the end either way
    places = np.sort(2 * slots, axis=1) + generator.integers(0, 1 + even, (count, 1))
    answers = generator.integers(1, VOCABULARY, (count, 1))
    np.put_along_axis(tokens, places, SPECIAL, axis=1)
    np.put_along_axis(tokens, places + 1, answers, axis=1)
    tokens[:, -1] = SPECIAL
    targets = np.full(tokens.shape, IGNORED)
    np.put_along_axis(targets, places[:, 1:], answers, axis=1)
    targets[:, -1:] = answers
    return Batch(tokens, targets)


def _draw(generator: np.random.Generator, reach: float, count: int, asked_at_end: int = 1) -> Batch:
    """``asked_at_end``: times that the last part of a training asks; once is the task itself."""
    if reach == 1.0:
        return heads(generator, count, LONGEST, asked_at_end)
    return heads(generator, count, drawn_length(generator, 16, LONGEST, reach), TRAINING_ASKED)


def _heads(generator: np.random.Generator, count: int, length: int) -> Batch:
    return heads(generator, count, length)


def _test(length: int, examples: int) -> Test:
    return Test("length", f"{length:,}", length, examples, partial(_heads, length=length))


FRESH = Task(
    "induction-fresh",
    vocab_size=VOCABULARY,
    chance=1 / (VOCABULARY - 1),
    answers=range(1, VOCABULARY),
    draw=_draw,
    tests=tuple(_test(2**power, _EXAMPLES.get(2**power, 128)) for power in range(6, 15)),
    development=(_test(192, 32), _test(768, 32), _test(3072, 16)),
    steps=500,
    batch=32,
)
INDUCTION = replace(
    FRESH,
    name="induction",
    tests=tuple(_test(2**power, _MORE_EXAMPLES.get(2**power, 128)) for power in range(6, 16)),
    draw=partial(_draw, asked_at_end=2),
    steps=1000,
    carry=0.9,
    curriculum=(0.3, 0.8),
    ends=4096,  # longer streams are most of the questions' time, and many a contestant forgets before
    ways=("off", "fused"),
)
LONG = replace(INDUCTION, name="induction-long", draw=_draw, curriculum=(0.2, 0.5))
"""Half of the steps on whole sequences, not a fifth, and asked once there: 1.8 times the training's time."""

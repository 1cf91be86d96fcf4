"""MQAR, multi-query associative recall: keys and values in a stream, then keys whose value is asked for.

After Arora et al., "Zoology" (arXiv 2312.04927). Beside more pairs than training had, keys that are bound
anew are asked for: the value of the last binding counts, and training has none of them.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.experiments.tasks.task import IGNORED, Batch, Task, Test, drawn_length

KEYS = 64
VALUES = 16
QUERIES = 16
"""In tests; the keys asked for are all different."""
TRAINING_QUERIES = 24
"""Of any key, again and again: the more answers, the more there is to learn from."""
LONGEST = 8
"""Pairs in training, each bound once."""


def bindings(
    generator: np.random.Generator, count: int, pairs: int, times: int = 1, repeat: int = 0
) -> Batch:
    """``k v k v …``, every one of ``pairs`` keys ``times`` over, then up to 16 keys again, with their values.

    With ``repeat``, as many queries, each of any of the keys.

    All bindings come in random order. Of the second part the value after every key is asked for.
    """
    own = generator.random((count, KEYS)).argsort(axis=1)[:, :pairs]
    written = np.tile(own, times)
    order = generator.random(written.shape).argsort(axis=1)
    written = np.take_along_axis(written, order, axis=1)
    values = generator.integers(KEYS, KEYS + VALUES, written.shape)
    last = np.zeros((count, KEYS), np.int64)
    for place in range(written.shape[1]):
        np.put_along_axis(last, written[:, place : place + 1], values[:, place : place + 1], axis=1)
    if repeat:
        choice = generator.integers(0, pairs, (count, repeat))
    else:
        choice = generator.random(own.shape).argsort(axis=1)[:, :QUERIES]
    asked = np.take_along_axis(own, choice, axis=1)
    answers = np.take_along_axis(last, asked, axis=1)
    tokens = np.concatenate([_interleaved(written, values), _interleaved(asked, answers)], axis=1)
    silent = np.full((count, 2 * written.shape[1]), IGNORED)
    targets = np.concatenate([silent, _interleaved(answers, np.full(answers.shape, IGNORED))], axis=1)
    return Batch(tokens, targets)


def _interleaved(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack([first, second], axis=2).reshape(len(first), -1)


def _draw(generator: np.random.Generator, reach: float, count: int) -> Batch:
    return bindings(generator, count, drawn_length(generator, 4, LONGEST, reach), repeat=TRAINING_QUERIES)


def _bindings(generator: np.random.Generator, count: int, pairs: int, times: int) -> Batch:
    return bindings(generator, count, pairs, times)


def _test(group: str, pairs: int, times: int, examples: int = 64) -> Test:
    size = pairs if group == "pairs" else times
    return Test(group, f"{size:,}", size, examples, partial(_bindings, pairs=pairs, times=times))


MQAR = Task(
    "mqar",
    vocab_size=KEYS + VALUES,
    chance=1 / VALUES,
    answers=range(KEYS, KEYS + VALUES),
    draw=_draw,
    tests=(
        *(_test("pairs", pairs, 1) for pairs in (4, 8, 16, 32, 64)),
        *(_test("bindings of each of 16 keys", 16, times) for times in (1, 2, 4, 8, 16)),
    ),
    development=(_test("pairs", 24, 1, 32), _test("pairs", 48, 1, 32), _test("bindings", 16, 3, 32)),
    steps=1000,
)

"""Answers without a model: what any score has to be compared with.

A task that asks for what followed a key the last time needs no weights but a table. Where such a table does
as well as a model, the score says nothing about the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.experiments.tasks.task import IGNORED, Batch, Ids, Task

CONTEXTS = (4, 2, 1)
"""Tokens that are looked for, the longest first: what the readout memory of the Titans contestants hashes."""

Control = Callable[[Batch], Ids]
"""From questions to answers ``(B, T)``, ``IGNORED`` where nothing is asked."""


def controls(task: Task) -> dict[str, Control]:
    """By their names in tables."""
    return {
        "No model: what followed the last 4, 2 or 1 tokens before": last_successors,
        "No model: the most frequent possible answer so far": partial(most_frequent, answers=task.answers),
    }


def last_successors(batch: Batch) -> Ids:
    """What came after the last tokens where they stood before, of the longest context that did, and last."""
    return _answered(batch, _last_successor)


def most_frequent(batch: Batch, answers: range) -> Ids:
    """The token of ``answers`` that the stream had most often so far; the least of equals."""
    return _answered(batch, partial(_most_frequent, answers=answers))


def _answered(batch: Batch, answer: Callable[[Ids], int]) -> Ids:
    found = np.full(batch.targets.shape, IGNORED)
    for row, place in np.argwhere(batch.targets != IGNORED):
        found[row, place] = answer(batch.tokens[row, : place + 1])
    return found


def _last_successor(past: Ids) -> int:
    for length in CONTEXTS:
        if length >= len(past):
            continue
        ends = np.arange(length - 1, len(past) - 1)
        for back in range(length):
            ends = ends[past[ends - back] == past[-1 - back]]
        if ends.size:
            return int(past[ends[-1] + 1])
    return IGNORED


def _most_frequent(past: Ids, answers: range) -> int:
    counts = np.bincount(past, minlength=answers.stop)[answers.start : answers.stop]
    return answers.start + int(counts.argmax())

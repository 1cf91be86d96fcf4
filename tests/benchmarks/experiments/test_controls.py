"""Answers without a model, against literal examples and in the tables."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.experiments.controls import controls, last_successors, most_frequent
from benchmarks.experiments.tasks import EXPERIMENTS
from benchmarks.experiments.tasks.copying import COPY
from benchmarks.experiments.tasks.induction import heads
from benchmarks.experiments.tasks.recall import MQAR
from benchmarks.experiments.tasks.task import IGNORED, Batch, Task, examples


def asked(tokens: list[int], *places: int) -> Batch:
    """One row, asked at some places."""
    targets = np.full((1, len(tokens)), IGNORED)
    targets[0, list(places)] = 0
    return Batch(np.array([tokens]), targets)


def test_the_last_successor_of_the_longest_context_that_stood_before() -> None:
    assert last_successors(asked([7, 1, 7, 2, 7], 4))[0, 4] == 2
    assert last_successors(asked([5, 7, 1, 7, 2, 5, 7], 6))[0, 6] == 1  # "5 7" before "7"
    assert last_successors(asked([1, 2, 3], 2))[0, 2] == IGNORED  # nothing to go by
    assert last_successors(asked([4, 4], 1))[0, 1] == 4
    assert last_successors(asked([1, 2, 1, 2], 0))[0, 0] == IGNORED


def test_no_answer_looks_ahead() -> None:
    short, long = asked([7, 1, 7], 2), asked([7, 1, 7, 3, 7, 3], 2)
    assert last_successors(short)[0, 2] == last_successors(long)[0, 2] == 1
    assert most_frequent(short, range(8))[0, 2] == most_frequent(long, range(8))[0, 2] == 7


def test_the_most_frequent_answer_that_is_possible() -> None:
    batch = asked([9, 9, 9, 1, 2, 2, 9], 6)
    assert most_frequent(batch, range(5))[0, 6] == 2
    assert most_frequent(batch, range(10))[0, 6] == 9


def test_a_table_needs_no_weights_where_the_task_is_a_table() -> None:
    """Induction Head, and keys that are bound once."""
    for batch in (heads(np.random.default_rng(1), 20, 300), examples(MQAR.tests[4], 4)):
        right = last_successors(batch) == batch.targets
        assert right[batch.targets != IGNORED].mean() > 0.99


def test_what_is_not_asked_is_not_answered() -> None:
    batch = examples(COPY.tests[0], 0)
    for control in controls(COPY).values():
        assert (control(batch)[batch.targets == IGNORED] == IGNORED).all()


@pytest.mark.parametrize(
    "task",
    [task for tasks in EXPERIMENTS.values() for task in tasks if task.name != "digits"],
    ids=lambda task: task.name,
)
def test_all_answers_are_possible(task: Task) -> None:
    for number, test in enumerate(task.tests[:4]):
        targets = examples(test, number).targets
        assert set(np.unique(targets[targets != IGNORED])) <= set(task.answers)

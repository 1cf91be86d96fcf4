"""The queue for a slot: owners take turns, within limits."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_runtime.errors import OverloadError
from titans_runtime.serving.request import Request, Stream
from titans_runtime.serving.run import Run
from titans_runtime.serving.waiting import Waiting


def run_of(owner: str, number: int = 0) -> Run:
    request = Request(cast("Any", None), prompt=[number], owner=owner)
    return Run(Stream(request, lambda _: None), np.array([number]), np.random.default_rng(0))


def drained(waiting: Waiting) -> list[tuple[str, int]]:
    found = []
    while (run := waiting.pop()) is not None:
        found.append((run.request.owner, int(run.prompt[0])))
    return found


def test_owners_take_turns_and_each_is_served_in_order() -> None:
    waiting = Waiting(10, 10)
    for owner, number in (("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)):
        waiting.add(run_of(owner, number))
    assert len(waiting) == 6
    assert drained(waiting) == [("a", 1), ("b", 4), ("c", 5), ("a", 2), ("b", 6), ("a", 3)]
    assert len(waiting) == 0


def test_all_and_each_owner_have_a_limit() -> None:
    waiting = Waiting(3, 2)
    waiting.add(run_of("a"))
    waiting.add(run_of("a"))
    with pytest.raises(OverloadError, match="2 requests of yours wait already"):
        waiting.add(run_of("a"))
    waiting.add(run_of("b"))
    with pytest.raises(OverloadError, match="3 requests wait already"):
        waiting.add(run_of("c"))
    assert len(waiting) == 3


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=20), st.integers(0, 9))
def test_what_is_taken_out_is_gone_and_the_rest_keeps_its_order(
    entries: list[tuple[str, int]], least: int
) -> None:
    waiting, expected = Waiting(99, 99), Waiting(99, 99)
    for owner, number in entries:
        waiting.add(run_of(owner, number))
        if number < least:
            expected.add(run_of(owner, number))
    taken = waiting.pop_where(lambda run: run.prompt[0] >= least)
    assert sorted(int(run.prompt[0]) for run in taken) == sorted(n for _, n in entries if n >= least)
    for owner in "abc":  # whose turn it is may differ: an owner may have had others before
        own = [number for name, number in entries if name == owner and number < least]
        assert [n for name, n in drained_copy(waiting) if name == owner] == own
    assert len(waiting) == len(expected)


def drained_copy(waiting: Waiting) -> list[tuple[str, int]]:
    runs = waiting.pop_where(lambda _: True)
    for run in runs:
        waiting.add(run)
    return [(run.request.owner, int(run.prompt[0])) for run in runs]

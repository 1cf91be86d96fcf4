"""One call at a time, whatever interrupts it."""

from __future__ import annotations

import pytest

import titans_runtime as tr
from titans_runtime.exclusive import Exclusive


class _InterruptedAfterTaking(dict[str, object]):
    """Ctrl-C between taking it and whatever comes next."""

    def setdefault(self, key: str, value: object = None, /) -> object:
        super().setdefault(key, value)
        raise KeyboardInterrupt


def test_a_second_call_is_refused_and_leaves_it_to_the_first() -> None:
    exclusive = Exclusive()
    with exclusive.held():
        for _ in range(2):
            with pytest.raises(tr.UsageError, match="in use by another thread"), exclusive.held():
                pass
        assert exclusive.is_held
    assert not exclusive.is_held


def test_ctrl_c_while_it_is_taken_does_not_leave_it_taken() -> None:
    exclusive = Exclusive()
    exclusive._holder = _InterruptedAfterTaking()
    with pytest.raises(KeyboardInterrupt), exclusive.held():
        pass
    assert not exclusive.is_held
